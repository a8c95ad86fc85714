"""A teacher behind HTTP that answers in the layout of vLLM 0.32's server, from a model of transformers in this process."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaswift.rollout.engine import Sampling
from megaswift.rollout.generate import chances, complete
from tests.harness.json_server import JsonHandler


class TeacherServer(ThreadingHTTPServer):
    """What it was asked, and what it knows; more than `max_logprobs` it does not tell, and nothing after `patience` questions."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, model: Path, *, max_logprobs: int = 20, max_model_len: int = 512, patience: int = 10**6
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.max_logprobs, self.max_model_len, self.patience = max_logprobs, max_model_len, patience
        self.asked: list[dict[str, Any]] = []
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def documents(self) -> list[list[int]]:
        """What it was to find likeliest tokens in, without the first looks at it."""
        found = [asked["prompt"] for asked in self.asked if asked.get("prompt_logprobs") is not None]
        return [ids for ids in found if any(ids)]

    def prompt_logprobs(self, ids: list[int], count: int) -> list[Any]:
        """As vLLM has them: the document's own token first, then the likeliest ones, with ranks; nothing for the first token."""
        places: list[Any] = [None]
        for own, logps_V in zip(ids[1:], self._logps(ids)[:-1], strict=True):
            told = {own: {"logprob": float(logps_V[own]), "rank": int((logps_V >= logps_V[own]).sum())}}
            for rank, (logp, token) in enumerate(
                zip(*map(torch.Tensor.tolist, logps_V.topk(count)), strict=True), 1
            ):
                told[token] = {"logprob": logp, "rank": rank}
            for token, one in told.items():
                one["decoded_token"] = self.tokenizer.decode([token])  # type: ignore[assignment]  # a text
            places.append(told)
        return places

    def next_logprobs(self, ids: list[int], count: int) -> dict[str, Any]:
        """As vLLM has those of one token that is written: the drawn one first, here the least likely of all, then the likeliest."""
        logps_V = self._logps(ids)[-1]
        drawn, best = int(logps_V.argmin()), logps_V.topk(count).indices.tolist()
        told = {f"token_id:{token}": float(logps_V[token]) for token in (drawn, *best)}
        return {
            "tokens": [f"token_id:{drawn}"],
            "token_logprobs": [float(logps_V[drawn])],
            "top_logprobs": [told],
        }

    @torch.no_grad()
    def _logps(self, ids: list[int]) -> torch.Tensor:
        logps_SV: torch.Tensor = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return logps_SV

    def complete(self, asked: dict[str, Any]) -> list[int]:
        sampling = Sampling(
            temperature=asked["temperature"], top_p=asked["top_p"], top_k=asked["top_k"],
            max_tokens=asked["max_tokens"], stop_ids=tuple(asked["stop_token_ids"]),
        )  # fmt: skip
        draws = [chances((asked["seed"],), length=asked["max_tokens"])]
        (ids,) = complete(self.model, [np.array(asked["prompt"])], draws, sampling, pad_id=0)
        return [int(token) for token in ids]


class _Handler(JsonHandler):
    server: TeacherServer

    def do_GET(self) -> None:
        self.say({"data": [{"id": "the teacher", "max_model_len": self.server.max_model_len}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if self.path == "/detokenize":
            return self.say({"prompt": server.tokenizer.decode(asked["tokens"])})
        count = asked.get("prompt_logprobs")
        if count is not None and count > server.max_logprobs:
            text = f"Requested prompt logprobs of {count}, which is greater than max allowed: {server.max_logprobs}"
            return self.say({"error": {"message": text, "type": "BadRequestError", "code": 400}}, code=400)
        if len(server.asked) >= server.patience:
            return self.say({"error": {"message": "EngineCore died", "code": 500}}, code=500)
        choice: dict[str, Any] = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
        with server.lock:
            server.asked.append(asked)
            if count is not None:
                choice["prompt_logprobs"] = server.prompt_logprobs(asked["prompt"], count)
                if "logprobs" in asked:
                    choice["logprobs"] = server.next_logprobs(asked["prompt"], asked["logprobs"])
            else:
                ids = server.complete(asked)
                choice |= {"token_ids": ids, "logprobs": {"token_logprobs": [0.0] * len(ids)}}
                choice["finish_reason"] = "stop" if ids[-1] in asked["stop_token_ids"] else "length"
        self.say({"id": "cmpl-1", "object": "text_completion", "model": "the teacher", "choices": [choice]})


@contextmanager
def served(model: Path, **limits: int) -> Iterator[TeacherServer]:
    """Serve a model of a folder until the end of the block."""
    server = TeacherServer(model, **limits)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
