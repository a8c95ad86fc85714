"""Kahneman-Tversky optimisation: Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7 and 8.

With r = log pi(y|x)/pi_ref(y|x) and z an estimate of KL(pi || pi_ref) that carries no gradient, a desirable answer (label true)
costs lambda_D (1 - sigmoid(beta (r - z))) and an undesirable one lambda_U (1 - sigmoid(beta (z - r))). z is the mean of
r over mismatched answers (data/mismatched.py) of the whole global batch, and not below 0.
apo_zero_unpaired is the same with z = 0: D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7 for answers that are no pair.

Letters: R rows, one answer each.
"""

import torch

from megaswift.config.preference import PreferenceConfig
from megaswift.tasks.answers import Answers, Outcome

METRICS = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")


def kto_loss(answers: Answers, settings: PreferenceConfig, *, divergence: torch.Tensor) -> Outcome:
    """Return the loss of every answer; `divergence` is z, float64 without dimensions."""
    assert answers.targets_R is not None and settings.beta is not None, (
        "rows have labels, settings are resolved"
    )
    reference_R = torch.zeros_like(answers.logps_N) if answers.references_N is None else answers.references_N
    is_good_R = answers.targets_R == 1
    ratio_R = answers.logps_N - reference_R
    gain_R = torch.where(is_good_R, ratio_R - divergence, divergence - ratio_R)
    weight_R = torch.where(is_good_R, settings.desirable_weight, settings.undesirable_weight)
    rewards_R, logps_R = settings.beta * ratio_R.detach(), answers.logps_N.detach()
    metrics = {
        "rewards/chosen": rewards_R[is_good_R],
        "rewards/rejected": rewards_R[~is_good_R],
        "logps/chosen": logps_R[is_good_R],
        "logps/rejected": logps_R[~is_good_R],
        "kl": divergence.expand_as(logps_R),
    }
    return Outcome(losses_R=weight_R * (1 - torch.sigmoid(settings.beta * gain_R)), metrics=metrics)


def with_margin(means: dict[str, float]) -> dict[str, float]:
    """Add the distance of the mean rewards, which single answers do not have."""
    chosen, rejected = means.get("rewards/chosen"), means.get("rewards/rejected")
    if chosen is None or rejected is None:
        return means
    return {**means, "rewards/margins": chosen - rejected}
