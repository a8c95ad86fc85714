"""Values that several ranks have some of."""

from typing import Any

import torch
import torch.distributed as dist


def of_all_ranks(values: torch.Tensor, group: Any) -> tuple[torch.Tensor, int]:
    """Return the values of all ranks of a group, one rank's after the other's along dim 0, and where this rank's begin.

    Ranks may have different numbers of them. Every rank of the group calls it. What moves: all of them, once around.
    """
    counts = torch.zeros(group.size(), dtype=torch.int64, device=values.device)
    counts[group.rank()] = len(values)
    dist.all_reduce(counts, group=group)
    sizes = counts.tolist()
    first = sum(sizes[: group.rank()])
    everyone = values.new_zeros(sum(sizes), *values.shape[1:])
    everyone[first : first + len(values)] = values
    dist.all_reduce(everyone, group=group)  # zeros are added to each: exact
    return everyone, first
