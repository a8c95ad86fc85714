"""Odds ratio preference optimisation: Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7. It has no reference model.

L = L_SFT - lambda * log sigmoid(log odds(y_w|x) - log odds(y_l|x)), odds(y|x) = p / (1 - p), where p is the geometric mean of
the answer's token probabilities (eq. 3) and L_SFT = -log p(y_w|x). Lambda is --beta.
"""

import torch
import torch.nn.functional as F

from megaswift.config.preference import PreferenceConfig
from megaswift.tasks.answers import PAIR_METRICS, Answers, Outcome, reward_metrics

METRICS = (*PAIR_METRICS, "nll_loss", "log_odds_ratio", "log_odds_chosen")


def orpo_loss(answers: Answers, settings: PreferenceConfig) -> Outcome:
    """Return the loss of every pair."""
    pairs, beta = answers.pairs, settings.beta
    assert beta is not None, "resolved"
    chosen_P = pairs.chosen_P / pairs.chosen_length_P
    rejected_P = pairs.rejected_P / pairs.rejected_length_P
    lead_P = (chosen_P - _log_rest(chosen_P)) - (rejected_P - _log_rest(rejected_P))
    ratio_P = F.logsigmoid(lead_P)
    metrics = {
        **reward_metrics(beta * chosen_P, beta * rejected_P, logps=(chosen_P, rejected_P)),
        "nll_loss": pairs.nll_P.detach(),
        "log_odds_ratio": ratio_P.detach(),
        "log_odds_chosen": lead_P.detach(),
    }
    return Outcome(losses_R=pairs.nll_P - beta * ratio_P, metrics=metrics)


def _log_rest(logp_P: torch.Tensor) -> torch.Tensor:
    """Return log(1 - p) for log p < 0."""
    return torch.log(-torch.expm1(logp_P))
