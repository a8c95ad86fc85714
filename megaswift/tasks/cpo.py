"""Contrastive preference optimisation, and SimPO, which is its relative. Neither has a reference model.

cpo    DPO's loss with log pi_ref = 0, plus alpha * L_NLL of the chosen answer: Xu et al. 2024 (arXiv 2401.08417), eq. 3 and
       section 3. L_NLL is a mean over the answer's tokens, as in TRL 1.16.
simpo  -log sigmoid(beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x) - gamma): Meng et al. 2024 (arXiv 2405.14734), eq. 6;
       with --cpo_alpha it gains the same L_NLL (CPO-SimPO).
"""

import torch

from megaswift.config.preference import PreferenceConfig
from megaswift.tasks.answers import PAIR_METRICS, Answers, Outcome, Pairs, reward_metrics
from megaswift.tasks.dpo import preference_losses

METRICS = (*PAIR_METRICS, "nll_loss")


def cpo_loss(answers: Answers, settings: PreferenceConfig) -> Outcome:
    """Return the loss of every pair."""
    pairs = answers.pairs
    chosen_P, rejected_P = pairs.chosen_P, pairs.rejected_P
    if settings.loss_type == "ipo":
        chosen_P, rejected_P = chosen_P / pairs.chosen_length_P, rejected_P / pairs.rejected_length_P
    return _with_likelihood(pairs, settings, chosen_P, rejected_P, gamma=0.0)


def simpo_loss(answers: Answers, settings: PreferenceConfig) -> Outcome:
    """Return the loss of every pair."""
    pairs = answers.pairs
    chosen_P = pairs.chosen_P / pairs.chosen_length_P
    rejected_P = pairs.rejected_P / pairs.rejected_length_P
    return _with_likelihood(pairs, settings, chosen_P, rejected_P, gamma=settings.simpo_gamma)


def _with_likelihood(
    pairs: Pairs,
    settings: PreferenceConfig,
    chosen_P: torch.Tensor,
    rejected_P: torch.Tensor,
    *,
    gamma: float,
) -> Outcome:
    beta, alpha = settings.beta, settings.cpo_alpha
    assert beta is not None and alpha is not None, "resolved"
    losses_P = preference_losses(chosen_P - rejected_P - gamma / beta, settings, beta=beta)
    metrics = {
        **reward_metrics(beta * chosen_P, beta * rejected_P, logps=(chosen_P, rejected_P)),
        "nll_loss": pairs.nll_P.detach(),
    }
    return Outcome(losses_R=losses_P + alpha * pairs.nll_P if alpha else losses_P, metrics=metrics)
