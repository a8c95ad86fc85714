"""Routers that are told their experts: the same choice gives the same numbers, another's choice is weighed by the current logits."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from megaswift.metadata.meta import MoEMeta
from megaswift.models.replay import Replay
from megaswift.models.router import choose_experts, megatron_routes

TOKENS, EXPERTS, TOPK = 64, 12, 3
BIAS = torch.linspace(-0.3, 0.3, EXPERTS)
# router -> what differs from softmax over the chosen: with "megatron" Megatron's makes the choice
ROUTERS: dict[str, dict[str, Any]] = {
    "megatron": {},
    "megatron, all experts": {"norm_topk_prob": False},
    "megatron, sigmoid with a bias, groups": {
        "score_function": "sigmoid", "router_bias": True, "num_groups": 4, "topk_groups": 3, "group_score": "max",
    },
    "softmax with a bias": {"router_bias": True},
    "sigmoid, not normalised": {"score_function": "sigmoid", "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "softmax, groups": {"num_groups": 4, "topk_groups": 2},
}  # fmt: skip


def router(name: str, replay: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return what makes weights and choice [T, E] of logits [T, E]."""
    moe = meta(name)
    bias_E = BIAS if moe.router_bias else None
    if not name.startswith("megatron"):
        return lambda logits_TE: choose_experts(logits_TE, moe, bias_E=bias_E, replay=replay)
    assert megatron_routes(moe)
    return lambda logits_TE: topk_routing_with_score_function(
        logits_TE,
        TOPK,
        use_pre_softmax=not moe.norm_topk_prob,
        num_groups=moe.num_groups,
        group_topk=moe.topk_groups,
        score_function=moe.score_function,
        expert_bias=bias_E,
        router_replay=replay,
    )


def meta(name: str) -> MoEMeta:
    return MoEMeta(num_experts=EXPERTS, topk=TOPK, ffn_hidden_size=8, layer_is_moe=(True,), **ROUTERS[name])


def replay_of_layers(*layers: int) -> tuple[Replay, list[Any]]:
    routers: Any = {layer: SimpleNamespace() for layer in layers}
    replay = Replay(routers)
    return replay, [one.router_replay for one in routers.values()]


def logits(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def recorded(name: str, logits_TE: torch.Tensor) -> tuple[Replay, Any, torch.Tensor]:
    """Return a replay of the second of two layers, what that layer asks, and what it chose for these logits [T, 1, K]."""
    replay, (_, second) = replay_of_layers(4, 5)
    with replay.recording() as seen:
        router(name, second)(logits_TE)
    assert seen[4] == [] and len(seen[5]) == 1
    return replay, second, seen[5][0][:, None].expand(-1, 6, -1)


@pytest.mark.parametrize("name", ROUTERS)
def test_replaying_the_own_choice_is_exact(name: str) -> None:
    first = logits(0)
    expected = router(name, None)(first)
    grad_TE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))
    expected[0].backward(grad_TE)
    replay, asked, given_TLK = recorded(name, logits(0))
    assert given_TLK.dtype == torch.int16
    again = logits(0)
    replay.given_TLK = given_TLK
    found = router(name, asked)(again)
    found[0].backward(grad_TE)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert again.grad is not None and first.grad is not None and torch.equal(again.grad, first.grad)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_chosen_are_weighed_by_the_current_logits(name: str) -> None:
    """Weights are s_i / sum_j s_j of the given experts, or s_i, in float64; s are softmax or sigmoid of all current logits."""
    replay, asked, given_TLK = recorded(name, logits(0))
    replay.given_TLK = given_TLK
    current, reference = logits(2), logits(2).detach().double().requires_grad_()
    found_TE, chosen_TE = router(name, asked)(current)
    moe = meta(name)
    scores_TE = reference.sigmoid() if moe.score_function == "sigmoid" else reference.softmax(-1)
    given_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, given_TLK[:, 5].long(), True)
    weights_TE = scores_TE * given_TE
    if moe.norm_topk_prob:
        weights_TE = weights_TE / weights_TE.sum(-1, keepdim=True)
    weights_TE = weights_TE * moe.routed_scaling_factor
    assert torch.equal(chosen_TE, given_TE)
    assert not torch.equal(router(name, None)(current)[1], given_TE), "the current choice is another"
    torch.testing.assert_close(found_TE.double(), weights_TE, rtol=1e-5, atol=1e-6)  # float32
    grad_TE = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))
    found_TE.backward(grad_TE)
    weights_TE.backward(grad_TE.double())
    assert current.grad is not None and reference.grad is not None
    torch.testing.assert_close(current.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)


def test_a_backward_pass_finds_the_experts_of_its_own_micro_batch() -> None:
    """Two micro batches are under way; each output's backward pass begins with what its forward pass replayed."""
    replay, _ = replay_of_layers(0)
    outputs, given = [], []
    for number in range(2):
        experts_BSLK = torch.full((1, 4, 1, 2), number, dtype=torch.uint8)
        replay.begin(experts_BSLK, torch.device("cpu"), sequence_parallel=False)
        outputs.append(torch.ones(3, requires_grad=True) * 2)
        replay.remember(outputs[-1])
        given.append(replay.given_TLK)
    replay.begin(None, torch.device("cpu"), sequence_parallel=False)
    assert replay.given_TLK is None
    for output, expected in zip(outputs, given, strict=True):
        output.sum().backward()
        assert replay.given_TLK is expected
