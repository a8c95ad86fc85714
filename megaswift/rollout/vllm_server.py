"""vLLM behind HTTP as a RolloutEngine: prompts go to all servers in turn, weights come to them from rank 0 of the trainer."""

import hmac
import json
import secrets
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from megaswift.errors import ConfigError, TrainingError
from megaswift.logs import get_logger
from megaswift.rollout.engine import ADAPTER, Answer, Prompt, Sampling, Weights
from megaswift.rollout.vllm_http import (
    ANSWER_S,
    AT_ONCE,
    LOOK_S,
    PROMPT_S,
    completion_by,
    post,
    told,
    wait_for,
)
from megaswift.rollout.weight_stream import send_weights

ADVICE = (
    "Start one with `megaswift rollout --model ...`, or correct --vllm_server_host and --vllm_server_port."
)

logger = get_logger(__name__)


class ServedEngine:
    """Servers that `megaswift rollout` started, as one engine."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout_s: float,
        room: int | None,
        weights_port: int | None,
        lora_rank: int = 0,
    ) -> None:
        """Wait until all are up and check them; `room` are the tokens that a sample may have. Raises UserError.

        An adapter of `lora_rank` goes to them as it is if all were started with --vllm_enable_lora.
        """
        self._urls, self._weights_port = list(urls), weights_port or 0
        deadline = time.monotonic() + timeout_s
        servers = [wait_for(url, deadline, timeout_s, advice=ADVICE) for url in self._urls]
        ranks = {url: _check_server(url, room) for url in self._urls}
        self.adapts = lora_rank > 0 and all(ranks.values())
        if self.adapts:
            _check_ranks(ranks, lora_rank)
        self._owner = secrets.token_hex(16)  # of the base model that the servers hold
        self._servers = [replace(one, name=ADAPTER) for one in servers] if self.adapts else servers

    def load(self, weights: Weights, adapter: str | None = None) -> None:
        """Offer the weights to all servers at once, and return when each has them."""
        if adapter is not None:
            self._check_base()
        token = secrets.token_hex(16)
        with (
            ThreadPoolExecutor(len(self._urls)) as pool,
            socket.create_server(("", self._weights_port)) as offer,
        ):
            port = str(offer.getsockname()[1])
            calls = {
                url: pool.submit(
                    _call_workers, url, "megaswift_fetch", _own_address(url), port, token, self._owner, adapter or ""
                )
                for url in self._urls
            }
            failure: OSError | None = None
            connections = _connections(offer, token, calls)
            try:
                send_weights(connections, weights)
            except OSError as error:  # a server that left says why itself
                failure = error
            finally:
                for connection in connections:
                    connection.close()
            folders = {url: call.result()[0] for url, call in calls.items()}
            if failure is not None:
                raise TrainingError(f"the vLLM servers did not take the weights: {failure}.")
        for url, folder in folders.items():
            if adapter is not None:
                _let_it_answer(url, folder)
            if post(url, "/reset_prefix_cache", None).get("success") is False:
                raise TrainingError(
                    f"the vLLM server at {url} answers others still, with prompts of older weights. Wait until it is idle, or start it again."
                )

    def _check_base(self) -> None:
        """Raise TrainingError where a server does not hold the base model that this run has sent."""
        for url in self._urls:
            if _call_workers(url, "megaswift_state")[0]["owner"] != self._owner:
                raise TrainingError(
                    f"the vLLM server at {url} has lost the base model of this run: it was started again, or another trainer uses it. Run "
                    "the same command again, with servers that no other trainer uses."
                )

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """Return one completion of each prompt; neighbours, which often begin alike, go to the same server."""
        share = -(-len(prompts) // len(self._urls))
        with ThreadPoolExecutor(min(len(prompts), AT_ONCE * len(self._urls))) as pool:
            return list(
                pool.map(
                    lambda number: completion_by(self._servers[number // share], prompts[number], sampling),
                    range(len(prompts)),
                )
            )

    def rest(self) -> None:
        """Nothing: the servers have devices of their own."""


def _let_it_answer(url: str, folder: str) -> None:
    """Let a server read the adapter in a folder of its own and answer with it, in place of the one before.

    vLLM 0.32 would read one that is loaded "in place" anew with every batch (entrypoints/openai/models/serving.py).
    """
    models = json.loads(told(url, "/v1/models", None))["data"]
    if ADAPTER in (one["id"] for one in models):
        told(url, "/v1/unload_lora_adapter", {"lora_name": ADAPTER})
    told(url, "/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": folder})
    _call_workers(url, "megaswift_forget")


def _check_ranks(ranks: dict[str, int], lora_rank: int) -> None:
    for url, most in ranks.items():
        if lora_rank > most:
            raise ConfigError(
                f"the adapter needs room for rank {lora_rank}, and the vLLM server at {url} has {most}. Start it with "
                f"--vllm_max_lora_rank {lora_rank}, or without --vllm_enable_lora."
            )


def _check_server(url: str, room: int | None) -> int:
    """Return the greatest rank of adapters that a server takes, 0 for none."""
    try:
        state = _call_workers(url, "megaswift_state")[0]
    except TrainingError as error:
        raise ConfigError(
            f"the vLLM server at {url} cannot take weights from this trainer ({error}). Start it with `megaswift rollout`."
        ) from error
    if state["logprobs_mode"] != "processed_logprobs":
        raise ConfigError(
            f"the vLLM server at {url} has logprobs_mode={state['logprobs_mode']}, so that its log-probabilities are not those it "
            "draws with. Start it with `megaswift rollout`."
        )
    if room is not None and state["max_model_len"] < room:
        raise ConfigError(
            f"max_length={room} is more than the vLLM server at {url} has room for: {state['max_model_len']}. Lower it, or start "
            f"the server with --vllm_max_model_len {room}."
        )
    return state["max_lora_rank"] or 0


def _connections(offer: socket.socket, token: str, calls: dict[str, Future[Any]]) -> list[socket.socket]:
    """Return a connection to each server that was called; raises what a call ended with that did not come."""
    offer.settimeout(LOOK_S)
    found: list[socket.socket] = []
    while len(found) < len(calls):
        try:
            connection, _ = offer.accept()
        except TimeoutError:
            for call in calls.values():
                if call.done():
                    call.result()
                    raise TrainingError("a vLLM server took no weights and says that all is well.") from None
            continue
        connection.settimeout(PROMPT_S)
        if _names(connection, token):
            connection.settimeout(ANSWER_S)
            found.append(connection)
        else:
            connection.close()
    return found


def _names(connection: socket.socket, token: str) -> bool:
    """Whether the other end names the token; somebody else may have found the port."""
    try:
        said = connection.recv(len(token), socket.MSG_WAITALL)
    except OSError:
        return False
    return hmac.compare_digest(said, token.encode())


def _own_address(url: str) -> str:
    """Return the address of this machine that a server can reach: the one from which it is reached."""
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), parts.port or 80), timeout=PROMPT_S) as there:
        address: str = there.getsockname()[0]
        return address


def _call_workers(url: str, method: str, *words: str) -> list[Any]:
    """Call a method of the workers of a server (rollout/vllm_worker.py) and return what each says."""
    asked = {"method": method, "args": list(words)}
    found: list[Any] = post(url, "/collective_rpc", asked, timeout_s=ANSWER_S).get("results", [])
    return found
