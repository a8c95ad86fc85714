"""Experts that take no more tokens than a share: what Megatron's router and ours drop, and that nothing else changes."""

from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from megaswift.config.parse import parse
from megaswift.config.rules import check_request
from megaswift.errors import ConfigError
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, prepared, synthetic_set, temporary_folder

ROWS, FACTOR = 4, 0.75
MODELS = ("qwen3_moe", "ernie4_5_moe")  # Megatron's router, and one of models/router.py
MOE: dict[str, dict[str, Any]] = {
    "none": {},
    "ample": {"moe_expert_capacity_factor": 100.0},
    "probs": {"moe_expert_capacity_factor": FACTOR},
    "position": {"moe_expert_capacity_factor": FACTOR, "moe_token_drop_policy": "position"},
    "padded": {"moe_expert_capacity_factor": FACTOR, "moe_pad_expert_input_to_capacity": True},
}


def routed(rank: int, world_size: int, model: Path) -> dict[str, tuple[float, list[Any]]]:
    """Return the loss of one step, and (weights [T, E], choice [T, E], experts a token) of the first layer's router."""
    found: dict[str, tuple[float, list[Any]]] = {}
    for name, moe in MOE.items():
        rows = {"global_batch_size": ROWS, "micro_batch_size": ROWS, "train_iters": 1}
        case = Case(name=name, settings={"moe": moe, "training": rows})
        with prepared(model, case, encoded=synthetic_set(entries=ROWS)) as trained:
            seen: list[Any] = []
            (router, *_) = (m for m in trained.engine.chunks[0].modules() if isinstance(m, TopKRouter))
            router.register_forward_hook(
                lambda module, inputs, output, seen=seen: seen.append([x.detach() for x in output])
            )
            result = trained.engine.train_step(trained.feed.batch(0))
            found[name] = (result.loss, [*seen[0], router.topk])
    return found


@cache
def seen(model: str) -> dict[str, tuple[float, list[Any]]]:
    (found,) = run_distributed(routed, 1, save_tiny(model, temporary_folder()))
    return found


@pytest.mark.parametrize("model", MODELS)
def test_ample_room_changes_nothing(model: str) -> None:
    assert seen(model)["ample"][0] == seen(model)["none"][0]


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("model", MODELS)
def test_a_full_expert_drops_the_others(model: str, policy: str) -> None:
    _, (weights_TE, chosen_TE, topk) = seen(model)["none"]
    loss, (kept_weights_TE, kept_TE, _) = seen(model)[policy]
    tokens, experts = chosen_TE.shape
    room = ceil(tokens * topk / experts * FACTOR)
    assert chosen_TE.sum(0).max() > room, "nothing to drop"
    assert loss != seen(model)["none"][0]
    for expert in range(experts):
        asked = chosen_TE[:, expert].nonzero().flatten()
        first = asked if policy == "position" else asked[weights_TE[asked, expert].argsort(descending=True)]
        if policy == "probs":
            assert sorted(first[:room].tolist()) == kept_TE[:, expert].nonzero().flatten().tolist()
        assert kept_TE[:, expert].sum() == min(len(asked), room)
    assert not (kept_TE & ~chosen_TE).any()
    torch.testing.assert_close(kept_weights_TE, weights_TE * kept_TE, rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_padding_fills_every_expert(model: str) -> None:
    _, (_, kept_TE, topk) = seen(model)["padded"]
    tokens, experts = kept_TE.shape
    assert kept_TE.sum(0).tolist() == [ceil(tokens * topk / experts * FACTOR)] * experts
    assert seen(model)["padded"][0] == pytest.approx(
        seen(model)["probs"][0], rel=1e-6
    )  # padding weighs nothing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--moe_expert_capacity_factor 0", "is too small"),
        ("--moe_pad_expert_input_to_capacity true", "needs moe_expert_capacity_factor"),
        ("--moe_token_drop_policy position", "needs moe_expert_capacity_factor"),
        ("--moe_expert_capacity_factor 2 --moe_router_load_balancing_type sinkhorn", "does not go with"),
    ],
)
def test_capacities_have_limits(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_request(parse("sft", f"--model m --dataset d {words}".split()).config)
