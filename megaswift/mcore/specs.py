"""Specs of modules as the versions of Megatron-Core write them."""

from functools import partial, partialmethod
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec


def submodules_of(spec: ModuleSpec | partial[Any]) -> Any:
    """Return what a module is made of, to be read or changed in place.

    Megatron-Core 0.16 writes a ModuleSpec everywhere; 0.19 writes a partial of the class, with the keyword `submodules`, for
    feed-forward parts, experts and their layers (gpt_layer_specs.py, moe_module_specs.py).
    """
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]


def as_subclass(spec: ModuleSpec | partial[Any], module: type, **params: Any) -> type | partial[Any]:
    """Return how a feed-forward part of the class `module` is built, a subclass of what `spec` builds with more parameters."""
    if not isinstance(spec, ModuleSpec):
        return partial(module, *spec.args, **{**spec.keywords, **params})
    # Of a ModuleSpec with a class that it does not know 0.16 warns once a layer; a class it takes as it is.
    given = {**spec.params, "submodules": spec.submodules, **params}
    init = partialmethod(module.__init__, **given)  # type: ignore[misc]  # the subclass below is of this very class
    return type(module.__name__, (module,), {"__init__": init})
