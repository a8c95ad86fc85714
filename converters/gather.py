"""The whole model out of the shards of several ranks, as the tensors of its file, without touching a disk.

All ranks of a group compute each other's plans from ModelMeta, so that a shard travels without a word about it.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from megaswift.converters.adapter_rows import Adapted, adapter_rows, factor_shapes
from megaswift.converters.export import merged_weight, row_factors
from megaswift.converters.live import LiveParameter, as_matrix, live_parameters, rows_of
from megaswift.converters.plan import Parameter, Piece, file_tensors, float32_tensors, plan_chunk
from megaswift.converters.tensor_files import matrix_size
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout, coordinates


@torch.no_grad()
def stream_model(
    chunks: Sequence[torch.nn.Module],
    meta: ModelMeta,
    layout: Layout,
    rank: int,
    *,
    group: Any,
    dtype: torch.dtype,
    keep: bool,
    merge: bool = True,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the model's file by name where `keep` is true, on the device of the shards, and none elsewhere.

    `group` holds every part of the model; all its ranks call it alike and draw all of it. What moves: each shard once, broadcast
    in the group. Shards of the same parameter follow each other, so that few tensors are unfinished at a time. Adapters are
    merged in, or with `merge` false left out. Tensors have `dtype`, or float32 where files always do.
    """
    live = live_parameters(chunks, meta, layout, rank=rank)
    # DoRA's are found together by the ranks of tp, who each send their shards when it is their turn.
    factors = [row_factors(one) if merge else None for one in live]
    device = next(chunks[0].parameters()).device
    members = dist.get_process_group_ranks(group)
    shapes, in_float32 = file_tensors(meta), float32_tensors(meta)
    unfinished: dict[str, torch.Tensor] = {}
    missing = {name: prod(shape) for name, shape in shapes.items()}  # elements
    seen: set[tuple[Piece, ...]] = set()
    plans = (_plan(meta, layout, member) for member in members)
    for number, row in enumerate(zip_longest(*plans)):
        for member, planned in zip(members, row, strict=True):
            if planned is None or planned.is_copy or not planned.pieces or planned.pieces in seen:
                continue  # other ranks have the same
            seen.add(planned.pieces)
            sent = torch.float32 if planned.pieces[0].tensor in in_float32 else dtype
            if member == rank:
                one = live[number]
                weight = merged_weight(one, factors[number]) if merge else one.weight
                matrix_NC = as_matrix(weight.to(sent).contiguous())
            else:
                matrix_NC = as_matrix(torch.empty(planned.shape, dtype=sent, device=device))
            if len(members) > 1:
                dist.broadcast(
                    matrix_NC.view(torch.uint8), member, group=group
                )  # gloo does not know every dtype
            if not keep:
                continue
            for piece in planned.pieces:
                name = piece.tensor
                if name not in unfinished:
                    unfinished[name] = torch.empty(shapes[name], dtype=sent, device=device)
                _place(unfinished[name], piece, matrix_NC)
                missing[name] -= piece.size
                if not missing[name]:
                    yield name, unfinished.pop(name)
    assert not keep or not any(missing.values()), f"{[name for name in missing if missing[name]]} lack parts"


@torch.no_grad()
def stream_adapters(
    adapted: Sequence[LiveParameter],
    meta: ModelMeta,
    layout: Layout,
    rank: int,
    *,
    group: Any,
    pairs: Adapted,
    dtype: torch.dtype,
    device: torch.device,
    keep: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield A and B of each weight with an adapter under their names in a PEFT folder where `keep` is true, and none elsewhere.

    `adapted` are this rank's parameters, `pairs` those of the folder; `group` holds every part of the model; all its ranks call it alike
    and draw all of it. What moves: the parts of each rank once, broadcast in the group. Tensors have `dtype` and lie on `device`.
    """
    at, shapes, mine = coordinates(layout, rank), factor_shapes(pairs, meta), []
    for one in adapted:
        if not one.planned.is_copy:
            rank_in_file, blocks = pairs[one.planned.tensors[0]]
            mine += [
                (name, first, rows[..., : shapes[name][1]].reshape(-1, shapes[name][1]).to(dtype))
                for name, rows, first in adapter_rows(one, layout, at, rank=rank_in_file, blocks=blocks)
            ]
    whole = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items() if keep}
    for member in dist.get_process_group_ranks(group):
        index: list[Any] = [[(name, first, len(rows)) for name, first, rows in mine]]
        dist.broadcast_object_list(index, member, group=group)
        sizes = [number * shapes[name][1] for name, _, number in index[0]]
        if not sizes:
            continue
        if member == rank:
            parts = torch.cat([rows.flatten() for *_, rows in mine])
        else:
            parts = torch.empty(sum(sizes), dtype=dtype, device=device)
        dist.broadcast(parts.view(torch.uint8), member, group=group)  # gloo does not know every dtype
        if keep:
            for (name, first, number), part in zip(index[0], parts.split(sizes), strict=True):
                whole[name][first : first + number] = part.view(number, -1)
    yield from whole.items()


def _plan(meta: ModelMeta, layout: Layout, rank: int) -> list[Parameter]:
    at = coordinates(layout, rank)
    return [one for vp_rank in range(layout.vpp) for one in plan_chunk(meta, layout, at, vp_rank=vp_rank)]


def _place(tensor: torch.Tensor, piece: Piece, matrix_NC: torch.Tensor) -> None:
    """Copy a piece of a shard to where the file has it."""
    first, end = piece.cols
    if piece.slab is None:
        in_file_NC = tensor.view(matrix_size(tensor.shape))
    else:  # one of the matrices that the file packs transposed
        packed = tensor[piece.slab]
        in_file_NC = packed.T if packed.dim() == 2 else packed[:, None]
    target = rows_of(in_file_NC[:, first:end], piece.rows)
    target.copy_(rows_of(matrix_NC[:, : end - first], piece.into).reshape(target.shape))
