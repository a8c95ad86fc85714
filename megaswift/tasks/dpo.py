"""Direct preference optimisation and the forms of its loss.

With h = beta * [log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)], w the chosen and l the rejected answer:
sigmoid       -log sigmoid(h)                          Rafailov et al. 2023 (arXiv 2305.18290), eq. 7
  smoothed    -(1-e) log sigmoid(h) - e log sigmoid(-h)  Mitchell 2023, "A note on DPO with noisy preferences", eq. 3
robust        [-(1-e) log sigmoid(h) + e log sigmoid(-h)] / (1-2e)  Ray Chowdhury et al. 2024 (arXiv 2403.00409)
hinge         max(0, 1 - h)                            Zhao et al. 2023, SLiC (arXiv 2305.10425); Liu et al. 2024, RSO (2309.06657)
ipo           (h/beta - 1/(2 beta))^2                  Azar et al. 2023 (arXiv 2310.12036), eq. 17; its authors take means over tokens (TRL 1.16)
sigmoid_norm  -log sigmoid(h), h from means over tokens  Lambert et al. 2024, Tulu 3 (arXiv 2411.15124), eq. 6
exo_pair      s(h) log[s(h)/(1-e)] + s(-h) log[s(-h)/e]  Ji et al. 2024, EXO (arXiv 2402.00856), eq. 16; s = sigmoid
discopop      -(1-m) log s(h) + m exp(-h), m = s(h/tau)  Lu et al. 2024, DiscoPOP (arXiv 2406.08414), eq. 5
With a_w, a_l the two terms of h/beta, so that each answer is judged by itself too:
nca_pair      -log s(beta a_w) - [log s(-beta a_w) + log s(-beta a_l)] / 2  Chen et al. 2024, NCA (arXiv 2402.05369)
bco_pair      -log s(beta a_w) - log s(-beta a_l)      Jung et al. 2024, BCO (arXiv 2404.04656), without its shift
sppo_hard     (a_w - 1/(2 beta))^2 + (a_l + 1/(2 beta))^2  Wu et al. 2024, SPPO (arXiv 2405.00675), eq. 4.7 with P of 1 and 0
apo_zero      1 - s(beta a_w) + s(beta a_l)            D'Oosterlinck et al. 2024, APO (arXiv 2408.06266), eq. 7
apo_down      s(beta a_w) + 1 - s(h)                   the same, eq. 8
f_divergence_type  a_w and a_l, each the log of a ratio u, become f'(u) in the forms with h: forward_kl 1 - 1/u, js_divergence
              log(2u / (1 + u)), alpha_divergence (u^(alpha-1) - 1) / (alpha - 1): Wang et al. 2024, f-DPO (arXiv 2309.16240),
              table 1, with TRL 1.16's alpha, which is 1 less theirs
rpo_alpha     adds alpha * the mean negative log-likelihood of the chosen answer's tokens: Pang et al. 2024 (arXiv 2404.19733), eq. 1
sft           the mean negative log-likelihood of the chosen answer's tokens; several forms, each with its weight, make a sum:
              Wang et al. 2024, MPO (arXiv 2411.10442)
ld_alpha      tokens of the longer answer behind as many as the shorter has count alpha in each log pi and log pi_ref: Liu et al. 2024,
              LD-DPO (arXiv 2409.06411), as in TRL 1.16; ms-swift 4.6 leaves log pi_ref as it is
reference_free takes log pi_ref as 0.

Letters: P pairs.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from megaswift.config.loss_forms import weighted_forms
from megaswift.config.preference import PreferenceConfig
from megaswift.tasks.answers import PAIR_METRICS, Answers, Outcome, Pairs, reward_metrics

JUDGES_EACH: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "nca_pair": lambda won_P, lost_P, beta: (
        -F.logsigmoid(beta * won_P) - (F.logsigmoid(-beta * won_P) + F.logsigmoid(-beta * lost_P)) / 2
    ),
    "bco_pair": lambda won_P, lost_P, beta: -F.logsigmoid(beta * won_P) - F.logsigmoid(-beta * lost_P),
    "sppo_hard": lambda won_P, lost_P, beta: (won_P - 0.5 / beta).square() + (lost_P + 0.5 / beta).square(),
    "apo_zero": lambda won_P, lost_P, beta: torch.sigmoid(-beta * won_P) + torch.sigmoid(beta * lost_P),
    "apo_down": lambda won_P, lost_P, beta: (
        torch.sigmoid(beta * won_P) + torch.sigmoid(-beta * (won_P - lost_P))
    ),
}

METRICS = (*PAIR_METRICS, "nll_loss")


def dpo_loss(answers: Answers, settings: PreferenceConfig) -> Outcome:
    """Return the loss of every pair; references are taken as 0 where there are none."""
    pairs, beta = answers.pairs, settings.beta
    assert beta is not None, "resolved"
    chosen_P = pairs.chosen_P - pairs.ref_chosen_P
    rejected_P = pairs.rejected_P - pairs.ref_rejected_P
    metrics = reward_metrics(beta * chosen_P, beta * rejected_P, logps=(pairs.chosen_P, pairs.rejected_P))
    forms = weighted_forms(settings)
    losses_P = torch.zeros_like(chosen_P)
    for form, weight in forms:
        own = replace(settings, loss_type=form)
        losses_P = losses_P + weight * _losses_of_a_form(pairs, chosen_P, rejected_P, own, beta=beta)
    if settings.rpo_alpha is not None:
        losses_P = losses_P + settings.rpo_alpha * pairs.nll_P
    if settings.rpo_alpha is not None or "sft" in dict(forms):
        metrics["nll_loss"] = pairs.nll_P.detach()
    return Outcome(losses_R=losses_P, metrics=metrics)


def _losses_of_a_form(
    pairs: Pairs, chosen_P: torch.Tensor, rejected_P: torch.Tensor, settings: PreferenceConfig, *, beta: float
) -> torch.Tensor:
    """Return the loss of every pair in one form, given a_w and a_l."""
    form = settings.loss_type
    assert form is not None, "resolved"
    if form == "sft":
        return pairs.nll_P
    if form in JUDGES_EACH:
        return JUDGES_EACH[form](chosen_P, rejected_P, beta)
    chosen_P, rejected_P = slope(chosen_P, settings), slope(rejected_P, settings)
    if form in ("ipo", "sigmoid_norm"):
        chosen_P, rejected_P = chosen_P / pairs.chosen_length_P, rejected_P / pairs.rejected_length_P
    return preference_losses(chosen_P - rejected_P, settings, beta=beta)


def slope(lead_P: torch.Tensor, settings: PreferenceConfig) -> torch.Tensor:
    """Return f'(u) for log u, the lead of an answer over the reference."""
    kind, alpha = settings.f_divergence_type, settings.f_alpha_divergence_coef
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(lead_P)
    if kind == "forward_kl":
        alpha = 0.0
    if kind == "reverse_kl" or alpha == 1:
        return lead_P
    # A ratio of e**80 is as good as any, and finite.
    return torch.expm1(((alpha - 1) * lead_P).clamp(max=80)) / (alpha - 1)


def preference_losses(lead_P: torch.Tensor, settings: PreferenceConfig, *, beta: float) -> torch.Tensor:
    """Return the loss for the lead of the chosen answer, h / beta, in the form of --loss_type."""
    h_P, wrong = beta * lead_P, settings.label_smoothing
    if settings.loss_type == "hinge":
        return torch.relu(1 - h_P)
    if settings.loss_type == "ipo":
        return (lead_P - 1 / (2 * beta)).square()
    right_P, swapped_P = -F.logsigmoid(h_P), -F.logsigmoid(-h_P)
    if settings.loss_type == "exo_pair":
        won_P = -right_P - math.log1p(-wrong)
        lost_P = -swapped_P - math.log(wrong)
        return torch.sigmoid(h_P) * won_P + torch.sigmoid(-h_P) * lost_P
    if settings.loss_type == "discopop":
        share_P = torch.sigmoid(h_P / settings.discopop_tau)
        return (1 - share_P) * right_P + share_P * torch.exp(-h_P)
    if settings.loss_type == "robust":
        return ((1 - wrong) * right_P - wrong * swapped_P) / (1 - 2 * wrong)
    return (1 - wrong) * right_P + wrong * swapped_P
