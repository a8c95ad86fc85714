"""Reward models: one number for an answer, learnt from which of two answers is better.

With r_w and r_l the rewards of the chosen and the rejected answer and m the margin of the pair (0 where it has none):
L = -log sigmoid(r_w - r_l - m)     Ouyang et al. 2022 (arXiv 2203.02155), eq. 1; margin: Touvron et al. 2023 (arXiv 2307.09288), eq. 2
  + c * (r_w + r_l)^2               center_rewards_coefficient: Eisenstein et al. 2023 (arXiv 2312.09244), eq. 2
The reward is the one score of a document (tasks/scores.py).

Letters: N documents of a micro batch, P pairs: N = 2P.
"""

import torch
import torch.nn.functional as F

from megaswift.config.preference import PreferenceConfig
from megaswift.tasks.answers import Outcome

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def rm_loss(scores_N1: torch.Tensor, margins_P: torch.Tensor | None, settings: PreferenceConfig) -> Outcome:
    """Return the loss of every pair; a margin that is nan is 0."""
    chosen_P, rejected_P = scores_N1[0::2, 0], scores_N1[1::2, 0]
    lead_P = chosen_P - rejected_P
    losses_P = -F.logsigmoid(lead_P if margins_P is None else lead_P - margins_P.nan_to_num(0.0))
    if settings.center_rewards_coefficient is not None:
        losses_P = losses_P + settings.center_rewards_coefficient * (chosen_P + rejected_P).square()
    metrics = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margins": lead_P,
        "rewards/accuracies": (lead_P > 0).double(),
    }
    return Outcome(losses_R=losses_P, metrics={name: values.detach() for name, values in metrics.items()})
