"""Which bytes of which file tensors make up each parameter of a rank: computed from ModelMeta and Layout alone, no torch.

Loading, exporting, the certificate and the offline converter all walk the same plan, so they cannot disagree.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megaswift.converters.stripes import Stripe, block
from megaswift.converters.table import FACTS, Place, Row, Shard, Sizes, Table
from megaswift.converters.tables.catalogue import TABLES
from megaswift.errors import ConfigError, ModelError, nearest
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Coordinates, Layout, chunk_layers

TIED_OUTPUT = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"
FILE_BUFFERS = (
    "expert_bias",
    "layer_scalar",
)  # not trained by gradients, but part of the model and its files


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rectangle of one file tensor and the rows of the parameter that hold it, in the same order."""

    tensor: str
    rows: Stripe  # of the file tensor, seen as [dim 0, the rest]
    cols: tuple[int, int]  # half-open
    into: Stripe  # rows of the parameter; its columns are the first ones
    slab: int | None = None  # the file tensor packs matrices transposed, and this is the one meant

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows.rows * (self.cols[1] - self.cols[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a model chunk on one rank. What no piece fills is padding of vocabulary or heads, zero."""

    name: str  # as in the chunk built from Megatron's local spec; layer and expert indices are local
    shape: tuple[int, ...]
    tensors: tuple[str, ...]  # of the file that the whole parameter holds, in the order of stacking
    pieces: tuple[Piece, ...]  # of them that this rank holds
    shard: Shard
    is_expert: bool = False
    is_copy: bool = False  # another stage's parameter owns the bytes in the file
    allows_padding: bool = False  # tp does not divide the vocabulary or the heads
    is_paddable: bool = False  # for some tp

    @property
    def elements(self) -> int:
        """Elements on this rank."""
        return math.prod(self.shape)

    @property
    def free(self) -> int:
        """Elements that hold nothing of the file."""
        return self.elements - sum(piece.size for piece in self.pieces)


def table_for(meta: ModelMeta) -> Table:
    """Return the family's table; raises ModelError where there is none."""
    if meta.family not in TABLES:
        raise ModelError(f"family={meta.family} has no table of weights.{nearest(meta.family, TABLES)}")
    return TABLES[meta.family]


def file_tensors(meta: ModelMeta) -> dict[str, tuple[int, ...]]:
    """Return every tensor that a checkpoint of this model holds, with its shape, in the order of the model."""
    table, sizes = table_for(meta), Sizes.of_layers(meta, tp=1)
    shapes: dict[tuple[Row, Sizes], tuple[tuple[int, ...], ...]] = {}
    tensors: dict[str, tuple[int, ...]] = {}
    for row, layer, expert in _whole_model(meta):
        kind = row, sizes[layer]
        if kind not in shapes:
            shapes[kind] = row.tensor_shapes(sizes[layer].real)
        tensors |= zip(_tensor_names(table, row, layer, expert), shapes[kind], strict=True)
    return tensors


def float32_tensors(meta: ModelMeta) -> frozenset[str]:
    """Return the tensors that files hold in float32 whatever the dtype of the weights."""
    table = table_for(meta)
    return frozenset(
        name
        for row, layer, expert in _whole_model(meta)
        if row.float32
        for name in _tensor_names(table, row, layer, expert)
    )


def linear_tensors(meta: ModelMeta) -> dict[str, tuple[str, ...]]:
    """Return the weights of the layers' linears by the Megatron parameter that holds them, with the layer's and expert's number.

    They are what tensor-parallel ranks cut: neither norms nor routers, embedding or output layer.
    """
    table = table_for(meta)
    return {
        f"{row.megatron} {layer} {expert}": _tensor_names(table, row, layer, expert)
        for row, layer, expert in _whole_model(meta)
        if row.place not in (Place.FIRST, Place.LAST)
        and row.shard is not Shard.NONE
        and len(row.shapes.split(",")[0].split()) == 2
    }


def rows_of_model(meta: ModelMeta) -> Iterator[tuple[Row, int, tuple[str, ...], int]]:
    """Yield (row, layer, its tensors of the file, elements) of every Megatron parameter, in the order of the model."""
    table, sizes = table_for(meta), Sizes.of_layers(meta, tp=1)
    for row, layer, expert in _whole_model(meta):
        elements = sum(math.prod(shape) for shape in row.part_shapes(sizes[layer].real))
        yield row, layer, _tensor_names(table, row, layer, expert), elements


def is_carried(meta: ModelMeta, name: str) -> bool:
    """Whether a tensor of the file goes through untouched: one of a multi-token-prediction layer.

    They are not trained, as in transformers (5.23, models/deepseek_v3, _keys_to_ignore_on_load_unexpected).
    """
    table = table_for(meta)
    if table.mtp_prefix is not None:
        return meta.num_mtp_layers > 0 and name.startswith(table.mtp_prefix)
    before, after = table.layer_prefix.split("#")
    found = re.match(f"{re.escape(before)}(\\d+){re.escape(after)}", name)
    return found is not None and meta.num_layers <= int(found[1]) < meta.num_layers + meta.num_mtp_layers


def _whole_model(meta: ModelMeta) -> Iterator[tuple[Row, int, int]]:
    """Yield (row, layer, expert) of one rank that holds everything: its pieces are whole tensors."""
    layers, experts = range(meta.num_layers), range(_num_experts(meta))
    for row, layer, expert, _ in _walk(table_for(meta), meta, layers, experts, first=True, last=True):
        yield row, layer, expert


def plan_chunk(meta: ModelMeta, layout: Layout, at: Coordinates, *, vp_rank: int = 0) -> list[Parameter]:
    """Return the parameters of one model chunk of the rank at `at`.

    Ranks that differ only in dp and cp get equal plans; ranks that differ in tp or etp get the same names in the same
    order. Raises ConfigError where an axis does not divide what it shards.
    """
    table, sizes = table_for(meta), Sizes.of_layers(meta, tp=layout.tp)
    layers = chunk_layers(layout, meta.num_layers, pp_rank=at.pp, vp_rank=vp_rank)
    num_experts = _num_experts(meta)
    if num_experts % layout.ep:
        raise ConfigError(
            f"ep={layout.ep} does not divide num_experts={num_experts} ({meta.model_type}). Choose an ep that does."
        )
    per_rank = num_experts // layout.ep
    experts = range(at.ep * per_rank, (at.ep + 1) * per_rank)
    first = at.pp == 0 and vp_rank == 0
    last = at.pp == layout.pp - 1 and vp_rank == layout.vpp - 1

    parameters = []
    cuts: dict[tuple[Row, int, Sizes], _Cut] = {}  # the same in every layer of these sizes and expert
    for row, layer, expert, name in _walk(table, meta, layers, experts, first=first, last=last):
        index, parts = (at.etp, layout.etp) if row.place is Place.EXPERT else (at.tp, layout.tp)
        packed_at = expert if row.is_packed else 0
        kind = row, packed_at, sizes[layer]
        if kind not in cuts:
            cuts[kind] = _cut(row, sizes[layer], index=index, parts=parts, packed_at=packed_at)
        tensors = _tensor_names(table, row, layer, expert)
        parameters.append(_parameter(row, cuts[kind], name, tensors))
    if meta.tied_embeddings and last and not first:
        row = next(row for row in table.rows if row.megatron == EMBEDDING)
        cut = _cut(row, sizes[-1], index=at.tp, parts=layout.tp)
        parameters.append(_parameter(row, cut, TIED_OUTPUT, row.tensors, is_copy=True))
    return parameters


def _num_experts(meta: ModelMeta) -> int:
    return meta.moe.num_experts if meta.moe else 0


def _walk(
    table: Table, meta: ModelMeta, layers: range, experts: range, *, first: bool, last: bool
) -> Iterator[tuple[Row, int, int, str]]:
    """Yield (row, global layer, global expert, Megatron name with local indices), in the order of the model."""
    rows = [row for row in table.rows if FACTS[row.when](meta)]
    for row in rows:
        if row.place is Place.FIRST and first:
            yield row, 0, 0, row.megatron
    for local_layer, layer in enumerate(layers):
        is_moe = meta.moe is not None and meta.moe.layer_is_moe[layer]
        is_delta = meta.linear_attention is not None and meta.linear_attention.layers[layer]
        here = {
            Place.LAYER,
            Place.MOE if is_moe else Place.DENSE,
            Place.DELTA if is_delta else Place.SOFTMAX,
            *_projections(meta, layer),
        }
        prefix = f"decoder.layers.{local_layer}."
        for row in rows:
            if row.place in here:
                yield row, layer, 0, prefix + row.megatron
            elif row.place is Place.EXPERT and is_moe:
                for local_expert, expert in enumerate(experts):
                    yield row, layer, expert, prefix + row.megatron.replace("#", str(local_expert))
    for row in rows:
        if row.place is Place.LAST and last:
            yield row, 0, 0, row.megatron


def _projections(meta: ModelMeta, layer: int) -> tuple[Place, ...]:
    varied = meta.layer_variation
    if varied is not None and varied.kv_from_layer[layer] is not None:
        return (Place.NO_KEYS,)
    value_is_key = varied is not None and varied.value_is_key[layer]
    return Place.KEYS, Place.NO_VALUES if value_is_key else Place.VALUES


def is_unread(meta: ModelMeta, name: str) -> bool:
    """Whether a tensor of the file is of keys and values in a layer that takes those of an earlier one.

    Files of Gemma 4 have them, and transformers drops them (5.23, modeling_gemma4.py, _keys_to_ignore_on_load_unexpected).
    """
    varied, (before, after) = meta.layer_variation, table_for(meta).layer_prefix.split("#")
    found = re.match(f"{re.escape(before)}(\\d+){re.escape(after)}self_attn\\.[kv]_(proj|norm)\\.", name)
    return (
        found is not None
        and varied is not None
        and int(found[1]) < meta.num_layers
        and varied.kv_from_layer[int(found[1])] is not None
    )


def _tensor_names(table: Table, row: Row, layer: int, expert: int) -> tuple[str, ...]:
    if row.place in (Place.FIRST, Place.LAST):
        return row.tensors
    prefix = table.layer_prefix.replace("#", str(layer))
    return tuple(prefix + pattern.replace("#", str(expert)) for pattern in row.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """What one shard of a row is in every layer and expert."""

    shape: tuple[int, ...]
    cols: tuple[int, int]
    parts: tuple[tuple[int, Stripe, Stripe], ...]  # which of the row's tensors, its rows, the shard's rows
    slab: int | None
    allows_padding: bool


def _cut(row: Row, sizes: Sizes, *, index: int, parts: int, packed_at: int = 0) -> _Cut:
    """Return the index-th of `parts` shards of one row; `packed_at` is its place where the file packs those of all experts."""
    real, padded = (
        [shape or (1,) for shape in row.part_shapes(some)] for some in (sizes.real, sizes.padded)
    )  # a number without dimensions is a parameter of one row
    if row.transposed and parts > 1:
        raise ConfigError(
            f"etp={parts} cuts {row.megatron}, which the file holds transposed ({row.file}). Choose etp=1."
        )
    cut_rows, cut_cols = row.shard is Shard.DIM0, row.shard is Shard.DIM1
    units = sizes.padded[row.per] if row.per else parts if cut_rows else 1
    share = (index, parts) if cut_rows else (0, 1)
    try:
        num_rows, rows = _share_rows([s[0] for s in real], [s[0] for s in padded], units=units, share=share)
        num_cols, cols = 1, (0, 1)
        if len(real[0]) > 1:
            num_cols, cols = _share_cols(
                math.prod(real[0][1:]), math.prod(padded[0][1:]), share=(index, parts) if cut_cols else (0, 1)
            )
    except _DoesNotDivideError as error:
        axis = "etp" if row.place is Place.EXPERT else "tp"
        raise ConfigError(
            f"{axis}={parts} does not cut {row.megatron} evenly: {error}. Choose another size."
        ) from None
    holders, heights = row.holders(len(real)), [shape[0] for shape in real]
    head = sizes.real["K"]
    return _Cut(
        shape=(num_rows, num_cols) if len(real[0]) == 2 else (num_rows, *real[0][1:]),
        cols=cols,
        parts=tuple(
            (
                holders[part],
                _in_file(row, part, start, run.rows, heights, packed_at=packed_at, head=head),
                run,
            )
            for part, (first, into) in enumerate(rows)
            if into.rows and cols[1] > cols[0]  # a rank may hold nothing but padding
            for start, run in _runs(row, first, into, head=head)
        ),
        slab=packed_at if row.transposed else None,
        allows_padding=real != padded,
    )


def _parameter(
    row: Row, cut: _Cut, name: str, tensors: tuple[str, ...], *, is_copy: bool = False
) -> Parameter:
    """Return one layer's, or one expert's, shard of a row."""
    return Parameter(
        name=name,
        shape=cut.shape,
        tensors=tensors,
        pieces=tuple(
            Piece(tensor=tensors[number], rows=rows, cols=cut.cols, into=into, slab=cut.slab)
            for number, rows, into in cut.parts
        ),
        shard=row.shard,
        is_expert=row.place is Place.EXPERT,
        is_copy=is_copy,
        allows_padding=cut.allows_padding,
        is_paddable=row.is_paddable,
    )


def _runs(row: Row, first: int, into: Stripe, *, head: int) -> list[tuple[int, Stripe]]:
    """Return (first row of its part, rows of the parameter) of the runs that lie together in the file."""
    if not row.by_head:
        return [(first, into)]
    if first % head or into.width % head:
        raise ConfigError(
            f"tp cuts {row.megatron} within a head, and {row.file} keeps parts of a head together. Choose tp up to the "
            "number of key/value heads."
        )
    begins = (begin for low, high in into.intervals() for begin in range(low, high, head))
    return [(first + number * head, block(begin, head)) for number, begin in enumerate(begins)]


def _in_file(
    row: Row, part: int, first: int, count: int, heights: list[int], *, packed_at: int, head: int
) -> Stripe:
    """Return where the rows of one part of a stack lie in the tensor that holds them."""
    holders = row.holders(len(heights))
    together = [other for other, holder in enumerate(holders) if holder == holders[part]]
    place = together.index(part)
    if row.interleaved:
        return Stripe(first * len(together) + place, count, len(together), 1)
    if row.by_head:
        return block((first // head * len(together) + place) * head, count)
    above = sum(heights[other] for other in together[:place])
    height = sum(heights[other] for other in together)
    return block((0 if row.transposed else packed_at * height) + above + first, count)


class _DoesNotDivideError(Exception):
    """A size and what fails to divide it."""


def _divide(size: int, by: int) -> int:
    if size % by:
        raise _DoesNotDivideError(f"{by} does not divide {size}")
    return size // by


def _share_cols(real: int, padded: int, *, share: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Return the columns of one share of `padded`, and which columns of the file, half-open, they begin with."""
    index, parts = share
    size = _divide(padded, parts)
    return size, (min(index * size, real), min((index + 1) * size, real))


def _share_rows(
    real: list[int], padded: list[int], *, units: int, share: tuple[int, int]
) -> tuple[int, list[tuple[int, Stripe]]]:
    """Return the rows of one share of the stacked tensors, and for each tensor its first row there and where its rows go.

    The whole stack is `units` times [a slice of each tensor]; a share is a contiguous part of it: whole units, or part
    of one unit where there are more ranks than kv groups (Megatron then gathers the unit in its forward pass).
    """
    index, parts = share
    widths = [_divide(rows, units) for rows in padded]
    pitch = sum(widths)
    size = _divide(units * pitch, parts)
    unit, offset = divmod(index * size, pitch)
    placed = []
    for number, width in enumerate(widths):
        start = sum(widths[:number])
        if size >= pitch:
            runs, first = _divide(size, pitch), unit * width
            count = max(0, min(runs * width, real[number] - first))
            into = Stripe(start, count // width, pitch, width) if runs > 1 else block(start, count)
        else:
            _divide(pitch, size)
            low, high = max(offset, start), min(offset + size, start + width)
            first, into = unit * width + low - start, block(low - offset, max(0, high - low))
        placed.append((first, into))
    return size, placed
