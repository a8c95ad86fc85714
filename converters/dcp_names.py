"""Where Megatron's torch_dist checkpoints keep each parameter: key, and box of the tensor under that key.

Layers are numbered over the whole model. Models whose layers are all alike stack them: one tensor [L, ...] a parameter
(transformer_block.py, sharded_state_dict, 0.16.1); others have a key for each layer. Experts are always stacked,
[E, ...] (experts.py). Keys are those of Transformer Engine's spec, which fuses norms into the linears after them. Megatron's
local spec imitates them (gpt_layer_specs.py, sharded_state_dict_keys_map), but also before experts, and not around latent
attention; where the two differ a parameter has both names.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megaswift.converters.dcp_metadata import StoredTensor
from megaswift.converters.plan import Parameter
from megaswift.errors import CheckpointError
from megaswift.metadata.meta import ModelMeta


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A parameter is the box at `offsets` of the tensor `key`, whose first dims are `counts` long."""

    key: str
    offsets: tuple[int, ...] = ()  # (), (layer,), (expert,) or (layer, expert)
    counts: tuple[int, ...] = ()


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.*)")

_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_FUSED_LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def addresses(parameter: Parameter, meta: ModelMeta, *, stacked: bool) -> list[Address]:
    """Return where a parameter of the whole model lies; some norms have two names, one for each layer spec."""
    match = _LAYER.fullmatch(parameter.name)
    if not match:
        return [Address(key=parameter.name)]
    layer, rest = int(match[1]), match[2]
    is_moe = meta.moe is not None and meta.moe.layer_is_moe[layer]
    names = _norm_names(rest, is_moe=is_moe, is_latent=meta.mla is not None)
    offsets: tuple[int, ...] = (layer,) if stacked else ()
    counts: tuple[int, ...] = (meta.num_layers,) if stacked else ()
    if expert := _EXPERT.fullmatch(rest):
        assert meta.moe is not None
        names, offsets, counts = (
            (f"mlp.experts.experts.{expert[2]}",),
            (*offsets, int(expert[1])),
            (*counts, meta.moe.num_experts),
        )
    prefix = "decoder.layers." if stacked else f"decoder.layers.{layer}."
    return [Address(key=prefix + name, offsets=offsets, counts=counts) for name in names]


def _norm_names(name: str, *, is_moe: bool, is_latent: bool) -> tuple[str, ...]:
    """Return the names of a parameter of a layer: one but for norms that one of the layer specs fuses."""
    for own, fused in (_FUSED_LATENT_NORMS if is_latent else _FUSED_NORMS).items():
        if name.startswith(own):
            both = fused + name.removeprefix(own)
            if is_latent:
                # Transformer Engine does not fuse the norm before experts, nor the local spec any.
                return (name,) if is_moe and own == "pre_mlp_layernorm." else (name, both)
            return (name, both) if is_moe and own == "pre_mlp_layernorm." else (both,)
    return (name,)


def stacks_layers(meta: ModelMeta) -> bool:
    """Whether a plain GPTModel of this kind stacks its layers: it does where they are all dense and alike."""
    return meta.moe is None and meta.linear_attention is None and meta.layer_variation is None


def candidates(parameter: Parameter, meta: ModelMeta) -> list[Address]:
    """Return every place where a parameter of the whole model may lie, whoever wrote the checkpoint."""
    return [one for stacked in (False, True) for one in addresses(parameter, meta, stacked=stacked)]


def find(
    parameter: Parameter, meta: ModelMeta, stored: dict[str, StoredTensor]
) -> tuple[Address, StoredTensor]:
    """Return where a checkpoint keeps a parameter, stacked or not; raises CheckpointError where it does not."""
    places = candidates(parameter, meta)
    for address in places:
        if address.key in stored:
            return address, stored[address.key]
    keys = dict.fromkeys(address.key for address in places)
    raise CheckpointError(
        f"The checkpoint has no tensor {' or '.join(keys)}. "
        f"It does not hold a model of {meta.num_layers} layers as config.json describes it."
    )


def extra_states(found: Iterable[Address]) -> Iterator[str]:
    """Yield the keys of the empty objects that a model asks for beside its tensors.

    Linears, norms and the core attention of Transformer Engine have such a state for FP8 (mapping.py, ShardedObject.
    unique_key); the local spec's linears imitate them. A model ignores those that it does not know.
    """
    for address in found:
        if not address.key.startswith("decoder."):
            continue
        module = address.key.rpartition(".")[0]
        modules = [module]
        if module.endswith("self_attention.linear_proj"):
            modules.append(module.replace("linear_proj", "core_attention"))
        offsets, counts = address.offsets or (0,), address.counts or (1,)
        for name in modules:
            yield f"{name}._extra_state/shard_{'.'.join(map(str, offsets))}_{'.'.join(map(str, counts))}"
