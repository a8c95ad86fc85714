"""Which tensors of a model's file train, as --freeze_parameters and its like choose them. No torch.

The order is ms-swift's (4.6.0.dev0, swift/utils/transformers_utils.py): everything trains; the share, the prefixes and the
expression freeze; then prefixes and an expression open again. A prefix is the start of a name, an expression is found anywhere
in it.
"""

import re
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from megaswift.config.freeze import FreezeConfig
from megaswift.converters.plan import EMBEDDING, FILE_BUFFERS, TIED_OUTPUT, rows_of_model, table_for
from megaswift.converters.table import Place, Row
from megaswift.errors import ConfigError, listing, nearest
from megaswift.metadata.meta import ModelMeta


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What trains as a whole or not at all: a Megatron parameter, or those of all experts of a layer, which are one product."""

    name: str  # Megatron's; layers are counted over all ranks
    tensors: tuple[str, ...]  # of the file
    place: Place
    layer: int
    elements: int
    is_matrix: bool

    @property
    def module(self) -> str:
        """The module that has the parameter."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Elements:
    """How many elements of a model train, by part."""

    layers: tuple[int, ...]  # of each layer, outside its experts
    experts: tuple[int, ...]  # of each layer's experts
    embedding: int
    head: int  # where it is not the embedding
    final_norm: int
    other: int

    @property
    def total(self) -> int:
        """Elements of the whole model that train."""
        ends = self.embedding + self.head + self.final_norm + self.other
        return sum(self.layers) + sum(self.experts) + ends


def trained_tensors(meta: ModelMeta, chosen: FreezeConfig) -> frozenset[str]:
    """Return the tensors of the file that train.

    Raises ConfigError for a pattern that nothing matches, for parts of one Megatron parameter of which some train and some
    do not, for a bias without its matrix, and where nothing is left to train.
    """
    units = units_of(meta)
    frozen = _lowest(units, chosen.freeze_parameters_ratio)
    for flag, pattern in _patterns(chosen, "freeze_parameters"):
        frozen |= _matching(units, meta, flag, pattern)
    for flag, pattern in _patterns(chosen, "trainable_parameters"):
        frozen -= _matching(units, meta, flag, pattern)
    for unit in units:
        _check_whole(unit, frozen)
    trained = frozenset(tensor for unit in units for tensor in unit.tensors) - frozen
    if not trained:
        raise ConfigError(
            "freeze_parameters leaves nothing to train. Freeze less, or name --trainable_parameters."
        )
    matrices = {unit.module: unit for unit in units if unit.is_matrix}
    for unit in units:
        matrix = matrices.get(unit.module)
        if unit.name.endswith(".bias") and matrix and unit.tensors[0] in trained:
            _check_matrix_trains(unit, matrix, trained)
    return trained


def trained_elements(meta: ModelMeta, chosen: FreezeConfig) -> Elements:
    """Return how many elements train in full training; raises ConfigError as trained_tensors() does."""
    return elements_of(meta, trained_tensors(meta, chosen))


def drawn_elements(meta: ModelMeta, layers: int) -> Elements:
    """Return how many elements train on average where so many of the layers are drawn at random, beside all that is no layer."""
    everything, there = trained_elements(meta, FreezeConfig()), meta.num_layers
    return replace(
        everything,
        layers=tuple(count * layers // there for count in everything.layers),
        experts=tuple(count * layers // there for count in everything.experts),
    )


def elements_of(meta: ModelMeta, trained: Collection[str]) -> Elements:
    """Return how many elements the Megatron parameters have that hold these tensors of the file."""
    layers, experts = [0] * meta.num_layers, [0] * meta.num_layers
    ends = dict.fromkeys(("embedding", "head", "final_norm", "other"), 0)
    for unit in units_of(meta):
        if unit.tensors[0] not in trained:
            continue
        if unit.place is Place.EXPERT:
            experts[unit.layer] += unit.elements
        elif unit.place not in (Place.FIRST, Place.LAST):
            layers[unit.layer] += unit.elements
        else:
            ends[_end(unit)] += unit.elements
    return Elements(
        layers=tuple(layers),
        experts=tuple(experts),
        embedding=ends["embedding"],
        head=ends["head"],
        final_norm=ends["final_norm"],
        other=ends["other"],
    )


def _end(unit: Unit) -> str:
    if unit.name == EMBEDDING:
        return "embedding"
    return {"output_layer": "head", "decoder.final_layernorm": "final_norm"}.get(unit.module, "other")


def units_of(meta: ModelMeta) -> list[Unit]:
    """Return what can train, in the order of the model; what no gradient changes is not among it."""
    found: dict[str, tuple[Row, int, list[str], list[int]]] = {}
    for row, layer, tensors, elements in rows_of_model(meta):
        if row.megatron.rpartition(".")[2] in FILE_BUFFERS:
            continue
        at_end = row.place in (Place.FIRST, Place.LAST)
        name = row.megatron if at_end else f"decoder.layers.{layer}.{row.megatron}"
        _, _, names, counts = found.setdefault(name, (row, layer, [], []))
        names.extend(tensors)
        counts.append(elements)
    return [
        Unit(
            name=name,
            tensors=tuple(dict.fromkeys(tensors)),
            place=row.place,
            layer=layer,
            elements=sum(counts),
            is_matrix=len(row.shapes.split(",")[0].split()) == 2,
        )
        for name, (row, layer, tensors, counts) in found.items()
    ]


def _lowest(units: list[Unit], share: float) -> set[str]:
    """Return the tensors of the first modules that together have at most this share of the elements."""
    modules: dict[str, list[Unit]] = {}
    for unit in units:
        modules.setdefault(unit.module, []).append(unit)
    heights = list(accumulate(sum(unit.elements for unit in module) for module in modules.values()))
    lowest = list(modules.values())[: bisect_right(heights, int(heights[-1] * share))]
    return {tensor for module in lowest for unit in module for tensor in unit.tensors}


def _patterns(chosen: FreezeConfig, flag: str) -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield (what the user wrote, expression) of the prefixes of `flag` and of its expression."""
    prefixes: list[str] = getattr(chosen, flag)
    for prefix in prefixes:
        yield f"{flag}={prefix}", re.compile("^" + re.escape(prefix))
    expression: str | None = getattr(chosen, f"{flag}_regex")
    if expression is not None:
        yield f"{flag}_regex={expression}", re.compile(expression)


def _matching(units: list[Unit], meta: ModelMeta, asked: str, pattern: re.Pattern[str]) -> set[str]:
    """Return the tensors whose name matches, or else those of the Megatron parameters whose name does."""
    names = _names(units, meta)
    found = {tensor for name, tensor in names.items() if pattern.search(name)}
    found = found or {tensor for unit in units if pattern.search(unit.name) for tensor in unit.tensors}
    if not found:
        written = asked.partition("=")[2]
        modules = {name.removesuffix(".weight") for name in names}
        raise ConfigError(
            f"{asked} matches no tensor of {meta.model_type}.{nearest(written, modules)} Names are those in the safetensors, such "
            f"as {units[0].tensors[0]} and {units[1].tensors[0]}."
        )
    return found


def _names(units: list[Unit], meta: ModelMeta) -> dict[str, str]:
    """Return name -> tensor of the file; a tied matrix has the output layer's name too."""
    names = {tensor: tensor for unit in units for tensor in unit.tensors}
    twin = output_twin(meta)
    return names if twin is None else {**names, twin[1]: twin[0]}


def output_twin(meta: ModelMeta) -> tuple[str, str] | None:
    """Return the name of a matrix that is the embedding and the output layer, and its other name; None where there is none."""
    if not meta.tied_embeddings or meta.scores is not None:
        return None
    files = {row.megatron: row.file for row in table_for(meta).rows}
    return files[EMBEDDING], files[TIED_OUTPUT]


def saved_tensors(meta: ModelMeta, modules: Collection[str]) -> frozenset[str]:
    """Return the tensors of the file that are in `modules`, as peft finds those of modules_to_save: by the end of a module's name.

    A module is one of another that has it (peft 0.21, utils/other.py, _set_trainable). Raises ConfigError for a name that nothing
    ends in, for routers and experts, and for a part of a Megatron parameter.
    """
    units, found = units_of(meta), set[str]()
    names = _names(units, meta)
    for module in modules:
        there = {
            tensor
            for name, tensor in names.items()
            if any(one.endswith(module) for one in _modules_above(name))
        }
        if not there:
            known = {one.rpartition(".")[2] for name in names for one in _modules_above(name)}
            raise ConfigError(
                f"modules_to_save={module} is no module of {meta.model_type}.{nearest(module, known)}"
            )
        found |= there
    for unit in units:
        present = [tensor for tensor in unit.tensors if tensor in found]
        if present and unit.place in (Place.MOE, Place.EXPERT):
            raise ConfigError(
                f"modules_to_save is not built for {listing(present)}: transformers packs experts under other names. Leave them out."
            )
        if present and len(present) < len(unit.tensors):
            rest = [tensor for tensor in unit.tensors if tensor not in found]
            raise ConfigError(
                f"modules_to_save has {listing(present)} without {listing(rest)}: Megatron keeps them in one matrix ({unit.name}). "
                "Name all of them, or none."
            )
    return frozenset(found)


def _modules_above(tensor: str) -> list[str]:
    """Return the names of the modules that a tensor is in: a, a.b and a.b.c of a.b.c.weight."""
    parts = tensor.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _check_whole(unit: Unit, frozen: set[str]) -> None:
    parts = [tensor for tensor in unit.tensors if tensor in frozen]
    if parts and len(parts) < len(unit.tensors):
        rest = [tensor for tensor in unit.tensors if tensor not in frozen]
        why = (
            "the experts of a layer are one product"
            if unit.place is Place.EXPERT
            else f"Megatron keeps them in one matrix ({unit.name})"
        )
        raise ConfigError(
            f"freeze_parameters freezes {listing(parts)} without {listing(rest)}: {why}. Freeze all of them, or none."
        )


def _check_matrix_trains(bias: Unit, matrix: Unit, trained: frozenset[str]) -> None:
    if matrix.tensors[0] not in trained:
        raise ConfigError(
            f"freeze_parameters leaves {listing(bias.tensors)} to train without {listing(matrix.tensors)}: the gradient of a "
            "linear's bias is computed with that of its matrix. Train both, or freeze both."
        )
