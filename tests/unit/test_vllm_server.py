"""The trainer's side of vLLM behind HTTP, against servers that answer as vLLM 0.32 does: who is asked what, and what goes wrong."""

import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

from megaswift.errors import ConfigError, TrainingError
from megaswift.rollout.engine import Prompt, Sampling, seed_of
from megaswift.rollout.vllm_server import ServedEngine
from megaswift.rollout.vllm_worker import arriving
from tests.harness.distributed import free_port
from tests.harness.json_server import JsonHandler
from tests.unit.test_weight_stream import Alone

SAMPLING = Sampling(
    temperature=0.7, top_p=0.9, top_k=-1, max_tokens=5, stop_ids=(2, 9), repetition_penalty=1.2
)


class Server(ThreadingHTTPServer):
    """What a server was asked, and what it holds."""

    daemon_threads = True

    def __init__(self, **state: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.state = {"logprobs_mode": "processed_logprobs", "max_model_len": 64, "max_lora_rank": None, "owner": None, **state}
        self.asked: list[tuple[str, Any]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.adapter, self.adapters = "", dict[str, str]()  # adapter_config.json of the newest; folders by the names that are asked for
        self.is_idle = True
        self.refuses = ""
        self.more: dict[str, Any] = {}  # in each choice

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(JsonHandler):
    server: Server

    def do_GET(self) -> None:
        self.say({"data": [{"id": one} for one in ("the model", *self.server.adapters)]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked))
        if self.server.refuses and self.server.refuses in (self.path, asked.get("method")):
            self.say({"detail": "there is no such thing"}, code=500)
        elif self.path == "/collective_rpc" and asked["method"] == "megaswift_state":
            self.say({"results": [self.server.state]})
        elif self.path == "/collective_rpc":
            if asked["method"] == "megaswift_forget":
                return self.say({"results": [None]})
            host, port, token, owner, self.server.adapter = asked["args"]
            self.server.weights = {
                name: one.clone() for name, one in arriving(host, int(port), token, Alone(), "cpu")
            }
            if not self.server.adapter:
                self.server.state["owner"] = owner
            self.say({"results": ["/folder" if self.server.adapter else None]})
        elif self.path == "/v1/load_lora_adapter":
            assert asked["lora_name"] not in self.server.adapters, "vLLM refuses a name that it has"
            self.server.adapters[asked["lora_name"]] = asked["lora_path"]
            self.say("Success")
        elif self.path == "/v1/unload_lora_adapter":
            del self.server.adapters[asked["lora_name"]]
            self.say("Success")
        elif self.path == "/reset_prefix_cache":
            self.say({"success": self.server.is_idle})
        elif self.path == "/v1/completions":
            ids = [*asked["prompt"][:2], 9]
            logprobs = {"token_logprobs": [-0.5, -1.5, -0.25]}
            choice = {"token_ids": ids, "finish_reason": "stop", "logprobs": logprobs}
            self.say({"choices": [choice | self.server.more]})
        else:
            self.say(None)


@contextmanager
def servers(count: int = 1, **state: Any) -> Iterator[list[Server]]:
    found = [Server(**state) for _ in range(count)]
    for server in found:
        Thread(target=server.serve_forever, daemon=True).start()
    yield found
    for server in found:
        server.shutdown()
        server.server_close()


def engine(found: list[Server], room: int | None = 64, lora_rank: int = 0) -> ServedEngine:
    urls = [server.url for server in found]
    return ServedEngine(urls, timeout_s=5, room=room, weights_port=None, lora_rank=lora_rank)


def test_every_server_gets_all_weights_and_forgets_its_prompts() -> None:
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    with servers(2) as found:
        engine(found).load(iter(weights.items()))
        for server in found:
            assert server.weights.keys() == weights.keys()
            assert all(torch.equal(value, server.weights[name]) for name, value in weights.items())
            assert server.asked[-1][0] == "/reset_prefix_cache"


def adapted(found: list[Server]) -> ServedEngine:
    """Return an engine whose servers hold its base model."""
    asked = engine(found, lora_rank=9)
    assert asked.adapts
    asked.load(iter([("base", torch.zeros(2))]))
    assert not any(server.adapter or server.adapters for server in found)
    return asked


def test_an_adapter_goes_to_servers_that_take_it_and_answers() -> None:
    prompt = Prompt(ids=np.array([1, 2], np.int32), key=(0,))
    with servers(2, max_lora_rank=16) as found:
        asked = adapted(found)
        for _ in range(2):
            asked.load(iter([("a", torch.ones(3))]), '{"r": 9}')
        for server in found:
            assert (server.adapter, server.adapters) == ('{"r": 9}', {"megaswift": "/folder"})
            assert torch.equal(server.weights["a"], torch.ones(3))
            paths = [asked.get("method", path) for path, asked in server.asked[-4:]]
            assert paths == ["/v1/unload_lora_adapter", "/v1/load_lora_adapter", "megaswift_forget", "/reset_prefix_cache"]
        asked.complete([prompt], SAMPLING)
        assert found[0].asked[-1][1]["model"] == "megaswift"


def test_a_server_that_holds_the_base_of_another_run_is_found() -> None:
    with servers(max_lora_rank=16) as found:
        first = adapted(found)
        adapted(found)
        with pytest.raises(TrainingError, match="has lost the base model of this run"):
            first.load(iter([("a", torch.ones(3))]), '{"r": 9}')


def test_one_server_without_adapters_makes_all_take_merged_models() -> None:
    with servers(max_lora_rank=16) as one, servers() as other:
        assert not engine([*one, *other], lora_rank=17).adapts
        assert not engine(one).adapts, "no adapter trains"
        with pytest.raises(ConfigError, match=r"needs room for rank 17, and the vLLM server at .* has 16"):
            engine(one, lora_rank=17)


def test_a_server_that_keeps_its_cache_is_not_asked() -> None:
    with servers() as found:
        asked, found[0].is_idle = engine(found), False
        with pytest.raises(TrainingError, match="answers others still, with prompts of older weights"):
            asked.load(iter([("a", torch.ones(3))]))


def test_a_stranger_at_the_port_gets_nothing() -> None:
    """He comes first, says something else, and the server still has all weights."""
    port = free_port()
    with servers() as found:
        asked = ServedEngine([found[0].url], timeout_s=5, room=64, weights_port=port)
        heard = []

        def listen() -> None:
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                        stranger.sendall(b"x" * 64)
                        heard.append(stranger.recv(64))
                        return
                except ConnectionRefusedError:
                    time.sleep(0.001)
                except ConnectionResetError:
                    heard.append(b"")
                    return

        thread = Thread(target=listen)
        thread.start()
        asked.load(iter([("a", torch.ones(3))]))
        thread.join()
        assert heard == [b""]
        assert torch.equal(found[0].weights["a"], torch.ones(3))


def test_completions_come_back_in_order_and_groups_stay_together() -> None:
    prompts = [
        Prompt(ids=np.array([10 + place // 4, 5, 6], np.int32), key=(1, place // 4, place % 4))
        for place in range(8)
    ]
    with servers(2) as found:
        answers = engine(found).complete(prompts, SAMPLING)
        assert [answer.ids for answer in answers] == [[10, 5, 9]] * 4 + [[11, 5, 9]] * 4
        assert all(answer.stopped and answer.logps == [-0.5, -1.5, -0.25] for answer in answers)
        for number, server in enumerate(found):
            asked = [one for path, one in server.asked if path == "/v1/completions"]
            assert {one["prompt"][0] for one in asked} == {10 + number}
            wanted = {seed_of(prompt) for prompt in prompts[4 * number : 4 * number + 4]}
            assert {one["seed"] for one in asked} == wanted
            assert len(wanted) == 4
            assert asked[0]["stop_token_ids"] == [2, 9]
            assert (asked[0]["temperature"], asked[0]["top_k"], asked[0]["model"]) == (0.7, 0, "the model")
            assert (asked[0]["repetition_penalty"], asked[0]["min_p"]) == (1.2, 0.0)


def test_experts_come_back_as_the_server_chose_them() -> None:
    """As vllm/entrypoints/openai/completion/protocol.py says: base64 of a .npy file, of all tokens but the last."""
    experts = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3)
    file = io.BytesIO()
    np.save(file, experts)
    prompt = Prompt(ids=np.array([10, 5, 6], np.int32), key=(1,))
    with servers() as found:
        (without,) = engine(found).complete([prompt], SAMPLING)
        found[0].more = {"routed_experts": base64.b64encode(file.getvalue()).decode()}
        (answer,) = engine(found).complete([prompt], SAMPLING)
    assert without.experts is None
    assert answer.experts is not None and np.array_equal(answer.experts, experts)


@pytest.mark.parametrize(
    ("state", "room", "message"),
    [
        ({"max_model_len": 32}, 64, "max_length=64 is more than the vLLM server at"),
        ({"logprobs_mode": "raw_logprobs"}, 64, "has logprobs_mode=raw_logprobs"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(state: dict[str, Any], room: int, message: str) -> None:
    with servers(**state) as found, pytest.raises(ConfigError, match=message):
        engine(found, room)


def test_a_server_of_another_kind_is_told_apart() -> None:
    with servers() as found:
        found[0].refuses = "/collective_rpc"
        with pytest.raises(
            ConfigError, match=r"cannot take weights from this trainer.*Start it with `megaswift rollout`"
        ):
            engine(found)


def test_nobody_there_is_said_after_the_timeout() -> None:
    with pytest.raises(
        ConfigError, match=r"no vLLM server answers at http://127\.0\.0\.1:9 after vllm_server_timeout=0"
    ):
        ServedEngine(["http://127.0.0.1:9"], timeout_s=0, room=None, weights_port=None)


@pytest.mark.parametrize("what", ["/v1/completions", "megaswift_fetch"])
def test_what_a_server_says_is_passed_on(what: str) -> None:
    prompt = Prompt(ids=np.array([1, 2], np.int32), key=(0,))
    with servers() as found:
        asked = engine(found)
        found[0].refuses = what
        with pytest.raises(TrainingError, match=r"500 .*there is no such thing"):
            if what == "megaswift_fetch":
                asked.load(iter([("a", torch.zeros(2))]))
            else:
                asked.complete([prompt], SAMPLING)
