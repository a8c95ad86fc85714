"""What a PEFT folder says of adapters: which tensors it holds, whose rows a rank has, and its adapter_config.json."""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megaswift.config.tuner import TunerConfig
from megaswift.converters.export import gather_columns, tensor_rank
from megaswift.converters.live import LiveParameter, rows_of
from megaswift.converters.lora_targets import adapted_modules
from megaswift.converters.output_folder import gathered
from megaswift.converters.peft_folder import factor_names, fused_modules, magnitude_name
from megaswift.converters.plan import file_tensors
from megaswift.converters.table import Shard
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Coordinates, Layout

# By tensor of the base model: the rank of its pair in the folder, and whether it takes a block of its own of a stacked module.
Adapted = Mapping[str, tuple[int, bool]]


@dataclass(frozen=True, kw_only=True)
class _Modules:
    """What every rank must know of the others' modules to compute the same file."""

    kinds: frozenset[str]  # linear_qkv, ...
    ranks: Mapping[str, int]  # by first tensor, where it is not the usual rank
    mixed: frozenset[str]  # by first tensor: stacked modules whose B is no longer block-diagonal

    def rank_and_blocks(self, tensors: Sequence[str], usual: int) -> tuple[int, bool]:
        """Return the rank of each weight's pair in the file, and whether weight i takes block i of the module's."""
        rank = self.ranks.get(tensors[0], usual)
        if len(tensors) > 1 and rank == len(tensors) * usual and tensors[0] not in self.mixed:
            return usual, True
        return rank, False


def adapted_tensors(
    live: Sequence[LiveParameter], meta: ModelMeta, layout: Layout, tuner: TunerConfig
) -> Adapted:
    """Return what has an adapter, given this rank's adapted parameters; every rank of the world calls it and gets the same."""
    modules, chosen = _agree_on_modules(live, layout, usual=tuner.lora_rank), adapted_modules(meta, tuner)
    return {
        tensor: modules.rank_and_blocks(tensors, tuner.lora_rank)
        for name, tensors in fused_modules(meta).items()
        if name.rpartition(".")[2] in modules.kinds and (chosen is None or name in chosen)
        for tensor in tensors
    }


def factor_shapes(adapted: Adapted, meta: ModelMeta) -> dict[str, tuple[int, int]]:
    """Return the shape of every A and B by its name in the folder."""
    shapes = file_tensors(meta)
    return {
        name: shape
        for tensor, (rank, _) in adapted.items()
        for name, shape in zip(
            factor_names(module_of(tensor)),
            ((rank, shapes[tensor][1]), (shapes[tensor][0], rank)),
            strict=True,
        )
    }


def _agree_on_modules(live: Sequence[LiveParameter], layout: Layout, *, usual: int) -> _Modules:
    """Return what is true of all ranks' modules; every rank of the world calls it."""
    ranks = {one.planned.tensors[0]: len(one.adapted_module.lora_a()) for one in live}  # type: ignore[union-attr]  # filtered
    mixed = {
        one.planned.tensors[0]
        for one in live
        if ranks[one.planned.tensors[0]] == len(one.planned.tensors) * usual and _is_mixed(one, usual)
    }
    own = _Modules(
        kinds=frozenset(one.planned.name.split(".")[-2] for one in live),
        ranks={tensor: rank for tensor, rank in ranks.items() if rank != usual},
        mixed=frozenset(mixed),
    )
    everyone = gathered(own, world=layout.world)
    return _Modules(
        kinds=frozenset().union(*(one.kinds for one in everyone)),
        ranks={tensor: rank for one in everyone for tensor, rank in one.ranks.items()},
        mixed=frozenset().union(*(one.mixed for one in everyone)),
    )


def _is_mixed(parameter: LiveParameter, usual: int) -> bool:
    """Whether some weight of a stacked module uses more than its own block of A."""
    b_FR: torch.Tensor = parameter.adapted_module.lora_b().detach()  # type: ignore[union-attr]  # the caller has seen it
    for piece in parameter.planned.pieces:
        own = parameter.planned.tensors.index(piece.tensor) * usual
        rows = rows_of(b_FR, piece.into)
        if rows[..., :own].any() or rows[..., own + usual :].any():
            return True
    return False


def adapter_rows(
    parameter: LiveParameter, layout: Layout, at: Coordinates, *, rank: int, blocks: bool
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield (tensor, rows, first row) of what this rank writes of one module; every rank of its tp group calls it."""
    planned, module = parameter.planned, parameter.adapted_module
    assert module is not None, f"{planned.name} has no adapter"
    is_first = tensor_rank(planned, layout, at)[0] == 0
    a_RD, b_FR = module.lora_a().detach(), module.lora_b().detach()
    magnitude_F1 = None if module.lora_magnitude is None else module.lora_magnitude.weight.data[:, None]
    if planned.shard is Shard.DIM1:
        a_RD = gather_columns(a_RD, planned, layout, at)
    for number, tensor in enumerate(planned.tensors):
        name_a, name_b = factor_names(module_of(tensor))
        own = slice(number * rank, (number + 1) * rank) if blocks else slice(0, rank)
        if is_first:
            yield name_a, a_RD[own], 0
            if planned.shard is Shard.DIM1:
                yield name_b, b_FR[:, own], 0
                if magnitude_F1 is not None:
                    yield magnitude_name(module_of(tensor)), magnitude_F1, 0
        if planned.shard is not Shard.DIM1:
            for piece in planned.pieces:
                if piece.tensor == tensor:
                    yield name_b, rows_of(b_FR[:, own], piece.into), piece.rows.start
                    if magnitude_F1 is not None:
                        first = piece.rows.start
                        yield magnitude_name(module_of(tensor)), rows_of(magnitude_F1, piece.into), first


def module_of(tensor: str) -> str:
    """Return the name of the module that has a tensor of the file."""
    return tensor.removesuffix(".weight").removesuffix(".bias")


def config_json(
    adapted: Adapted,
    tuner: TunerConfig,
    *,
    base_model: str,
    scores: bool = False,
    saved: Collection[str] = (),
) -> str:
    """Return the text of adapter_config.json; a pair of another rank keeps the scale by an alpha of its own."""
    others = {module_of(tensor): r for tensor, (r, _) in adapted.items() if r != tuner.lora_rank}
    ratio = (
        (lambda r: math.sqrt(r / tuner.lora_rank)) if tuner.use_rslora else (lambda r: r / tuner.lora_rank)
    )
    targets = {module_of(tensor) for tensor in adapted}
    if tuner.target_regex is None:
        targets = {name.rpartition(".")[2] for name in targets}
    has_experts = any(".experts." in tensor for tensor in adapted)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scores else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": tuner.lora_rank,
        "lora_alpha": tuner.lora_alpha,
        # peft keeps experts packed and refuses dropout there, even on opening (ParamWrapper, 0.21); it only acts in training.
        "lora_dropout": 0.0 if has_experts else tuner.lora_dropout,
        "use_rslora": tuner.use_rslora,
        "use_dora": tuner.use_dora,
        "rank_pattern": others,
        "alpha_pattern": {module: tuner.lora_alpha * ratio(r) for module, r in others.items()},
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": sorted(saved) or None,
    }
    return json.dumps(config, indent=2) + "\n"
