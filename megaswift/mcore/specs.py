"""Specs of modules as the versions of Megatron-Core write them."""

from functools import partial
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec


def submodules_of(spec: ModuleSpec | partial[Any]) -> Any:
    """Return what a module is made of, to be read or changed in place.

    Megatron-Core 0.16 writes a ModuleSpec everywhere; 0.19 writes a partial of the class, with the keyword `submodules`, for
    feed-forward parts, experts and their layers (gpt_layer_specs.py, moe_module_specs.py).
    """
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]
