"""A teacher that a vLLM server has: what it finds likeliest at every place of a document or how likely what stands there, and what it
writes itself.

Letters: S tokens of a document, K likeliest tokens.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megaswift.errors import ConfigError, TrainingError
from megaswift.logs import get_logger
from megaswift.rollout.engine import Answer, Prompt, Sampling, Weights
from megaswift.rollout.vllm_http import ANSWER_S, AT_ONCE, completion_by, post, wait_for

READ_AT_ONCE = 16  # documents under way of one rank: the text of each may be tens of MB
PROBES = 32  # tokens by which vocabularies are compared
# Sampling that leaves probabilities as they are: some servers tell those that they draw with.
UNCHANGED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
UNKNOWN = "\ufffd"  # what a part of a character is decoded to

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class LikeliestTokens:
    """What a teacher finds likeliest at the places of a document, each but the last."""

    ids: np.ndarray  # int32 [S - 1, K]
    logps: np.ndarray  # float32 [S - 1, K]: among all tokens


class ServedTeacher:
    """One server. It is also a RolloutEngine, for answers that the teacher writes itself."""

    def __init__(
        self,
        url: str,
        *,
        top_k: int | None,
        vocab_size: int,
        decode: Callable[[list[int]], str],
        room: int | None,
        timeout_s: float,
    ) -> None:
        """Wait until it is up and check that it can teach a model with `vocab_size` tokens, which `decode` makes text of, on
        documents of `room` tokens; without `top_k` it reads them alone. Raises UserError."""
        self._top_k, self._vocab_size = 0 if top_k is None else min(top_k, vocab_size), vocab_size
        more = f" --max-logprobs {self._top_k}" if self._top_k else ""
        self._start = f"Start it with `vllm serve MODEL{more}`"
        advice = f"{self._start}, or correct --teacher_model_server."
        self._server = wait_for(url, time.monotonic() + timeout_s, timeout_s, advice=advice)
        longest = self._server.max_model_len
        # Where it reads whole documents it writes a token more.
        needed = None if room is None else room + (top_k is None)
        if needed is not None and longest is not None and longest < needed:
            raise ConfigError(
                f"max_length={room} is more than the teacher at {url} has room for: {longest}. Lower it, or start the server with "
                f"--max-model-len {needed}."
            )
        self._compare_vocabularies(decode)
        what = "log-probabilities" if top_k is None else f"its {self._top_k} likeliest tokens"
        try:
            (self.read if top_k is None else self.likeliest)(np.zeros(2, np.int32))
        except TrainingError as error:
            raise ConfigError(f"the teacher does not tell {what}: {error} {self._start}.") from error

    def read(self, ids_S: np.ndarray) -> np.ndarray:
        """Return the teacher's log-probability of each token of a document but the first, float32 [S - 1]. Raises UserError."""
        asked = {
            "model": self._server.name,
            "prompt": ids_S.tolist(),
            "prompt_logprobs": 0,  # of the document's own tokens alone
            "max_tokens": 1,
            **UNCHANGED,
        }
        (choice,) = post(self._server.url, "/v1/completions", asked, timeout_s=ANSWER_S)["choices"]
        places = (choice.get("prompt_logprobs") or [None])[1:]  # nothing comes before the first token
        logps = [
            place[str(token)]["logprob"]
            for place, token in zip(places, ids_S[1:].tolist(), strict=False)
            if str(token) in place
        ]
        if len(logps) != len(ids_S) - 1 or not np.isfinite(logps).all():
            raise TrainingError(
                f"the teacher at {self._server.url} tells log-probabilities of {len(logps)} tokens behind the first in a document of "
                f"{len(ids_S)}."
            )
        return np.array(logps, np.float32)

    def likeliest(self, ids_S: np.ndarray) -> LikeliestTokens:
        """Return the teacher's likeliest next tokens behind each token of a document but the last. Raises UserError."""
        places = self._places(ids_S)
        if len(places) != len(ids_S) - 1:
            raise TrainingError(
                f"the teacher at {self._server.url} says something of {len(places)} places in a document of {len(ids_S)} tokens."
            )
        found = [self._best(place) for place in places]
        ids, logps = (np.array([[one[what] for one in best] for best in found]) for what in (1, 0))
        if not np.isfinite(logps).all():
            raise TrainingError(
                f"the teacher at {self._server.url} answers log-probabilities that are no numbers."
            )
        if ids.max() >= self._vocab_size:
            raise ConfigError(
                f"the teacher at {self._server.url} knows token {ids.max()}, and the trained model has vocab_size={self._vocab_size}: "
                "they do not read the same tokens. Serve a model with the same tokenizer."
            )
        return LikeliestTokens(ids=ids.astype(np.int32), logps=logps.astype(np.float32))

    def _places(self, ids_S: np.ndarray) -> list[dict[str, float]]:
        """Return log-probabilities by token for each place of a document but the last.

        The server writes a token more than it reads, so it reads all but the last one and is asked about what it writes too: a
        document then needs no more room than it has tokens.
        """
        asked = {
            "model": self._server.name,
            "prompt": ids_S[:-1].tolist(),
            "prompt_logprobs": self._top_k,
            "max_tokens": 1,
            "logprobs": self._top_k,
            "return_tokens_as_token_ids": True,  # token_id:5
            **UNCHANGED,
        }
        (choice,) = post(self._server.url, "/v1/completions", asked, timeout_s=ANSWER_S)["choices"]
        read = (choice.get("prompt_logprobs") or [None])[1:]  # nothing comes before the first token
        written = (choice.get("logprobs") or {}).get("top_logprobs") or []
        return [
            *({token: told["logprob"] for token, told in place.items()} for place in read),
            *({token.rpartition(":")[2]: logp for token, logp in place.items()} for place in written),
        ]

    def load(self, weights: Weights, adapter: str | None = None) -> None:
        """Nothing: the teacher stays as it is."""

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """Return one completion of each prompt by the teacher."""
        with ThreadPoolExecutor(min(len(prompts), AT_ONCE)) as pool:
            return list(pool.map(lambda prompt: completion_by(self._server, prompt, sampling), prompts))

    def rest(self) -> None:
        """Nothing: the server has devices of its own."""

    def _best(self, place: dict[str, float]) -> list[tuple[float, int]]:
        """Return log-probability and id of the likeliest tokens; the document's own token comes beside them if it is none."""
        best = sorted(((float(logp), int(token)) for token, logp in place.items()), reverse=True)
        if len(best) < self._top_k:
            raise TrainingError(
                f"the teacher at {self._server.url} tells {len(best)} tokens of a place, not gkd_logits_topk={self._top_k}."
            )
        return best[: self._top_k]

    def _compare_vocabularies(self, decode: Callable[[list[int]], str]) -> None:
        """Let both sides spell the same tokens; raises ConfigError where they differ in more than blanks."""
        tokens = [token for token in _spread_out(self._vocab_size) if UNKNOWN not in decode([token])]
        try:
            asked = {"model": self._server.name, "tokens": tokens}
            theirs = post(self._server.url, "/detokenize", asked)["prompt"]
        except TrainingError as error:
            logger.warning("the teacher's vocabulary was not compared with the trained model's: %s", error)
            return
        ours = decode(tokens)
        if "".join(theirs.split()) != "".join(ours.split()):
            raise ConfigError(
                f"the teacher at {self._server.url} reads tokens {tokens[:3]}... as {theirs[:40]!r}, and the trained model as "
                f"{ours[:40]!r}. Serve a model with the same tokenizer."
            )


def _spread_out(vocab_size: int) -> list[int]:
    """Return tokens of the first half of the vocabulary, where neither padding is nor what fine-tuning added."""
    return list(range(0, vocab_size // 2, max(1, vocab_size // 2 // PROBES)))
