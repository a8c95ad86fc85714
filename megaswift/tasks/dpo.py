"""Direct preference optimisation and the forms of its loss.

With h = beta * [log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)], w the chosen and l the rejected answer:
sigmoid       -log sigmoid(h)                          Rafailov et al. 2023 (arXiv 2305.18290), eq. 7
  smoothed    -(1-e) log sigmoid(h) - e log sigmoid(-h)  Mitchell 2023, "A note on DPO with noisy preferences", eq. 3
robust        [-(1-e) log sigmoid(h) + e log sigmoid(-h)] / (1-2e)  Ray Chowdhury et al. 2024 (arXiv 2403.00409)
hinge         max(0, 1 - h)                            Zhao et al. 2023, SLiC (arXiv 2305.10425); Liu et al. 2024, RSO (2309.06657)
ipo           (h/beta - 1/(2 beta))^2                  Azar et al. 2023 (arXiv 2310.12036), eq. 17; its authors take means over tokens (TRL 1.16)
sigmoid_norm  -log sigmoid(h), h from means over tokens  Lambert et al. 2024, Tulu 3 (arXiv 2411.15124), eq. 6
rpo_alpha     adds alpha * the mean negative log-likelihood of the chosen answer's tokens: Pang et al. 2024 (arXiv 2404.19733), eq. 1
reference_free takes log pi_ref as 0.

Letters: P pairs.
"""

import torch
import torch.nn.functional as F

from megaswift.config.preference import PreferenceConfig
from megaswift.tasks.answers import PAIR_METRICS, Answers, Outcome, reward_metrics

METRICS = (*PAIR_METRICS, "nll_loss")


def dpo_loss(answers: Answers, settings: PreferenceConfig) -> Outcome:
    """Return the loss of every pair; references are taken as 0 where there are none."""
    pairs, beta = answers.pairs, settings.beta
    assert beta is not None, "resolved"
    chosen_P = pairs.chosen_P - pairs.ref_chosen_P
    rejected_P = pairs.rejected_P - pairs.ref_rejected_P
    metrics = reward_metrics(beta * chosen_P, beta * rejected_P, logps=(pairs.chosen_P, pairs.rejected_P))
    if settings.loss_type in ("ipo", "sigmoid_norm"):
        chosen_P, rejected_P = chosen_P / pairs.chosen_length_P, rejected_P / pairs.rejected_length_P
    losses_P = preference_losses(chosen_P - rejected_P, settings, beta=beta)
    if settings.rpo_alpha is not None:
        losses_P = losses_P + settings.rpo_alpha * pairs.nll_P
        metrics["nll_loss"] = pairs.nll_P.detach()
    return Outcome(losses_R=losses_P, metrics=metrics)


def preference_losses(lead_P: torch.Tensor, settings: PreferenceConfig, *, beta: float) -> torch.Tensor:
    """Return the loss for the lead of the chosen answer, h / beta, in the form of --loss_type."""
    h_P, wrong = beta * lead_P, settings.label_smoothing
    if settings.loss_type == "hinge":
        return torch.relu(1 - h_P)
    if settings.loss_type == "ipo":
        return (lead_P - 1 / (2 * beta)).square()
    right_P, swapped_P = -F.logsigmoid(h_P), -F.logsigmoid(-h_P)
    if settings.loss_type == "robust":
        return ((1 - wrong) * right_P - wrong * swapped_P) / (1 - 2 * wrong)
    return (1 - wrong) * right_P + wrong * swapped_P
