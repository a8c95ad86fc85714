"""vLLM behind HTTP as a RolloutEngine: prompts go to all servers in turn, weights come to them from rank 0 of the trainer."""

import hmac
import json
import secrets
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from megaswift.errors import ConfigError, TrainingError
from megaswift.logs import get_logger
from megaswift.rollout.engine import Answer, Prompt, Sampling, Weights, seed_of
from megaswift.rollout.weight_stream import send_weights

AT_ONCE = 1024  # requests under way at a server, each a thread that waits: vLLM runs at most so many sequences by default
ANSWER_S = 3600.0  # for the longest completion behind a full queue
LOOK_S = 0.5  # between looks at servers that are starting or do not come for their weights
PROMPT_S = 10.0  # for what a server that is up answers at once

logger = get_logger(__name__)


class ServedEngine:
    """Servers that `megaswift rollout` started, as one engine."""

    def __init__(
        self, urls: Sequence[str], *, timeout_s: float, room: int | None, weights_port: int | None
    ) -> None:
        """Wait until all are up and check them; `room` are the tokens that a sample may have. Raises UserError."""
        self._urls, self._weights_port = list(urls), weights_port or 0
        deadline = time.monotonic() + timeout_s
        self._models = [_served_model(url, deadline, timeout_s) for url in self._urls]
        for url in self._urls:
            _check_server(url, room)

    def load(self, weights: Weights) -> None:
        """Offer the weights to all servers at once, and return when each has them."""
        token = secrets.token_hex(16)
        with (
            ThreadPoolExecutor(len(self._urls)) as pool,
            socket.create_server(("", self._weights_port)) as offer,
        ):
            port = str(offer.getsockname()[1])
            calls = {
                url: pool.submit(_call_workers, url, "megaswift_fetch", _own_address(url), port, token)
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
            for call in calls.values():
                call.result()
            if failure is not None:
                raise TrainingError(f"the vLLM servers did not take the weights: {failure}.")
        for url in self._urls:
            _post(url, "/reset_prefix_cache", None)

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """Return one completion of each prompt; neighbours, which often begin alike, go to the same server."""
        share = -(-len(prompts) // len(self._urls))
        with ThreadPoolExecutor(min(len(prompts), AT_ONCE * len(self._urls))) as pool:
            return list(
                pool.map(
                    lambda number: self._one(number // share, prompts[number], sampling), range(len(prompts))
                )
            )

    def rest(self) -> None:
        """Nothing: the servers have devices of their own."""

    def _one(self, server: int, prompt: Prompt, sampling: Sampling) -> Answer:
        asked = {
            "model": self._models[server],
            "prompt": prompt.ids.tolist(),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": max(sampling.top_k, 0),
            "repetition_penalty": sampling.repetition_penalty,
            "min_p": 0.0,  # not what the model's own generation_config.json may ask for
            "stop_token_ids": list(sampling.stop_ids),
            "seed": seed_of(prompt),
            "logprobs": 0,  # of no token beside the one that was drawn
            "return_token_ids": True,
        }
        (choice,) = _post(self._urls[server], "/v1/completions", asked, timeout_s=ANSWER_S)["choices"]
        return Answer(
            ids=choice["token_ids"],
            stopped=choice["finish_reason"] == "stop",
            logps=choice["logprobs"]["token_logprobs"],
        )


def _served_model(url: str, deadline: float, timeout_s: float) -> str:
    """Return the name of the model that a server answers for, once it is up."""
    while True:
        try:
            name: str = json.loads(_request(url, "/v1/models", None, PROMPT_S))["data"][0]["id"]
            return name
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no vLLM server answers at {url} after vllm_server_timeout={timeout_s:g} s ({error}). Start one with "
                    "`megaswift rollout --model ...`, or correct --vllm_server_host and --vllm_server_port."
                ) from error
            time.sleep(LOOK_S)


def _check_server(url: str, room: int | None) -> None:
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
    found: list[Any] = _post(url, "/collective_rpc", asked, timeout_s=ANSWER_S).get("results", [])
    return found


def _post(url: str, path: str, asked: dict[str, Any] | None, *, timeout_s: float = 60.0) -> dict[str, Any]:
    """Return the answer of a server; raises TrainingError, which says what it said."""
    try:
        text = _request(url, path, json.dumps(asked or {}).encode(), timeout_s)
        return json.loads(text) if text else {}
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace").strip()[:500]
        raise TrainingError(
            f"the vLLM server at {url} refuses {path}: {error.code} {said}. Its own log says more."
        ) from error
    except (urllib.error.URLError, OSError) as error:
        raise TrainingError(
            f"the vLLM server at {url} does not answer {path}: {error}. See its log and start it again; the same command then "
            "resumes this run."
        ) from error


def _request(url: str, path: str, body: bytes | None, timeout_s: float) -> bytes:
    """GET, or POST where there is a body; never through a proxy, which is for other machines than those of a cluster."""
    request = urllib.request.Request(url + path, data=body, headers={"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout_s) as response:
        found: bytes = response.read()
        return found
