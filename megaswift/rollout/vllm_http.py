"""Questions to a vLLM server: its API is OpenAI's, with extensions (vLLM 0.32)."""

import base64
import http.client
import io
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy as np

from megaswift.errors import ConfigError, TrainingError
from megaswift.rollout.engine import Answer, Prompt, Sampling, seed_of

AT_ONCE = 1024  # requests under way at a server, each a thread that waits: vLLM runs at most so many sequences by default
ANSWER_S = 3600.0  # for the longest completion behind a full queue
LOOK_S = 0.5  # between looks at servers that are starting or do not come for their weights
PROMPT_S = 10.0  # for what a server that is up answers at once


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model that a server answers for."""

    url: str
    name: str
    max_model_len: int | None  # tokens of a prompt with its completion, where the server says so


def wait_for(url: str, deadline: float, timeout_s: float, *, advice: str) -> Served:
    """Return the model of a server once it is up; raises ConfigError, which ends with `advice`, if it is not by `deadline`."""
    while True:
        try:
            card = json.loads(request(url, "/v1/models", None, PROMPT_S))["data"][0]
            return Served(url=url, name=card["id"], max_model_len=card.get("max_model_len"))
        except (LookupError, TypeError, ValueError, http.client.HTTPException) as error:
            raise ConfigError(
                f"what answers at {url} is no vLLM server: its /v1/models names none. {advice}"
            ) from error
        except OSError as error:  # URLError is one
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no vLLM server answers at {url} after vllm_server_timeout={timeout_s:g} s ({error}). {advice}"
                ) from error
            time.sleep(LOOK_S)


def completion_by(server: Served, prompt: Prompt, sampling: Sampling) -> Answer:
    """Return a completion of a prompt. Raises TrainingError."""
    asked = {
        "model": server.name,
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
    (choice,) = post(server.url, "/v1/completions", asked, timeout_s=ANSWER_S)["choices"]
    return Answer(
        ids=choice["token_ids"],
        stopped=choice["finish_reason"] == "stop",
        logps=choice["logprobs"]["token_logprobs"],
        experts=_experts(choice.get("routed_experts")),
    )


def _experts(text: str | None) -> np.ndarray | None:
    """Return the array in a choice (vllm/entrypoints/openai/completion/protocol.py); servers are asked for it when they start."""
    return None if text is None else np.load(io.BytesIO(base64.b64decode(text))).astype(np.int16)


def post(url: str, path: str, asked: dict[str, Any] | None, *, timeout_s: float = 60.0) -> dict[str, Any]:
    """Return the answer of a server; raises TrainingError, which says what it said."""
    text = told(url, path, asked or {}, timeout_s=timeout_s)
    return json.loads(text) if text else {}


def told(url: str, path: str, asked: dict[str, Any] | None, *, timeout_s: float = 60.0) -> bytes:
    """Return the answer of a server as it is, to GET where nothing is asked, or raise as post() does."""
    try:
        return request(url, path, None if asked is None else json.dumps(asked).encode(), timeout_s)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace").strip()[:500]
        raise TrainingError(
            f"the vLLM server at {url} refuses {path}: {error.code} {said}. Its own log says more."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise TrainingError(
            f"the vLLM server at {url} does not answer {path}: {error}. See its log and start it again; the same command then "
            "resumes this run."
        ) from error


def request(url: str, path: str, body: bytes | None, timeout_s: float) -> bytes:
    """GET, or POST where there is a body; never through a proxy, which is for other machines than those of a cluster."""
    asked = urllib.request.Request(url + path, data=body, headers={"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(asked, timeout=timeout_s) as response:
        found: bytes = response.read()
        return found
