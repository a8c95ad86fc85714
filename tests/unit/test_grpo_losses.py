"""GRPO's losses and advantages against the formulas of their papers, in plain float64 arithmetic: values, and gradients by differences."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megaswift.config.policy import PolicyConfig
from megaswift.config.preference import PreferenceConfig
from megaswift.config.rollout import RolloutConfig
from megaswift.config.vllm import CORRECTIONS, SamplerConfig
from megaswift.tasks.advantages import advantages, decoupled_advantages
from megaswift.tasks.answers import Outcome
from megaswift.tasks.grpo import BY_TOKENS, METRICS, Completions, grpo_loss

# Losses and gradients are of order 1. Central differences of step 1e-5 are wrong by 1e-10 times a third derivative.
TOLERANCE, STEP = 1e-6, 1e-5
LONGEST = 7

Tokens = Sequence[Sequence[float]]
# Three completions: log pi, log pi_old and log pi_ref of each token. Ratios lie below, within and above the clipped range.
LOGPS: Tokens = ((-1.2, -0.7, -2.0), (-0.3, -1.9), (-2.2, -0.4, -1.1, -0.6, -3.0))
OLD: Tokens = ((-1.6, -0.72, -1.5), (-0.9, -1.88), (-1.9, -0.1, -1.12, -1.3, -2.95))
REF: Tokens = ((-1.1, -0.9, -2.3), (-0.5, -1.5), (-2.0, -0.7, -1.3, -0.2, -2.5))
DRAWN: Tokens = (
    (-1.5, -1.9, -1.6),
    (-1.4, -2.4),
    (-1.7, -0.2, -1.0, -1.9, -2.9),
)  # log q of another engine that drew them
ADVANTAGES = (1.3, -0.8, 0.4)
ENTROPIES: Tokens = ((0.3, 2.1, 1.7), (0.9, 0.1), (1.1, 2.5, 0.2, 0.6, 1.9))
LOW, HIGH, BETA = 0.2, 0.28, 0.3
DELTA = 1.5  # the second completion, which is worse than others, has a ratio of 1.8


def clipped(ratio: float, advantage: float, delta: float = math.inf) -> float:
    """The objective that PPO clips, which GRPO's eq. 3 takes over, with INTELLECT-2's second bound."""
    return min(min(ratio, delta) * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)


def k3(logp: float, ref: float) -> float:
    return math.exp(ref - logp) - (ref - logp) - 1


def token_losses(
    logps: Tokens, old: Tokens, *, beta: float, sequence: bool, delta: float = math.inf
) -> list[list[float]]:
    losses = []
    for row, (mine, before, ref, advantage) in enumerate(zip(logps, old, REF, ADVANTAGES, strict=True)):
        ratios = [math.exp(a - b) for a, b in zip(mine, before, strict=True)]
        if sequence:
            whole = math.prod(ratios) ** (1 / len(ratios))
            ratios = [whole] * len(ratios)
        objectives = [clipped(ratio, advantage, delta) for ratio in ratios]
        losses.append([-one + beta * k3(a, r) for one, a, r in zip(objectives, mine, ref, strict=True)])
        assert len(losses[row]) == len(mine)
    return losses


def per_completion(losses: list[list[float]]) -> float:
    return sum(sum(row) / len(row) for row in losses) / len(losses)


def per_token(losses: list[list[float]]) -> float:
    return sum(map(sum, losses)) / sum(map(len, losses))


def by_longest(losses: list[list[float]]) -> float:
    return sum(map(sum, losses)) / (len(losses) * LONGEST)


# name -> (loss_type, settings of the rollout, beta, how the token losses become one)
CASES: dict[str, tuple[str, dict[str, Any], float, Callable[[list[list[float]]], float]]] = {
    "grpo": ("grpo", {}, BETA, per_completion),
    "grpo without a reference": ("grpo", {}, 0.0, per_completion),
    "dapo": ("dapo", {}, 0.0, per_token),
    "bnpo": ("bnpo", {}, BETA, per_token),
    "dr_grpo": ("dr_grpo", {}, 0.0, by_longest),
    "gspo": ("grpo", {"importance_sampling_level": "sequence"}, 0.0, per_completion),
    "two-sided": ("grpo", {"delta": DELTA}, BETA, per_completion),
    "two-sided by tokens": ("dapo", {"delta": DELTA}, 0.0, per_token),
    "gspo by tokens": ("dapo", {"importance_sampling_level": "sequence"}, BETA, per_token),
}


def flat(values: Tokens) -> torch.Tensor:
    return torch.tensor([value for row in values for value in row], dtype=torch.float64)


def completions(*, old: bool = True, reference: bool = True, sampler: bool = False) -> Completions:
    return Completions(
        logps_T=flat(LOGPS).requires_grad_(),
        lengths_N=torch.tensor([len(row) for row in LOGPS]),
        advantages_N=torch.tensor(ADVANTAGES, dtype=torch.float64),
        old_T=flat(OLD) if old else None,
        references_T=flat(REF) if reference else None,
        sampler_T=flat(DRAWN) if sampler else None,
    )


Settings = tuple[PreferenceConfig, RolloutConfig, SamplerConfig, PolicyConfig]


def settings_of(name: str, **sampler: Any) -> Settings:
    loss_type, more, beta, _ = CASES[name]
    rollout = RolloutConfig(epsilon=LOW, epsilon_high=HIGH, max_completion_length=LONGEST, **more)
    settings = PreferenceConfig(rlhf_type="grpo", loss_type=loss_type, beta=beta)
    return settings, rollout, SamplerConfig(**sampler), PolicyConfig()


def total(outcome: Outcome, loss_type: str, given: Completions) -> torch.Tensor:
    """What Megatron's schedule makes of it: the sum by completions, or by tokens."""
    number = int(given.lengths_N.sum()) if loss_type in BY_TOKENS else len(given.lengths_N)
    return outcome.losses_R.sum() / number


def moved(values: Tokens, row: int, token: int, by: float) -> Tokens:
    return [
        [value + by * (i == row and j == token) for j, value in enumerate(line)]
        for i, line in enumerate(values)
    ]


def slopes_of(paper: Callable[[Tokens], float]) -> list[float]:
    """Return the gradient by central differences."""
    return [
        (paper(moved(LOGPS, row, token, STEP)) - paper(moved(LOGPS, row, token, -STEP))) / (2 * STEP)
        for row, line in enumerate(LOGPS)
        for token in range(len(line))
    ]


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_paper(name: str) -> None:
    loss_type, more, beta, reduce = CASES[name]
    sequence = more.get("importance_sampling_level") == "sequence"

    def paper(logps: Tokens) -> float:
        delta = more.get("delta", math.inf)
        return reduce(token_losses(logps, OLD, beta=beta, sequence=sequence, delta=delta))

    given = completions(reference=beta > 0)
    loss = total(grpo_loss(given, *settings_of(name)), loss_type, given)
    assert float(loss) == pytest.approx(paper(LOGPS), abs=TOLERANCE)
    loss.backward()
    slopes = slopes_of(paper)
    assert given.logps_T.grad is not None
    assert given.logps_T.grad.tolist() == pytest.approx(slopes, abs=TOLERANCE)
    assert any(slopes), "a gradient of zero would say little"


def agrees(outcome: Outcome, given: Completions, paper: Callable[[Tokens], float]) -> None:
    """Value and gradient of the mean over completions are those of the paper's formula."""
    loss = total(outcome, "grpo", given)
    assert float(loss) == pytest.approx(paper(LOGPS), abs=TOLERANCE)
    loss.backward()
    assert given.logps_T.grad is not None
    assert given.logps_T.grad.tolist() == pytest.approx(slopes_of(paper), abs=TOLERANCE)


def test_a_second_bound_changes_the_loss_of_worse_completions() -> None:
    """Its bite, which the cases above compare with the paper: the gradient of the token beyond it is that of the reference alone."""
    plain, bounded = completions(reference=False), completions(reference=False)
    for given, more in ((plain, {}), (bounded, {"delta": DELTA})):
        settings, rollout, *others = settings_of("grpo without a reference")
        grpo_loss(
            given, settings, RolloutConfig(**{**vars(rollout), **more}), *others
        ).losses_R.sum().backward()
    assert plain.logps_T.grad is not None and bounded.logps_T.grad is not None
    changed = plain.logps_T.grad != bounded.logps_T.grad
    assert changed.tolist() == [False] * 3 + [True] + [False] * 6
    assert float(bounded.logps_T.grad[3]) == 0


@pytest.mark.parametrize("sampler", [False, True], ids=["older policy", "another engine"])
def test_worse_completions_that_the_model_has_left_have_no_policy_loss(sampler: bool) -> None:
    """The mask of DeepSeek-V3.2: advantage below 0 and the mean of log pi_drawn/pi above the threshold; nothing goes through it."""
    worse, most = (1.3, -0.8, -0.4), 0.3
    raised = [[value + 0.5 for value in row] for row in (DRAWN if sampler else OLD)]
    leads = [
        statistics.mean(a - b for a, b in zip(*rows, strict=True)) for rows in zip(raised, LOGPS, strict=True)
    ]
    masked = [lead > most and advantage < 0 for lead, advantage in zip(leads, worse, strict=True)]
    assert masked == [False, False, True] and max(leads[:2]) > most - 0.5 and (sampler or leads[0] > most)
    settings, rollout, *others = settings_of("grpo", rollout_importance_sampling_mode="none")
    rollout = RolloutConfig(**{**vars(rollout), "off_policy_sequence_mask_delta": most})
    older = OLD if sampler else raised

    def paper(logps: Tokens) -> float:
        losses = []
        for mine, before, ref, advantage, is_masked in zip(logps, older, REF, worse, masked, strict=True):
            policy = [
                -clipped(math.exp(a - b), advantage) * (not is_masked)
                for a, b in zip(mine, before, strict=True)
            ]
            losses.append([one + BETA * k3(a, r) for one, a, r in zip(policy, mine, ref, strict=True)])
        return per_completion(losses)

    given = replace(
        completions(sampler=sampler),
        advantages_N=torch.tensor(worse, dtype=torch.float64),
        old_T=flat(older),
        sampler_T=flat(raised) if sampler else None,
    )
    outcome = grpo_loss(given, settings, rollout, *others)
    agrees(outcome, given, paper)
    assert outcome.metrics["off_policy/masked"].tolist() == masked


def test_tokens_that_the_model_is_sure_of_have_no_policy_loss() -> None:
    least = 1.0
    settings, rollout, *others = settings_of("grpo")
    rollout = RolloutConfig(**{**vars(rollout), "top_entropy_quantile": 0.5, "log_entropy": True})

    def paper(logps: Tokens) -> float:
        whole = token_losses(logps, OLD, beta=BETA, sequence=False)
        policy = token_losses(logps, OLD, beta=0.0, sequence=False)
        return per_completion(
            [
                [one - own * (entropy < least) for one, own, entropy in zip(*rows, strict=True)]
                for rows in zip(whole, policy, ENTROPIES, strict=True)
            ]
        )

    given = replace(completions(), entropies_T=flat(ENTROPIES))
    outcome = grpo_loss(given, settings, rollout, *others, least_entropy=least)
    agrees(outcome, given, paper)
    means = [statistics.mean(row) for row in ENTROPIES]
    assert outcome.metrics["entropy/mean"].tolist() == pytest.approx(means)
    assert float(outcome.metrics["entropy/max"].max()) == pytest.approx(max(means))
    assert set(outcome.metrics["entropy/threshold"].tolist()) == {least}


def weights_of(mode: str, most: float, before: Tokens) -> Tokens:
    """The importance weights of ms-swift's four modes: pi_old / q, of a token or the geometric mean over a completion."""
    level, _, limit = mode.partition("_")
    found = []
    for olds, drawn in zip(before, DRAWN, strict=True):
        row = [math.exp(a) / math.exp(b) for a, b in zip(olds, drawn, strict=True)]
        if level == "sequence":
            row = [math.prod(row) ** (1 / len(row))] * len(row)
        if level == "none":
            row = [1.0] * len(row)
        found.append([min(one, most) if limit == "truncate" else one if one <= most else 0.0 for one in row])
    return found


@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("old", [True, False], ids=["old", "fresh"])
def test_completions_of_another_engine_are_weighted(mode: str, old: bool) -> None:
    """The weights are numbers: no gradient goes through them. The divergence from the reference is not weighted."""
    most = 1.4
    before = OLD if old else LOGPS
    weights = weights_of(mode, most, before)

    def paper(logps: Tokens) -> float:
        objectives = token_losses(logps, before, beta=0.0, sequence=False)
        apart = token_losses(logps, before, beta=BETA, sequence=False)
        return per_completion(
            [
                [weight * one + (both - one) for weight, one, both in zip(*rows, strict=True)]
                for rows in zip(weights, objectives, apart, strict=True)
            ]
        )

    given = completions(old=old, sampler=True)
    chosen = {"rollout_importance_sampling_mode": mode, "rollout_importance_sampling_threshold": most}
    outcome = grpo_loss(given, *settings_of("grpo", **chosen))
    loss = total(outcome, "grpo", given)
    assert float(loss) == pytest.approx(paper(LOGPS), abs=TOLERANCE)
    loss.backward()
    slopes = slopes_of(paper)
    assert given.logps_T.grad is not None
    assert given.logps_T.grad.tolist() == pytest.approx(slopes, abs=TOLERANCE)
    flattened = [one for row in weights for one in row]
    touched = {"none": 0, "token": 2, "sequence": 1}[mode.partition("_")[0]]
    if old:
        assert sum(one in (most, 0.0) for one in flattened) >= touched, "the threshold must bite"
    assert set(outcome.metrics) == {
        name for name in METRICS if not name.startswith(("off_policy/", "entropy/", "cispo", "fipo/", "teacher_"))
    }
    ratios = [math.exp(a - b) for a, b in zip(sum(before, ()), sum(DRAWN, ()), strict=True)]
    assert float(outcome.metrics["sampling/importance_sampling_ratio/max"].max()) == pytest.approx(
        max(ratios)
    )
    assert float(outcome.metrics["sampling/kl"].mean()) == pytest.approx(
        statistics.mean(one - math.log(one) - 1 for one in ratios)
    )


def test_some_ratios_are_clipped_on_either_side_and_counted() -> None:
    outcome = grpo_loss(completions(), *settings_of("grpo"))
    assert set(outcome.metrics) == {"kl", "clip_ratio/low_mean", "clip_ratio/high_mean"} < set(METRICS)
    ratios = [[math.exp(a - b) for a, b in zip(*rows, strict=True)] for rows in zip(LOGPS, OLD, strict=True)]
    pairs = [(ratio, advantage) for row, advantage in zip(ratios, ADVANTAGES, strict=True) for ratio in row]
    low = [float(ratio < 1 - LOW and advantage < 0) for ratio, advantage in pairs]
    high = [float(ratio > 1 + HIGH and advantage > 0) for ratio, advantage in pairs]
    assert outcome.metrics["clip_ratio/low_mean"].tolist() == low
    assert outcome.metrics["clip_ratio/high_mean"].tolist() == high
    assert any(high)
    assert float(outcome.metrics["kl"].mean()) == pytest.approx(
        statistics.mean(k3(a, r) for rows in zip(LOGPS, REF, strict=True) for a, r in zip(*rows, strict=True))
    )
    assert not any(values.requires_grad for values in outcome.metrics.values())


def test_fresh_completions_have_the_gradient_of_the_plain_policy_gradient() -> None:
    """Where pi is still pi_old, the ratio is 1 and its gradient that of log pi."""
    given = completions(old=False, reference=False)
    loss = total(grpo_loss(given, *settings_of("dapo")), "dapo", given)
    loss.backward()
    tokens = sum(map(len, LOGPS))
    slopes = [-advantage / tokens for row, advantage in zip(LOGPS, ADVANTAGES, strict=True) for _ in row]
    assert given.logps_T.grad is not None
    assert given.logps_T.grad.tolist() == pytest.approx(slopes, abs=TOLERANCE)


def test_a_divergence_in_the_reward_is_not_in_the_loss() -> None:
    settings, rollout, *others = settings_of("grpo")
    in_reward = RolloutConfig(**{**vars(rollout), "kl_in_reward": True})
    plain = grpo_loss(completions(reference=False), settings, rollout, *others)
    outcome = grpo_loss(completions(), settings, in_reward, *others)
    assert torch.equal(outcome.losses_R, plain.losses_R)
    assert "kl" in outcome.metrics


REWARDS = ((1.0, 0.0, 0.5, 0.25), (2.0, 2.0, 2.0, 2.0))


def differences() -> list[float]:
    """What REINFORCE++ with a baseline scales: rewards less the mean of their group."""
    return [reward - statistics.mean(group) for group in REWARDS for reward in group]


@pytest.mark.parametrize(
    ("chosen", "paper"),
    [
        (
            {"scale_rewards": "group"},
            lambda r, group: (r - statistics.mean(group)) / (statistics.stdev(group) + 1e-4),
        ),
        ({"scale_rewards": "none"}, lambda r, group: r - statistics.mean(group)),
        (
            {"scale_rewards": "batch"},
            lambda r, group: (r - statistics.mean(group)) / (statistics.stdev(sum(REWARDS, ())) + 1e-4),
        ),
        (
            {"scale_rewards": "none", "advantage_estimator": "rloo"},
            lambda r, group: r - (sum(group) - r) / (len(group) - 1),
        ),
        (
            {"scale_rewards": "batch", "advantage_estimator": "reinforce_plus_plus"},
            lambda r, group: (r - statistics.mean(group)) / (statistics.stdev(differences()) + 1e-4),
        ),
    ],
    ids=["grpo", "dr_grpo", "batch", "rloo", "reinforce_plus_plus"],
)
def test_advantages_are_those_of_the_paper(chosen: dict[str, str], paper: Callable[..., float]) -> None:
    found = advantages(torch.tensor(REWARDS, dtype=torch.float64), RolloutConfig(**chosen))
    expected = [[paper(reward, group) for reward in group] for group in REWARDS]
    assert found.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]


def test_reward_functions_are_scaled_before_they_are_added_up() -> None:
    """GDPO: a function by which all are alike adds nothing, and one of large numbers no more than its weight."""
    functions = [REWARDS, ((300.0, 100.0, 100.0, 100.0), (0.0, 500.0, 0.0, 200.0))]
    weights = [1.0, 0.5]
    sums = [0.0] * 8
    for weight, function in zip(weights, functions, strict=True):
        for group, rewards in enumerate(function):
            spread = statistics.stdev(rewards) + 1e-4
            for place, reward in enumerate(rewards):
                sums[4 * group + place] += weight * (reward - statistics.mean(rewards)) / spread
    expected = [(one - statistics.mean(sums)) / (statistics.stdev(sums) + 1e-4) for one in sums]
    given = torch.tensor(functions, dtype=torch.float64).permute(1, 2, 0)
    assert decoupled_advantages(given, weights).flatten().tolist() == pytest.approx(expected, abs=1e-12)


TEACHER: Tokens = ((-0.4, -1.3, -1.6), (-2.0, -1.1), (-2.4, -0.9, -0.2, -1.8, -1.0))
COEFFICIENT = 0.6


def taught(*, old: bool = True) -> Completions:
    return replace(completions(old=old, reference=False), teacher_T=flat(TEACHER))


def test_a_teacher_has_a_say_in_the_advantage_of_each_token() -> None:
    """Tokens of one completion are pulled in different directions, and so clipped at different ends."""

    def paper(logps: Tokens) -> float:
        losses = []
        for mine, before, theirs, advantage in zip(logps, OLD, TEACHER, ADVANTAGES, strict=True):
            row = zip(mine, before, theirs, strict=True)
            losses.append([-clipped(math.exp(a - b), advantage + COEFFICIENT * (t - b)) for a, b, t in row])
        return per_completion(losses)

    preference, *others = settings_of("grpo without a reference")
    given = taught()
    outcome = grpo_loss(given, replace(preference, teacher_kl_coef=COEFFICIENT), *others)
    loss = total(outcome, "grpo", given)
    loss.backward()
    assert loss.item() == pytest.approx(paper(LOGPS), abs=TOLERANCE)
    assert given.logps_T.grad is not None
    assert given.logps_T.grad.tolist() == pytest.approx(slopes_of(paper), abs=TOLERANCE)
    divergences = map(k3, flat(OLD).tolist(), flat(TEACHER).tolist())
    assert outcome.metrics["teacher_kl"].tolist() == pytest.approx(list(divergences))


def test_a_teacher_alone_is_learnt_as_the_divergence_from_it_falls() -> None:
    """Over all tokens that may come next, so often as the model writes them, the gradient is that of KL(pi || pi_teacher)."""
    torch.manual_seed(0)
    logits_V = torch.randn(9, dtype=torch.float64, requires_grad=True)
    theirs_V = torch.randn(9, dtype=torch.float64).log_softmax(0)
    logps_V = logits_V.log_softmax(0)
    divergence = (logps_V.exp() * (logps_V - theirs_V)).sum()
    (expected,) = torch.autograd.grad(divergence, logits_V, retain_graph=True)
    preference, *others = settings_of("grpo without a reference")
    outcome = grpo_loss(
        Completions(
            logps_T=logps_V,
            lengths_N=torch.ones(9, dtype=torch.long),
            advantages_N=torch.zeros(9, dtype=torch.float64),
            teacher_T=theirs_V,
        ),
        preference,
        *others,
    )
    (found,) = torch.autograd.grad((logps_V.exp().detach() * outcome.losses_R).sum(), logits_V)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=TOLERANCE)
    assert expected.abs().max() > 0.01
