"""Which linears --target_regex gives an adapter."""

import re

from megaswift.config.tuner import TunerConfig
from megaswift.converters.check import SCORE
from megaswift.converters.peft_folder import fused_modules
from megaswift.converters.selection import saved_tensors, units_of
from megaswift.errors import ConfigError, listing
from megaswift.metadata.meta import ModelMeta


def whole_tensors(meta: ModelMeta, tuner: TunerConfig) -> frozenset[str]:
    """Return the tensors of the file that train whole beside adapters: those of --modules_to_save, and a head of scores.

    Raises ConfigError as saved_tensors() does, and where a module has an adapter as well.
    """
    head = frozenset({SCORE} if meta.scores else ())
    if not tuner.modules_to_save:
        return head
    saved, chosen = saved_tensors(meta, tuner.modules_to_save), adapted_modules(meta, tuner)
    targets = set(tuner.target_modules)
    for linear, tensors in fused_modules(meta).items():
        kinds = {name.removesuffix(".weight").rpartition(".")[2] for name in (linear, *tensors)}
        adapted = bool(targets & {*kinds, "all-linear"}) if chosen is None else linear in chosen
        if adapted and saved & set(tensors):
            raise ConfigError(
                f"modules_to_save has {listing(tensors)}, which get an adapter too. Take them out of modules_to_save or of "
                "target_modules."
            )
    return saved | head


def adapted_modules(meta: ModelMeta, tuner: TunerConfig) -> frozenset[str] | None:
    """Return the Megatron linears, by global name, that --target_regex means; None where --target_modules names them.

    The expression matches the whole name of a weight in the file, without .weight. That is what peft makes of a text as target_modules (0.21, tuners_utils.py, check_target_module_exists). Raises ConfigError
    where it matches nothing, something that can have no adapter, or one part of a Megatron linear or of a layer's experts.
    """
    expression = tuner.target_regex
    if expression is None:
        return None
    pattern = re.compile(expression)
    linears = fused_modules(meta)
    names = {tensor.removesuffix(".weight") for unit in units_of(meta) for tensor in unit.tensors}
    found = {name for name in names if pattern.fullmatch(name)}
    adaptable = {tensor.removesuffix(".weight") for tensors in linears.values() for tensor in tensors}
    if not found:
        raise ConfigError(
            f"target_regex={expression} matches no module of {meta.model_type}; it must match the whole name, such as "
            f"{min(adaptable)}."
        )
    if others := sorted(found - adaptable):
        raise ConfigError(
            f"target_regex={expression} matches {listing(others)}, which can have no adapter. Name linear modules of layers alone."
        )
    together: dict[
        str, dict[str, str]
    ] = {}  # what is adapted as a whole -> its modules of the file -> Megatron's
    for linear, tensors in linears.items():
        whole = re.sub(r"local_experts\.\d+", "local_experts", linear)
        together.setdefault(whole, {}).update((tensor.removesuffix(".weight"), linear) for tensor in tensors)
    for parts in together.values():
        if missing := [name for name in parts if name not in found]:
            if present := [name for name in parts if name in found]:
                raise ConfigError(
                    f"target_regex={expression} matches {listing(present)} without {listing(missing)}: Megatron keeps them in one "
                    "matrix, or they are experts of one layer. Match all of them, or none."
                )
    return frozenset(linear for parts in together.values() for name, linear in parts.items() if name in found)
