"""The kin of GRPO's loss against the formulas of their papers, in plain float64 arithmetic: values, and gradients by differences.

Where a paper stops a gradient, what it stops is computed once, from where the model is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from megaswift.config.policy import PolicyConfig
from megaswift.config.preference import PreferenceConfig
from megaswift.config.rollout import RolloutConfig
from megaswift.config.vllm import SamplerConfig
from megaswift.tasks.grpo import METRICS, Completions, grpo_loss
from megaswift.tasks.labels import Peers, label_losses, peers_of
from megaswift.tasks.policy_terms import discounted_sums
from tests.unit.test_grpo_losses import (
    ADVANTAGES,
    BETA,
    HIGH,
    LOGPS,
    LOW,
    OLD,
    REF,
    TOLERANCE,
    Tokens,
    clipped,
    completions,
    flat,
    k3,
    per_completion,
    per_token,
    slopes_of,
    total,
)

RATIOS = [[math.exp(a - b) for a, b in zip(*rows, strict=True)] for rows in zip(LOGPS, OLD, strict=True)]
MOST = 1.3  # of the ratios some of better completions are above
TAU_POS, TAU_NEG = 1.5, 2.5
RATE = 2.0
Term = Callable[[float, float, int, int], float]  # log pi, advantage, completion, token -> loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cispo(logp: float, advantage: float, row: int, token: int) -> float:
    """MiniMax-M1: the held ratio is a number, and the gradient that of log pi."""
    return -min(RATIOS[row][token], MOST) * advantage * logp


def sapo(logp: float, advantage: float, row: int, token: int) -> float:
    tau = TAU_POS if advantage > 0 else TAU_NEG
    return -4 / tau * sigmoid(tau * (math.exp(logp - OLD[row][token]) - 1)) * advantage


def gspo_token(logp: float, advantage: float, row: int, token: int) -> float:
    """GSPO-token: the ratio of the completion as a number, with the gradient of the token."""
    whole = math.prod(RATIOS[row]) ** (1 / len(RATIOS[row]))
    return -clipped(whole * math.exp(logp - LOGPS[row][token]), advantage)


def fipo(least: float, most: float, *, delta: float = math.inf, safety: float = math.inf) -> Term:
    """FIPO: GRPO's clipped loss, weighted by what becomes of the tokens behind, every second of which counts half."""

    def loss(logp: float, advantage: float, row: int, token: int) -> float:
        ahead = [
            2 ** (-(k - token) / RATE) * math.log(ratio)
            for k, ratio in enumerate(RATIOS[row])
            if k >= token and ratio <= delta
        ]
        weight = min(max(math.exp(sum(ahead)), least), most)
        if advantage < 0 and RATIOS[row][token] > safety:
            weight = min(max(weight, 0.8), 1.0)
        return clipped(math.exp(logp - OLD[row][token]), advantage, delta) * -weight

    return loss


# name -> (loss_type, settings of the rollout, of the form, loss of a token, how they become one)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Term, Callable[[list[list[float]]], float]]] = {
    "cispo": ("cispo", {"epsilon_high": MOST}, {}, cispo, per_token),
    "sapo": ("sapo", {}, {"tau_pos": TAU_POS, "tau_neg": TAU_NEG}, sapo, per_completion),
    "gspo-token": ("grpo", {"importance_sampling_level": "sequence_token"}, {}, gspo_token, per_completion),
    "fipo": ("fipo", {}, {"fipo_clip_range": 0.2}, fipo(1.0, 1.2, safety=4.0), per_token),
    "fipo both ways": (
        "fipo",
        {"delta": 1.6},
        {"fipo_clip_range": 0.4, "fipo_clip_high_only": False, "fipo_safety_threshold": 1.5},
        fipo(0.6, 1.4, delta=1.6, safety=1.5),
        per_token,
    ),
    "fipo unheld": (
        "fipo",
        {},
        {"fipo_clip_range": None, "fipo_safety_threshold": None},
        fipo(0.0, math.inf),
        per_token,
    ),
}


def settings_of(
    loss_type: str, rollout: dict[str, Any], policy: dict[str, Any], *, beta: float = BETA
) -> tuple[PreferenceConfig, RolloutConfig, SamplerConfig, PolicyConfig]:
    return (
        PreferenceConfig(rlhf_type="grpo", loss_type=loss_type, beta=beta),
        RolloutConfig(**{"epsilon": LOW, "epsilon_high": HIGH, **rollout}),
        SamplerConfig(),
        PolicyConfig(**{"fipo_decay_rate": RATE, **policy}),
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("beta", [BETA, 0.0], ids=["reference", "alone"])
def test_loss_and_gradient_are_those_of_the_paper(name: str, beta: float) -> None:
    loss_type, rollout, policy, term, reduce = CASES[name]

    def paper(logps: Tokens) -> float:
        return reduce(
            [
                [
                    term(mine, advantage, row, token) + beta * k3(mine, REF[row][token])
                    for token, mine in enumerate(line)
                ]
                for row, (line, advantage) in enumerate(zip(logps, ADVANTAGES, strict=True))
            ]
        )

    given = completions(reference=beta > 0)
    outcome = grpo_loss(given, *settings_of(loss_type, rollout, policy, beta=beta))
    loss = total(outcome, loss_type, given)
    assert float(loss) == pytest.approx(paper(LOGPS), abs=TOLERANCE)
    loss.backward()
    assert given.logps_T.grad is not None
    assert given.logps_T.grad.tolist() == pytest.approx(slopes_of(paper), abs=TOLERANCE)
    assert set(outcome.metrics) <= set(METRICS)
    assert not any(values.requires_grad for values in outcome.metrics.values())


def test_the_cases_reach_what_they_are_about() -> None:
    """Weights are held from below and above, tokens left out of the sum, and one of a worse completion is held to 1."""
    given = completions(reference=False)
    held = grpo_loss(given, *settings_of("cispo", {"epsilon_high": MOST}, {}, beta=0)).metrics
    assert set(held) == {"cispo_clip_ratio"}
    assert held["cispo_clip_ratio"].tolist() == [
        float(ratio > MOST and advantage > 0)
        for row, advantage in zip(RATIOS, ADVANTAGES, strict=True)
        for ratio in row
    ]
    assert 0 < float(held["cispo_clip_ratio"].sum()) < 10
    _, rollout, policy, _, _ = CASES["fipo both ways"]
    weighed = grpo_loss(given, *settings_of("fipo", rollout, policy, beta=0)).metrics
    weights = weighed["fipo/influence_weight_mean"]
    assert float(weights.min()) == 0.6, "held from below"
    assert weighed["fipo/safety_keep_ratio"].tolist() == [1.0] * 3 + [0.0] + [1.0] * 6
    assert any(ratio > 1.6 for row in RATIOS for ratio in row)
    high_only = grpo_loss(given, *settings_of("fipo", {}, {"fipo_clip_range": 0.1}, beta=0)).metrics
    assert {1.0, 1.1} <= set(high_only["fipo/influence_weight_mean"].tolist())


def test_clipping_still_counts_for_weighted_tokens_and_not_for_gates() -> None:
    given = completions(reference=False)
    names = {
        form: {
            name.partition("/")[0] for name in grpo_loss(given, *settings_of(form, {}, {}, beta=0)).metrics
        }
        for form in ("fipo", "sapo", "grpo")
    }
    assert names == {"fipo": {"clip_ratio", "fipo"}, "sapo": set(), "grpo": {"clip_ratio"}}


@pytest.mark.parametrize("discount", [0.5, 0.98])
def test_discounted_sums_stay_within_their_completion(discount: float) -> None:
    """Lengths beside and at powers of two, one and none."""
    lengths = [5, 0, 1, 8, 64, 33, 7]
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = discounted_sums(values, torch.tensor(lengths), discount).tolist()
    starts = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    for start, end in pairwise(starts):
        expected = 0.0
        for place in reversed(range(start, end)):
            expected = float(values[place]) + discount * expected
            assert found[place] == pytest.approx(expected, abs=1e-12)
    nothing = discounted_sums(values[:0], torch.zeros(0, dtype=torch.int64), discount)
    assert nothing.shape == (0,)


# REAL: two groups of four, the second without better completions and with one that carries no loss; scores and advantages.
SCORES = ((0.3, -0.2, 0.7, -0.9), (0.1, 0.4, -0.3, 0.2), (0.2, -0.6, 0.5, 0.0))
WORTH = ((0.5, -0.5, 0.5, -0.5), (0.0, 0.0, 0.0, 0.0), (0.75, -0.25, -0.25, -0.25))
CARRIES = ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 0, 1))
TAU = 0.5


def real(scores: Sequence[Sequence[float]]) -> float:
    """The paper's loss of a group, a mean over groups; without both kinds it is 0."""
    losses = []
    for row, worth, carries in zip(scores, WORTH, CARRIES, strict=True):
        kept = [(s, a) for s, a, is_kept in zip(row, worth, carries, strict=True) if is_kept]
        better, others = [s for s, a in kept if a > 0], [s for s, a in kept if a <= 0]
        loss = math.log(1 + sum(math.exp(-s / TAU) for s in better)) + math.log(
            1 + sum(math.exp(s / TAU) for s in others)
        )
        losses.append(loss if better and others else 0.0)
    return sum(losses) / len(losses)


def peers() -> Peers:
    scores, worth, carries = (
        torch.tensor(values, dtype=torch.float64) for values in (SCORES, WORTH, CARRIES)
    )
    return peers_of(scores, worth, carries, temperature=TAU)


def part(some: slice) -> Peers:
    return Peers(**{name: values.flatten()[some] for name, values in vars(peers()).items()})


@pytest.mark.parametrize("cut", [12, 5, 1], ids=["whole", "amid a group", "one"])
def test_labels_have_the_loss_and_gradient_of_the_paper_in_any_micro_batches(cut: int) -> None:
    scores = torch.tensor(SCORES, dtype=torch.float64).flatten().requires_grad_()
    parts = [
        label_losses(scores[some], part(some), temperature=TAU, group=4)
        for some in (slice(first, first + cut) for first in range(0, 12, cut))
    ]
    loss = torch.cat(parts).mean()
    assert float(loss) == pytest.approx(real(SCORES), abs=TOLERANCE)
    loss.backward()
    step = 1e-5
    for place in range(12):
        moved = [
            real(
                [
                    [s + by * (4 * row + k == place) for k, s in enumerate(line)]
                    for row, line in enumerate(SCORES)
                ]
            )
            for by in (step, -step)
        ]
        assert float(scores.grad[place]) == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=TOLERANCE)
    assert scores.grad.tolist()[4:8] == [0.0] * 4 and float(scores.grad[10]) == 0
    assert float(scores.grad.abs().max()) > 0.1


def test_the_score_of_a_completion_is_its_mean_and_the_reference_counts_per_completion() -> None:
    """In the whole loss: a group of three completions, of which ADVANTAGES make two better ones."""

    def paper(logps: Tokens) -> float:
        means = [
            sum(a - b for a, b in zip(*rows, strict=True)) / len(rows[0])
            for rows in zip(logps, OLD, strict=True)
        ]
        better = sum(math.exp(-means[row] / TAU) for row in (0, 2))
        losses = [
            [BETA * k3(a, r) for a, r in zip(*rows, strict=True)] for rows in zip(logps, REF, strict=True)
        ]
        return math.log(1 + better) + math.log(1 + math.exp(means[1] / TAU)) + per_completion(losses)

    lengths = torch.tensor([len(row) for row in LOGPS])
    scores = torch.stack([piece.mean() for piece in (flat(LOGPS) - flat(OLD)).split(lengths.tolist())])
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    found = peers_of(scores[None], advantages[None], torch.ones(1, 3, dtype=torch.float64), temperature=TAU)
    others = Peers(**{name: values.flatten() for name, values in vars(found).items()})
    given: Completions = replace(completions(), peers=others)
    outcome = grpo_loss(given, *settings_of("real", {"num_generations": 3}, {"real_tau": TAU}))
    loss = total(outcome, "real", given)
    assert float(loss) == pytest.approx(paper(LOGPS), abs=TOLERANCE)
    loss.backward()
    assert given.logps_T.grad is not None
    assert given.logps_T.grad.tolist() == pytest.approx(slopes_of(paper), abs=TOLERANCE)
    assert set(outcome.metrics) == {"kl"}
