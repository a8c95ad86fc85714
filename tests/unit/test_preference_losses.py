"""Preference losses against the formulas of their papers, in plain float64 arithmetic: values, and gradients by differences."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megaswift.config.loss_forms import JUDGE_ALONE
from megaswift.config.preference import PreferenceConfig
from megaswift.data.batches import MicroBatch
from megaswift.tasks.answers import Answers, Outcome, answers_of
from megaswift.tasks.catalogue import PAIR_LOSSES
from megaswift.tasks.dpo import JUDGES_EACH
from megaswift.tasks.kto import kto_loss, with_margin
from megaswift.tasks.rm import METRICS as RM_METRICS
from megaswift.tasks.rm import rm_loss
from megaswift.tasks.scores import last_scores

# Losses and gradients are of order 1. Central differences of step 1e-4 are wrong by 1e-8 times a third derivative.
TOLERANCE, STEP = 1e-6, 1e-4


@dataclass(frozen=True)
class Pair:
    """One pair as the papers write it: log-probabilities w (chosen) and l (rejected), of the reference, and lengths."""

    w: float
    l: float  # noqa: E741  # the papers' letter
    ref_w: float
    ref_l: float
    len_w: int
    len_l: int

    @property
    def a_w(self) -> float:
        """The lead of the chosen answer over the reference."""
        return self.w - self.ref_w

    @property
    def a_l(self) -> float:
        """The lead of the rejected one."""
        return self.l - self.ref_l

    @property
    def h(self) -> float:
        """How much further the chosen answer leads."""
        return self.a_w - self.a_l

    @property
    def h_mean(self) -> float:
        """The same of means over tokens."""
        return (self.w - self.ref_w) / self.len_w - (self.l - self.ref_l) / self.len_l


PAIRS = (
    Pair(-12.3, -15.1, -13.0, -14.2, 7, 9),
    Pair(-30.5, -22.0, -29.1, -25.5, 11, 4),
    Pair(-3.2, -3.9, -3.1, -3.6, 2, 3),
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(mean_logp: float) -> float:
    return mean_logp - math.log(1 - math.exp(mean_logp))


def orpo(pair: Pair, weight: float) -> float:
    lead = log_odds(pair.w / pair.len_w) - log_odds(pair.l / pair.len_l)
    return -pair.w / pair.len_w - weight * math.log(sigmoid(lead))


def test_the_rules_know_the_forms_that_judge_each_answer_alone() -> None:
    assert set(JUDGES_EACH) == JUDGE_ALONE


# name -> (rlhf_type, settings, the paper's loss of one pair)
CASES: dict[str, tuple[str, dict[str, Any], Callable[[Pair], float]]] = {
    "dpo sigmoid": ("dpo", {"loss_type": "sigmoid", "beta": 0.3}, lambda p: -math.log(sigmoid(0.3 * p.h))),
    "dpo smoothed": (
        "dpo",
        {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.2},
        lambda p: -0.8 * math.log(sigmoid(0.3 * p.h)) - 0.2 * math.log(sigmoid(-0.3 * p.h)),
    ),
    "dpo robust": (
        "dpo",
        {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.2},
        lambda p: (-0.8 * math.log(sigmoid(0.3 * p.h)) + 0.2 * math.log(sigmoid(-0.3 * p.h))) / 0.6,
    ),
    "dpo hinge": ("dpo", {"loss_type": "hinge", "beta": 0.3}, lambda p: max(0.0, 1 - 0.3 * p.h)),
    "dpo forward_kl": (
        "dpo",
        {"loss_type": "sigmoid", "beta": 0.3, "f_divergence_type": "forward_kl"},
        lambda p: -math.log(sigmoid(0.3 * (1 / math.exp(p.a_l) - 1 / math.exp(p.a_w)))),
    ),
    "dpo js_divergence": (
        "dpo",
        {"loss_type": "hinge", "beta": 0.3, "f_divergence_type": "js_divergence"},
        lambda p: max(
            0.0,
            1
            - 0.3 * math.log(2 * math.exp(p.a_w) / (1 + math.exp(p.a_w)))
            + 0.3 * math.log(2 * math.exp(p.a_l) / (1 + math.exp(p.a_l))),
        ),
    ),
    "dpo alpha_divergence": (
        "dpo",
        {
            "loss_type": "ipo",
            "beta": 0.3,
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.3,
        },
        lambda p: (
            (math.exp(-0.7 * p.a_w) - 1) / -0.7 / p.len_w
            - (math.exp(-0.7 * p.a_l) - 1) / -0.7 / p.len_l
            - 1 / 0.6
        )
        ** 2,
    ),
    "dpo ipo": ("dpo", {"loss_type": "ipo", "beta": 0.3}, lambda p: (p.h_mean - 1 / 0.6) ** 2),
    "dpo sigmoid_norm": (
        "dpo",
        {"loss_type": "sigmoid_norm", "beta": 3.0},
        lambda p: -math.log(sigmoid(3.0 * p.h_mean)),
    ),
    "dpo exo_pair": (
        "dpo",
        {"loss_type": "exo_pair", "beta": 0.3, "label_smoothing": 0.1},
        lambda p: sum(
            sigmoid(s * 0.3 * p.h) * math.log(sigmoid(s * 0.3 * p.h) / e) for s, e in ((1, 0.9), (-1, 0.1))
        ),
    ),
    "dpo discopop": (
        "dpo",
        {"loss_type": "discopop", "beta": 0.3, "discopop_tau": 0.7},
        lambda p: (
            -(1 - sigmoid(0.3 * p.h / 0.7)) * math.log(sigmoid(0.3 * p.h))
            + sigmoid(0.3 * p.h / 0.7) * math.exp(-0.3 * p.h)
        ),
    ),
    "dpo nca_pair": (
        "dpo",
        {"loss_type": "nca_pair", "beta": 0.3},
        lambda p: (
            -math.log(sigmoid(0.3 * p.a_w))
            - 0.5 * math.log(sigmoid(-0.3 * p.a_w))
            - 0.5 * math.log(sigmoid(-0.3 * p.a_l))
        ),
    ),
    "dpo bco_pair": (
        "dpo",
        {"loss_type": "bco_pair", "beta": 0.3},
        lambda p: -math.log(sigmoid(0.3 * p.a_w)) - math.log(sigmoid(-0.3 * p.a_l)),
    ),
    "dpo sppo_hard": (
        "dpo",
        {"loss_type": "sppo_hard", "beta": 0.3},
        lambda p: (p.a_w - 1 / 0.6) ** 2 + (p.a_l + 1 / 0.6) ** 2,
    ),
    "dpo apo_zero": (
        "dpo",
        {"loss_type": "apo_zero", "beta": 0.3},
        lambda p: 1 - sigmoid(0.3 * p.a_w) + sigmoid(0.3 * p.a_l),
    ),
    "dpo apo_down": (
        "dpo",
        {"loss_type": "apo_down", "beta": 0.3},
        lambda p: sigmoid(0.3 * p.a_w) + 1 - sigmoid(0.3 * p.h),
    ),
    "dpo rpo_alpha": (
        "dpo",
        {"loss_type": "sigmoid", "beta": 0.3, "rpo_alpha": 0.7},
        lambda p: -math.log(sigmoid(0.3 * p.h)) - 0.7 * p.w / p.len_w,
    ),
    "dpo sft": ("dpo", {"loss_type": "sft", "beta": 0.3}, lambda p: -p.w / p.len_w),
    "mpo": (
        "dpo",
        {"loss_type": "sigmoid bco_pair sft", "loss_weights": ["0.8", "0.2", "0.5"], "beta": 0.3},
        lambda p: (
            -0.8 * math.log(sigmoid(0.3 * p.h))
            - 0.2 * (math.log(sigmoid(0.3 * p.a_w)) + math.log(sigmoid(-0.3 * p.a_l)))
            - 0.5 * p.w / p.len_w
        ),
    ),
    "two forms": (
        "dpo",
        {"loss_type": "hinge ipo", "beta": 0.3},
        lambda p: max(0.0, 1 - 0.3 * p.h) + (p.h_mean - 1 / 0.6) ** 2,
    ),
    "orpo": ("orpo", {"beta": 0.4}, lambda p: orpo(p, 0.4)),
    "simpo": (
        "simpo",
        {"beta": 2.0, "cpo_alpha": 0.0, "simpo_gamma": 0.6},
        lambda p: -math.log(sigmoid(2.0 * p.w / p.len_w - 2.0 * p.l / p.len_l - 0.6)),
    ),
    "cpo-simpo": (
        "simpo",
        {"beta": 2.0, "cpo_alpha": 0.5, "simpo_gamma": 0.6},
        lambda p: -math.log(sigmoid(2.0 * p.w / p.len_w - 2.0 * p.l / p.len_l - 0.6)) - 0.5 * p.w / p.len_w,
    ),
    "cpo": (
        "cpo",
        {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.5},
        lambda p: -math.log(sigmoid(0.3 * (p.w - p.l))) - 0.5 * p.w / p.len_w,
    ),
    "cpo hinge": (
        "cpo",
        {"loss_type": "hinge", "beta": 0.3, "cpo_alpha": 0.0},
        lambda p: max(0.0, 1 - 0.3 * (p.w - p.l)),
    ),
    "cpo ipo": (
        "cpo",
        {"loss_type": "ipo", "beta": 0.3, "cpo_alpha": 0.0},
        lambda p: (p.w / p.len_w - p.l / p.len_l - 1 / 0.6) ** 2,
    ),
}


def answers_of_pairs(*, with_reference: bool = True) -> Answers:
    flat = [
        value
        for pair in PAIRS
        for value in ((pair.w, pair.ref_w, pair.len_w), (pair.l, pair.ref_l, pair.len_l))
    ]
    logps, references, lengths = torch.tensor(flat, dtype=torch.float64).T.contiguous()
    return Answers(
        logps_N=logps.requires_grad_(), lengths_N=lengths, references_N=references if with_reference else None
    )


def moved(pair: Pair, name: str, by: float) -> Pair:
    return Pair(**{**vars(pair), name: getattr(pair, name) + by})


def gradient_of(outcome: Outcome, answers: Answers) -> list[float]:
    outcome.losses_R.sum().backward()
    assert answers.logps_N.grad is not None
    return answers.logps_N.grad.tolist()


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_paper(name: str) -> None:
    kind, settings, loss = CASES[name]
    answers = answers_of_pairs()
    outcome = PAIR_LOSSES[kind][0](answers, PreferenceConfig(rlhf_type=kind, **settings))
    assert outcome.losses_R.tolist() == pytest.approx([loss(pair) for pair in PAIRS], abs=TOLERANCE)
    expected = [
        (loss(moved(pair, name, STEP)) - loss(moved(pair, name, -STEP))) / (2 * STEP)
        for pair in PAIRS
        for name in ("w", "l")
    ]
    assert gradient_of(outcome, answers) == pytest.approx(expected, abs=TOLERANCE)
    assert any(expected), "a gradient of zero would say little"


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_every_pair_loss_logs_the_metrics_that_it_names(kind: str) -> None:
    loss, metrics = PAIR_LOSSES[kind]
    outcome = loss(
        answers_of_pairs(), PreferenceConfig(rlhf_type=kind, beta=0.1, cpo_alpha=0.0, rpo_alpha=0.1)
    )
    assert set(outcome.metrics) == set(metrics)
    assert not any(values.requires_grad for values in outcome.metrics.values())
    chosen, rejected = (outcome.metrics[f"rewards/{side}"] for side in ("chosen", "rejected"))
    assert torch.equal(outcome.metrics["rewards/margins"], chosen - rejected)
    assert torch.equal(outcome.metrics["rewards/accuracies"], (chosen > rejected).double())


MASKS = (
    (1, 0, 1, 1, 1),
    (0, 1, 1, 0, 0),
    (0, 0, 0, 1, 0),
    (1, 1, 1, 1, 0),
)  # of two pairs; answers with gaps


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_tokens_behind_as_many_as_the_shorter_answer_has_are_discounted(packed: bool) -> None:
    """LD-DPO's likelihood, and that of the chosen answer which rpo_alpha and sft read, which is whole; with the gradient of each."""
    alpha, count = 0.3, len(MASKS)
    losses = torch.arange(1.0, 21.0, dtype=torch.float64).view(4, 5) * torch.tensor(MASKS)
    mask = torch.tensor(MASKS, dtype=torch.float32)
    if packed:  # with padding, a document of its own
        losses, mask = (torch.cat([one.reshape(1, -1), one.new_zeros(1, 3)], dim=1) for one in (losses, mask))
    losses.requires_grad_()
    blank = {
        name: torch.zeros_like(mask, dtype=torch.int64) for name in ("input_ids", "labels", "position_ids")
    }
    batch = MicroBatch(
        loss_mask=mask, max_seqlen=5, sample_ids=tuple(range(count)), **blank,
        cu_seqlens=torch.tensor([0, 5, 10, 15, 20, 23], dtype=torch.int32) if packed else None,
    )  # fmt: skip
    found = answers_of(batch, losses, ld_alpha=alpha)
    weights = [[0.0] * 5 for _ in MASKS]
    for row, marks in enumerate(MASKS):
        shared = min(sum(marks), sum(MASKS[row ^ 1]))
        for place, number in enumerate(marks):
            weights[row][place] = number * (1.0 if sum(marks[: place + 1]) <= shared else alpha)
    values = [[5.0 * row + place + 1 for place in range(5)] for row in range(count)]
    expected = [-sum(w * v for w, v in zip(*rows, strict=True)) for rows in zip(weights, values, strict=True)]
    assert found.logps_N.tolist() == pytest.approx(expected, abs=TOLERANCE)
    whole = [-sum(m * v for m, v in zip(*rows, strict=True)) for rows in zip(MASKS, values, strict=True)]
    assert found.lengths_N.tolist() == [sum(marks) for marks in MASKS]
    assert found.pairs.nll_P.tolist() == pytest.approx([-whole[0] / 4, -whole[2] / 1], abs=TOLERANCE)
    (gradient,) = torch.autograd.grad(found.logps_N.sum(), losses)
    gradient = gradient * mask  # the model has no gradients elsewhere
    assert gradient.flatten()[:20].tolist() == pytest.approx([-one for row in weights for one in row])
    assert 0 < sum(w == alpha for row in weights for w in row)


def test_dpo_without_a_reference_takes_it_as_uniform() -> None:
    settings = PreferenceConfig(loss_type="sigmoid", beta=0.3, reference_free=True)
    outcome = PAIR_LOSSES["dpo"][0](answers_of_pairs(with_reference=False), settings)
    expected = [-math.log(sigmoid(0.3 * (pair.w - pair.l))) for pair in PAIRS]
    assert outcome.losses_R.tolist() == pytest.approx(expected, abs=TOLERANCE)


def kto(logp: float, ref: float, *, good: bool, z: float) -> float:
    gain = logp - ref - z if good else z - (logp - ref)
    return (1.5 if good else 0.7) * (1 - sigmoid(0.3 * gain))


@pytest.mark.parametrize("z", [0.0, 1.7])
def test_kto_loss_and_gradient_are_those_of_the_paper(z: float) -> None:
    settings = PreferenceConfig(
        rlhf_type="kto", loss_type="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.7
    )
    rows = [(-12.3, -13.0, True), (-30.5, -29.1, False), (-3.2, -3.1, True), (-8.0, -9.5, False)]
    logps, references, labels = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)
    )
    answers = Answers(
        logps_N=logps.requires_grad_(), lengths_N=torch.ones(4), references_N=references, targets_R=labels
    )
    outcome = kto_loss(answers, settings, divergence=torch.tensor(z, dtype=torch.float64))
    expected = [kto(logp, ref, good=good, z=z) for logp, ref, good in rows]
    assert outcome.losses_R.tolist() == pytest.approx(expected, abs=TOLERANCE)
    slopes = [
        (kto(logp + STEP, ref, good=good, z=z) - kto(logp - STEP, ref, good=good, z=z)) / (2 * STEP)
        for logp, ref, good in rows
    ]
    assert gradient_of(outcome, answers) == pytest.approx(slopes, abs=TOLERANCE)
    means = {name: float(values.mean()) for name, values in outcome.metrics.items()}
    assert means["rewards/chosen"] == pytest.approx(0.3 * (0.7 - 0.1) / 2)
    assert with_margin(means)["rewards/margins"] == pytest.approx(0.09 - 0.3 * (-1.4 + 1.5) / 2)
    assert with_margin({"rewards/chosen": 1.0}) == {"rewards/chosen": 1.0}


@pytest.mark.parametrize("center", [None, 0.05])
def test_reward_model_loss_and_gradient_are_those_of_the_paper(center: float | None) -> None:
    rewards = [0.3, -0.4, -1.2, 0.9, 2.0, 1.9]
    margins = [0.5, math.nan, 0.0]

    def loss(chosen: float, rejected: float, margin: float) -> float:
        margin = 0.0 if math.isnan(margin) else margin
        return -math.log(sigmoid(chosen - rejected - margin)) + (center or 0.0) * (chosen + rejected) ** 2

    rewards_N1 = torch.tensor(rewards, dtype=torch.float64)[:, None].requires_grad_()
    settings = PreferenceConfig(rlhf_type="rm", center_rewards_coefficient=center)
    outcome = rm_loss(rewards_N1, torch.tensor(margins, dtype=torch.float64), settings)
    pairs = list(zip(rewards[0::2], rewards[1::2], margins, strict=True))
    assert outcome.losses_R.tolist() == pytest.approx([loss(*pair) for pair in pairs], abs=TOLERANCE)
    outcome.losses_R.sum().backward()
    slopes = []
    for chosen, rejected, margin in pairs:
        slopes.append(
            (loss(chosen + STEP, rejected, margin) - loss(chosen - STEP, rejected, margin)) / (2 * STEP)
        )
        slopes.append(
            (loss(chosen, rejected + STEP, margin) - loss(chosen, rejected - STEP, margin)) / (2 * STEP)
        )
    assert rewards_N1.grad[:, 0].tolist() == pytest.approx(slopes, abs=TOLERANCE)
    assert set(outcome.metrics) == set(RM_METRICS)
    assert outcome.metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 1.0]


def test_the_reward_is_the_score_of_the_last_token_that_is_not_padding() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])
    scores = torch.arange(16.0).view(2, 4, 2)
    blank = {"labels": ids, "loss_mask": ids.float(), "max_seqlen": 4}
    places = torch.arange(4).expand(2, 4)
    padded = MicroBatch(input_ids=ids, position_ids=places, cu_seqlens=None, sample_ids=(0, 1), **blank)
    assert last_scores(padded, scores, pad_id=0).tolist() == [[2.0, 3.0], [12.0, 13.0]]
    row = MicroBatch(
        input_ids=torch.tensor([[5, 6, 7, 8, 9, 0, 0, 0]]),
        position_ids=torch.tensor([[0, 1, 0, 1, 2, 3, 0, 1]]),
        cu_seqlens=torch.tensor([0, 2, 6, 8], dtype=torch.int32),
        sample_ids=(0, 1),
        **blank,
    )
    assert last_scores(row, scores.view(1, 8, 2), pad_id=0).tolist() == [[2.0, 3.0], [8.0, 9.0]]
