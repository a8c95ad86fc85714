"""What the fused output layer computes, in plain torch.

Letters: T tokens, D model size, V vocabulary rows of this rank.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

# (lse_T, target_T, max_T) over one rank's columns -> lse_T and target_T over the whole vocabulary
Merge = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    ignore_index: int | None = None,
    vocab_size: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return every token's loss [T], float32, by way of the full logits of one rank."""
    logits_TV = (hidden_TD @ weight_VD[:vocab_size].t()).float()
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    return F.cross_entropy(
        logits_TV, labels_T, reduction="none", ignore_index=-100 if ignore_index is None else ignore_index
    )


def token_losses_(
    logits_TV: torch.Tensor, columns_T: torch.Tensor, weights_T: torch.Tensor | None, merge: Merge
) -> torch.Tensor:
    """Return the losses [T], float32, and leave weights_T * d loss / d logit in `logits_TV`.

    `columns_T` is the label's column, int64, or -1 where another rank has it.
    """
    work_TV = (
        logits_TV.float()
    )  # the same storage for float32, so that nothing of the logits' size is allocated
    columns_T1, owned_T = columns_T.clamp_min(0)[:, None], columns_T >= 0
    target_T = work_TV.gather(1, columns_T1)[:, 0].masked_fill(~owned_T, 0.0)
    max_T = work_TV.amax(dim=1)
    lse_T = work_TV.sub_(max_T[:, None]).exp_().sum(dim=1).log_().add_(max_T)
    lse_T, target_T = merge(lse_T, target_T, max_T)
    if weights_T is not None:
        work_TV.mul_((weights_T * torch.exp(max_T - lse_T))[:, None])
        work_TV.scatter_add_(1, columns_T1, (-weights_T * owned_T)[:, None])
        if work_TV is not logits_TV:
            logits_TV.copy_(work_TV)
    return lse_T - target_T
