"""What moves between ranks in spread attention: ring steps, gathered keys, exchanged heads.

Letters: T local tokens, N tokens of all ranks of the group, F features of a token, P ranks of the group.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

_KEYS, _GRADIENTS = (
    0,
    1,
)  # tags: gloo matches messages by them; NCCL by their order, which is the same on every rank


class Shift:
    """One message to the next rank of the ring and one from the previous, under way since construction."""

    def __init__(self, sent: torch.Tensor, group: dist.ProcessGroup, *, tag: int) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
        self._sent = sent  # kept alive until it has left
        self._received = torch.empty_like(sent)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, after, group, tag),
                dist.P2POp(dist.irecv, self._received, before, group, tag),
            ]
        )

    def wait(self) -> torch.Tensor:
        """Return what the previous rank sent."""
        for work in self._works:
            work.wait()
        return self._received


def circulate(local_TF: torch.Tensor, group: dist.ProcessGroup | None) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (rank, its tensor) for every rank of the ring, our own first; every rank iterates to the end.

    The next tensor travels while the caller works on the one it was given. What moves: P - 1 tensors a rank.
    """
    if group is None:
        yield 0, local_TF
        return
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    held_TF = local_TF.contiguous()
    for step in range(ranks):
        shift = Shift(held_TF, group, tag=_KEYS) if step < ranks - 1 else None
        yield (rank - step) % ranks, held_TF
        if shift is not None:
            held_TF = shift.wait()


class Homecoming:
    """Sums that follow their tensors round the ring, one step behind, and come home.

    Every rank adds its part for every other rank's tensor, in the order of `circulate`. What moves: P - 1
    sums a rank.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._shift: Shift | None = None

    def add(self, part_TF: torch.Tensor) -> None:
        """Add our part of the gradient of the tensor just worked on."""
        if self._shift is not None:
            part_TF += self._shift.wait()
        self._shift = Shift(part_TF, self._group, tag=_GRADIENTS)

    def wait(self) -> torch.Tensor:
        """Return what all other ranks added for our tensor."""
        assert self._shift is not None, "every rank has added its parts"
        return self._shift.wait()


def gather(local_TF: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the tensors of all ranks, one behind another [N, F]; every rank of `group` calls it."""
    if group is None:
        return local_TF
    every_NF = local_TF.new_empty(dist.get_world_size(group) * local_TF.shape[0], *local_TF.shape[1:])
    dist.all_gather_into_tensor(every_NF, local_TF.contiguous(), group=group)
    return every_NF


def scatter_sum(every_NF: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the sum over ranks of our rows [T, F] of `every_NF`; every rank of `group` calls it.

    Parts are exchanged and added here in the order of ranks: the same on every back end, and gloo lacks a
    reduce-scatter that takes every dtype.
    """
    if group is None:
        return every_NF
    parts_NF = torch.empty_like(every_NF)
    dist.all_to_all_single(parts_NF, every_NF.contiguous(), group=group)
    return parts_NF.unflatten(0, (dist.get_world_size(group), -1)).sum(0)


class ExchangeHeads(torch.autograd.Function):
    """[T, P * F] of our tokens, features of all ranks -> [P * T, F] of all tokens, our features."""

    @staticmethod
    def forward(ctx: Any, x_TPF: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _to_heads(x_TPF, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _to_tokens(grads[0], ctx.group), None


class ExchangeTokens(torch.autograd.Function):
    """[P * T, F] of all tokens, our features -> [T, P * F] of our tokens, features of all ranks."""

    @staticmethod
    def forward(ctx: Any, x_NF: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _to_tokens(x_NF, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _to_heads(grads[0], ctx.group), None


def _to_heads(x_TPF: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    ranks = dist.get_world_size(group)
    sent_PTF = x_TPF.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    received_PTF = torch.empty_like(sent_PTF)
    dist.all_to_all_single(received_PTF, sent_PTF, group=group)
    return received_PTF.flatten(0, 1)


def _to_tokens(x_NF: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    ranks = dist.get_world_size(group)
    sent_PTF = x_NF.unflatten(0, (ranks, -1)).contiguous()
    received_PTF = torch.empty_like(sent_PTF)
    dist.all_to_all_single(received_PTF, sent_PTF, group=group)
    return received_PTF.transpose(0, 1).flatten(1)
