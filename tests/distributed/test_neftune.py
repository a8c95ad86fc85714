"""Noise on embeddings: loss and gradient are those of the formula on transformers' model, under every layout."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from transformers import AutoModelForCausalLM

from megaswift.config.parse import parse
from megaswift.config.rules import check_request
from megaswift.errors import ConfigError
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, prepared, synthetic_set, temporary_folder

TOLERANCE = 1e-5  # float32 sums in another order
ROWS, ALPHA, SEED = 8, 50.0, 42
CONSUMED = ROWS  # of the second step: its noise is other than the first one's
# layout -> (ranks, parallel settings, data settings)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "padded rows": (1, {}, {"padding_free": False}),
    "dp2": (2, {}, {}),
    "tp2": (2, {"tp": 2}, {}),
    "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}, {}),
    "cp2": (2, {"cp": 2}, {}),
    "cp2 padded rows": (2, {"cp": 2}, {"padding_free": False}),
    "pp2": (2, {"pp": 2}, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}, {}),
}


@cache
def folder() -> Path:
    return save_tiny("llama", temporary_folder())


def second_steps(
    rank: int, world_size: int, model: Path, cases: list[Case]
) -> dict[str, tuple[float, float, float]]:
    """Return loss and gradient norm of a step on all rows, and the loss of a validation on the same."""
    found = {}
    for case in cases:
        with prepared(model, case, encoded=synthetic_set(entries=ROWS)) as trained:
            batches = trained.feed.batch(CONSUMED)
            validated = trained.engine.evaluate([batches])
            result = trained.engine.train_step(batches)
            assert result.grad_norm is not None
            found[case.name] = (result.loss, result.grad_norm, validated.loss)
    return found


@cache
def seen(ranks: int) -> list[dict[str, tuple[float, float, float]]]:
    training = {"global_batch_size": ROWS, "micro_batch_size": 2, "train_iters": 1, "seed": SEED}
    training["neftune_noise_alpha"] = ALPHA
    cases = [
        Case(name=name, settings={"parallel": parallel, "training": training, "data": data})
        for name, (world, parallel, data) in LAYOUTS.items()
        if world == ranks
    ]
    return run_distributed(second_steps, ranks, folder(), cases)


def splitmix64(state: int, draws: int) -> list[int]:
    """Return the next numbers of the generator of Steele et al. 2014, in Python's own integers."""
    found = []
    for _ in range(draws):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        mixed = state
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(mixed ^ (mixed >> 31))
    return found


def noise(ids: list[int], width: int) -> torch.Tensor:
    """Return the noise on a document, float64 [tokens, width]."""
    key = xxhash.xxh3_64_intdigest(np.array([SEED, CONSUMED, *ids], "<i8").tobytes())
    key = int.from_bytes(key.to_bytes(8, "big"), "little")  # digests are big-endian
    drawn = [splitmix64(token, width) for token in splitmix64(key, len(ids))]
    signed = torch.tensor([[one - 2**64 * (one >= 2**63) for one in row] for row in drawn])
    return (signed >> 40).double() / 2**23 * ALPHA / (len(ids) * width) ** 0.5


@cache
def expected(*, noisy: bool) -> tuple[float, float]:
    """Return the mean loss of the tokens that carry loss, and its gradient norm, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float64)
    encoded, parts = synthetic_set(entries=ROWS), []
    for start, end in pairwise(encoded.starts.tolist()):
        ids = torch.tensor(encoded.input_ids[start:end].tolist())
        carries = torch.tensor(encoded.loss_weights[start + 1 : end].tolist()) != 0
        embedded = model.get_input_embeddings()(ids)
        if noisy:
            embedded = embedded + noise(ids.tolist(), embedded.shape[-1])
        log_p = model(inputs_embeds=embedded[None]).logits[0, :-1].log_softmax(-1)
        parts.append(-log_p.gather(1, ids[1:, None])[carries, 0])
    loss = torch.cat(parts).mean()
    loss.backward()
    norms = [weight.grad.norm() for weight in model.parameters() if weight.grad is not None]
    return float(loss.detach()), float(torch.stack(norms).norm())


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_with_the_noise_and_validates_without(layout: str) -> None:
    for rank in seen(LAYOUTS[layout][0]):
        loss, norm, validated = rank[layout]
        assert (loss, norm) == pytest.approx(expected(noisy=True), rel=TOLERANCE)
        assert validated == pytest.approx(expected(noisy=False)[0], rel=TOLERANCE)


def test_noise_changes_the_loss() -> None:
    """Else the test above could not fail."""
    assert expected(noisy=True)[0] != pytest.approx(expected(noisy=False)[0], rel=100 * TOLERANCE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sft --neftune_noise_alpha -1", r"neftune_noise_alpha=-1\.0 is too small"),
        ("rlhf --rlhf_type grpo --reward_funcs format --neftune_noise_alpha 5", "not for completions"),
        ("rlhf --rlhf_type gkd --teacher_model t --neftune_noise_alpha 5", "not for completions"),
    ],
)
def test_noise_has_limits(words: str, message: str) -> None:
    command, *rest = f"{words} --model m --dataset d".split()
    with pytest.raises(ConfigError, match=message):
        check_request(parse(command, rest).config)


def test_noise_is_uniform() -> None:
    drawn = noise(list(range(3, 67)), 64) * (64 * 64) ** 0.5 / ALPHA
    assert drawn.min() >= -1 and drawn.max() < 1
    assert float(drawn.mean()) == pytest.approx(0, abs=0.04)  # four standard errors of 4096 numbers
    assert float(drawn.square().mean()) == pytest.approx(1 / 3, abs=0.02)
