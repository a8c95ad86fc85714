"""A plan as tensors: what a rank takes from a pack, and how ranks' tokens are put together again.

Letters: T tokens of one cp rank, N tokens of the pack.
"""

import functools

import torch

from megaswift.kernels.context_attention.plan import ContextPlan


@functools.lru_cache(maxsize=16)  # every layer asks for the same ones
def rank_order(plan: ContextPlan, device: torch.device) -> torch.Tensor:
    """Return the places in the pack of the tokens of cp rank 0, 1, ... one behind another [N], int64."""
    held = [
        torch.arange(tokens.start, tokens.stop) for rank in range(plan.ring) for tokens in plan.ranges(rank)
    ]
    return (torch.cat(held) if held else torch.empty(0, dtype=torch.int64)).to(device)


@functools.lru_cache(maxsize=16)
def pack_order(plan: ContextPlan, device: torch.device) -> torch.Tensor:
    """Return the inverse [N], int64: where in the tokens of rank 0, 1, ... each token of the pack is."""
    return torch.argsort(rank_order(plan, device))


def rank_tokens(plan: ContextPlan, rank: int, device: torch.device) -> torch.Tensor:
    """Return the places in the pack of the tokens of cp rank `rank` [T], int64: an index for `gather_rows`."""
    return rank_order(plan, device)[rank * plan.tokens_per_rank : (rank + 1) * plan.tokens_per_rank]
