"""The proof that a conversion is total: no tensor of the file is lost or used twice, no parameter of any rank stays unfilled.

It walks the same plan as loading and exporting do, for all ranks of a layout at once, and reads no weights.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod

from megaswift.converters.plan import Parameter, Piece, file_tensors, plan_chunk
from megaswift.converters.stripes import Stripe
from megaswift.converters.table import Shard
from megaswift.converters.tensor_files import matrix_size
from megaswift.errors import WeightsError, listing
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Coordinates, Layout

Interval = tuple[int, int]  # half-open


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was proven about one model under one layout."""

    family: str
    layout: Layout
    num_tensors: int  # in the file
    num_parameters: int  # elements in the file
    num_shards: int  # Megatron parameters over all ranks of one replica
    largest_shard_elements: int


def certify(meta: ModelMeta, layout: Layout) -> Certificate:
    """Return the certificate of `meta` under `layout`; raises WeightsError listing every gap and overlap.

    Proven: the shards that are written hold each element of each file tensor exactly once; in each shard no two pieces
    overlap and what they leave free is padding of vocabulary or heads. Raises ConfigError where an axis does not divide.
    """
    tensors = file_tensors(meta)
    claims: dict[str, list[Piece]] = defaultdict(list)
    faults: list[str] = []
    num_shards, largest = 0, 0
    for where, parameter in _all_parameters(meta, layout):
        num_shards += 1
        largest = max(largest, prod(parameter.shape))
        if fault := _misfilled(parameter):
            faults.append(f"{parameter.name} on {where}: {fault}")
        if not parameter.is_copy:
            for piece in parameter.pieces:
                claims[_matrix_name(piece)].append(piece)
    packed = {piece.tensor for pieces in claims.values() for piece in pieces if piece.slab is not None}
    matrices = dict(_matrices(tensors, packed))
    faults += [f"{name}: no such tensor" for name in claims if name not in matrices]
    faults += _uncovered(matrices, claims)
    if faults:
        raise WeightsError(
            f"The weights of {meta.model_type} cannot be converted for this layout; {listing(faults)}. "
            "This is a fault of the family's table, not of the model; please report it."
        )
    return Certificate(
        family=meta.family,
        layout=layout,
        num_tensors=len(tensors),
        num_parameters=sum(prod(shape) for shape in tensors.values()),
        num_shards=num_shards,
        largest_shard_elements=largest,
    )


def _matrix_name(piece: Piece) -> str:
    return piece.tensor if piece.slab is None else f"{piece.tensor}[{piece.slab}]"


def _matrices(
    tensors: Mapping[str, tuple[int, ...]], packed: set[str]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors with their shapes; of those in `packed` each matrix, transposed."""
    for name, shape in tensors.items():
        if name in packed:
            yield from ((f"{name}[{slab}]", shape[:0:-1]) for slab in range(shape[0]))
        else:
            yield name, shape


def _all_parameters(meta: ModelMeta, layout: Layout) -> Iterator[tuple[str, Parameter]]:
    """Yield every distinct shard once: dense ones per (pp, tp), those of experts per (pp, ep, etp); copies left out."""
    expert_ranks = layout.ep * layout.etp if meta.moe else 0
    for pp_rank in range(layout.pp):
        for index in range(max(layout.tp, expert_ranks)):
            at = Coordinates(
                rank=0, pp=pp_rank, dp=0, cp=0, edp=0,
                tp=index % layout.tp, etp=index % layout.etp, ep=index // layout.etp % layout.ep,
            )  # fmt: skip
            for vp_rank in range(layout.vpp):
                for parameter in plan_chunk(meta, layout, at, vp_rank=vp_rank):
                    distinct, cut_rank = (expert_ranks, at.etp) if parameter.is_expert else (layout.tp, at.tp)
                    if index < distinct and (cut_rank == 0 or parameter.shard is not Shard.NONE):
                        yield f"pp {pp_rank} tp {at.tp} ep {at.ep} etp {at.etp}", parameter


def _misfilled(parameter: Parameter) -> str:
    """Return what is wrong with a shard whose pieces overlap, or leave free what is not padding; '' if nothing is."""
    if fault := _misplaced(tuple(piece.into for piece in parameter.pieces), parameter.shape[0]):
        return fault
    if parameter.free and not parameter.allows_padding:
        return f"{parameter.free} elements stay unfilled"
    return ""


@lru_cache(maxsize=1024)  # layers and experts are cut alike
def _misplaced(stripes: tuple[Stripe, ...], num_rows: int) -> str:
    rows = sorted(interval for stripe in stripes for interval in stripe.intervals())
    if any(begin < end for (_, end), (begin, _) in pairwise(rows)):
        return "two tensors share rows"
    if rows and rows[-1][1] > num_rows:
        return f"rows up to {rows[-1][1]} of {num_rows} are filled"
    return ""


def _uncovered(tensors: Mapping[str, tuple[int, ...]], claims: Mapping[str, list[Piece]]) -> Iterator[str]:
    for name, shape in tensors.items():
        claimed = tuple((piece.cols, piece.rows) for piece in claims.get(name, ()))
        yield from (f"{name} {list(shape)}: {gap}" for gap in _gaps(matrix_size(shape), claimed))


@lru_cache(maxsize=1024)  # layers and experts are cut alike
def _gaps(size: tuple[int, int], claimed: tuple[tuple[Interval, Stripe], ...]) -> tuple[str, ...]:
    """Return what the claimed (columns, rows) leave out of a matrix, or hold twice."""
    by_cols: dict[Interval, list[Interval]] = defaultdict(list)
    for cols, rows in claimed:
        by_cols[cols] += rows.intervals()
    gaps = [] if _is_partition(by_cols, size[1]) else [f"columns {sorted(by_cols)} are claimed"]
    for cols, intervals in by_cols.items():
        if not _is_partition(intervals, size[0]):
            gaps.append(f"rows {sorted(intervals)} of columns {cols} are claimed")
    return tuple(gaps)


def _is_partition(intervals: Iterable[Interval], size: int) -> bool:
    """Whether the intervals cover 0..size without a gap or an overlap."""
    end = 0
    for begin, stop in sorted(intervals):
        if begin != end:
            return False
        end = stop
    return end == size
