"""The whole model out of the shards of several ranks, as the tensors of its file, without touching a disk.

All ranks of a group compute each other's plans from ModelMeta, so that a shard travels without a word about it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megaswift.converters.export import merged_weight
from megaswift.converters.live import as_matrix, live_parameters, rows_of
from megaswift.converters.plan import Piece, file_tensors, float32_tensors, plan_chunk
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout, coordinates


@torch.no_grad()
def gather_model(
    chunks: Sequence[torch.nn.Module],
    meta: ModelMeta,
    layout: Layout,
    rank: int,
    *,
    group: Any,
    dtype: torch.dtype,
    keep: bool,
) -> dict[str, torch.Tensor]:
    """Return the tensors of the model's file where `keep` is true, on the device of the shards, and {} elsewhere.

    `group` holds every part of the model; all its ranks call it alike. What moves: each shard once, broadcast in the group.
    Adapters are merged in. Tensors have `dtype`, or float32 where files always do.
    """
    live = live_parameters(chunks, meta, layout, rank=rank)
    device = next(chunks[0].parameters()).device
    members = dist.get_process_group_ranks(group)
    shapes, in_float32 = file_tensors(meta), float32_tensors(meta)
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[Piece, ...]] = set()
    for member in members:
        at = coordinates(layout, member)
        plan = (one for vp_rank in range(layout.vpp) for one in plan_chunk(meta, layout, at, vp_rank=vp_rank))
        for number, planned in enumerate(plan):
            if planned.is_copy or not planned.pieces or planned.pieces in seen:
                continue  # other ranks have the same
            seen.add(planned.pieces)
            sent = torch.float32 if planned.pieces[0].tensor in in_float32 else dtype
            if member == rank:
                matrix_NC = as_matrix(merged_weight(live[number]).to(sent).contiguous())
            else:
                matrix_NC = as_matrix(torch.empty(planned.shape, dtype=sent, device=device))
            if len(members) > 1:
                dist.broadcast(
                    matrix_NC.view(torch.uint8), member, group=group
                )  # gloo does not know every dtype
            if keep:
                for piece in planned.pieces:
                    shape = shapes[piece.tensor]
                    if piece.tensor not in found:
                        found[piece.tensor] = torch.empty(shape, dtype=sent, device=device)
                    _place(found[piece.tensor], piece, matrix_NC)
    assert not keep or found.keys() == shapes.keys(), f"{shapes.keys() - found.keys()} are in no shard"
    return found


def _place(tensor: torch.Tensor, piece: Piece, matrix_NC: torch.Tensor) -> None:
    """Copy a piece of a shard to where the file has it."""
    first, end = piece.cols
    if piece.slab is None:
        in_file_NC = tensor.view(tensor.shape[0] if tensor.dim() else 1, -1)
    else:  # one of the matrices that the file packs transposed
        packed = tensor[piece.slab]
        in_file_NC = packed.T if packed.dim() == 2 else packed[:, None]
    target = rows_of(in_file_NC[:, first:end], piece.rows)
    target.copy_(rows_of(matrix_NC[:, : end - first], piece.into).reshape(target.shape))
