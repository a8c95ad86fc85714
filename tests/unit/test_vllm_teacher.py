"""A teacher behind HTTP: what is asked, what is made of the answer, and what is refused before anything is trained."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaswift.errors import ConfigError, TrainingError
from megaswift.rollout.engine import Prompt, Sampling
from megaswift.rollout.vllm_teacher import ServedTeacher
from tests.harness.served_teacher import TeacherServer, served
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import temporary_folder

TOP_K = 7


@cache
def model() -> Path:
    return make_tiny_run(temporary_folder(), rows=1)[0]


@pytest.fixture(scope="module")
def server() -> Iterator[TeacherServer]:
    with served(model(), max_model_len=39) as found:
        yield found


def teacher(server: TeacherServer, **changes: Any) -> ServedTeacher:
    chosen: dict[str, Any] = {
        "top_k": TOP_K,
        "vocab_size": server.model.config.vocab_size,
        "decode": server.tokenizer.decode,
        "room": 39,
        "timeout_s": 5,
    }
    return ServedTeacher(**{"url": server.url, **chosen, **changes})


def document(length: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 250, length).astype(np.int32)


def test_likeliest_tokens_are_those_of_the_model_number_for_number(server: TeacherServer) -> None:
    """JSON texts give every bit of a float back, and the document's own tokens, which come beside the likeliest, are none of them."""
    ids = document()
    found = teacher(server).likeliest(ids)
    with torch.no_grad():
        logps = server.model(torch.tensor(ids[None, :-1].astype(np.int64))).logits[0].log_softmax(-1)
    expected = logps.topk(TOP_K, dim=1)
    assert found.ids.dtype == np.int32 and np.array_equal(found.ids, expected.indices.numpy())
    assert found.logps.dtype == np.float32 and np.array_equal(found.logps, expected.values.numpy())
    assert not set(ids[1:].tolist()) <= set(found.ids.ravel().tolist()), "some are told beside the likeliest"
    asked = server.asked[-1]
    assert (asked["prompt"], asked["max_tokens"], asked["model"]) == (ids[:-1].tolist(), 1, "the teacher")


def test_a_teacher_reads_what_a_document_says_number_for_number(server: TeacherServer) -> None:
    ids = document()
    found = teacher(server, top_k=None, room=38).read(ids)
    with torch.no_grad():
        logps_SV = server.model(torch.tensor(ids[None].astype(np.int64))).logits[0].log_softmax(-1)
    expected = logps_SV[:-1].gather(1, torch.from_numpy(ids[1:, None].astype(np.int64)))[:, 0]
    assert found.dtype == np.float32 and np.array_equal(found, expected.numpy())
    asked = server.asked[-1]
    assert (asked["prompt"], asked["prompt_logprobs"], asked["max_tokens"]) == (ids.tolist(), 0, 1)


def test_no_more_tokens_are_asked_for_than_there_are() -> None:
    with served(model(), max_logprobs=10**6) as found:
        size = found.model.config.vocab_size
        assert teacher(found, top_k=10**6).likeliest(document()).ids.shape == (11, size)


def test_a_teacher_writes(server: TeacherServer) -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=1, max_tokens=5, stop_ids=())
    prompts = [Prompt(ids=document(length), key=(length,)) for length in (4, 6)]
    for prompt, answer in zip(prompts, teacher(server).complete(prompts, sampling), strict=True):
        with torch.no_grad():
            logits = server.model(torch.tensor([[*prompt.ids.tolist(), *answer.ids]])).logits
        assert answer.ids == logits[0, len(prompt.ids) - 1 : -1].argmax(1).tolist() and not answer.stopped


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 21}, r"does not tell its 21 likeliest tokens.*400.*max allowed: 20.*--max-logprobs 21"),
        ({"room": 40}, "max_length=40 is more than the teacher at .* has room for: 39"),
        ({"top_k": None, "room": 39}, "max_length=39 is more than .* has room for: 39.*--max-model-len 40"),
        ({"vocab_size": 30}, "and the trained model has vocab_size=30: they do not read the same tokens"),
        (
            {"decode": lambda ids: "".join(f"<{token}>" for token in ids)},
            "reads tokens .* Serve a model with",
        ),
        (
            {"url": "http://127.0.0.1:9", "timeout_s": 0},
            "no vLLM server answers at .*:9 after vllm_server_timeout=0.*correct --teacher_model_server",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    server: TeacherServer, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        teacher(server, **changes).likeliest(document(30))


def cut(places: list[Any]) -> list[Any]:
    return places[:-1]


def few(places: list[Any]) -> list[Any]:
    return [None, *({"5": {"logprob": -1.0}} for _ in places[1:])]


def not_a_number(places: list[Any]) -> list[Any]:
    return [None, *({str(token): {"logprob": float("nan")} for token in range(9)} for _ in places[1:])]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "says something of 10 places in a document of 12 tokens"),
        (few, "tells 1 tokens of a place, not gkd_logits_topk=7"),
        (not_a_number, "answers log-probabilities that are no numbers"),
    ],
)
def test_answers_that_are_none_end_the_run(
    server: TeacherServer, spoil: Callable[[list[Any]], list[Any]], message: str, monkeypatch: Any
) -> None:
    asked = teacher(server)
    real = server.prompt_logprobs
    monkeypatch.setattr(server, "prompt_logprobs", lambda ids, count: spoil(real(ids, count)))
    with pytest.raises(TrainingError, match=message):
        asked.likeliest(document())
