"""Which modules a decoder layer is made of: Transformer Engine's on a GPU, Megatron's local ones with ours elsewhere."""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megaswift.errors import ModelError
from megaswift.mcore.specs import as_subclass, submodules_of
from megaswift.metadata.features import FEATURES
from megaswift.metadata.meta import ModelMeta
from megaswift.models.attention import CoreAttention, GatedAttention, OwnRopeAttention
from megaswift.models.branch import BranchEnd, ParallelLayer, ScaledLayer
from megaswift.models.delta_net import GatedDeltaNet
from megaswift.models.experts import ExpertsBesideDense
from megaswift.models.layer_inputs import Carried, OwnInputLayer
from megaswift.models.linear import (
    ExpertRowParallelLinear,
    FewerProjectionsLinear,
    UnbiasedColumnParallelLinear,
    UnbiasedRowParallelLinear,
)
from megaswift.models.mla import LatentAttention
from megaswift.models.norm import AllHeadsRMSNorm, LayerNorm, RMSNorm
from megaswift.models.rope import rope_tables, rotary_dim
from megaswift.models.router import place_router
from megaswift.models.shared_keys import KeySource, NormedValueAttention, Projections
from megaswift.models.sinks import SinkAttention
from megaswift.platforms.platform import Platform

# Features of metadata/features.py that only the local modules below have.
LOCAL_ONLY = (
    "layer norm without a bias",
    "norms after each branch",
    "norms before and after each branch",
    "norms of q and k over all heads",
    "norms of q and k after rotary positions",
    "activation xielu",
    "own rotary positions of sliding layers",
    "soft-capped scores",
    "queries scaled by position",
    "residual multiplier",
    "parallel branches",
    "branches that differ in biases",
    "multi-head latent attention",
    "attention sinks",
    "chunked attention",
    "q and k of unit length",
    "clamped SwiGLU",
    "experts with biases",
    "Gated DeltaNet",
    "norm of v",
    "sizes that differ between layers",
    "scalar of each layer",
    "experts beside a dense part",
    "keys and values of an earlier layer",
    "per-layer embeddings",
)


def decoder_spec(
    meta: ModelMeta,
    config: TransformerConfig,
    platform: Platform,
    *,
    layers: range,
    vp_stage: int | None,
    carried: Carried,
) -> TransformerBlockSubmodules:
    """Return the spec of the decoder layers `layers` (global indices) of one model chunk, which share `carried`.

    Raises ModelError where the model needs what Transformer Engine's modules do not have.
    """
    if platform.transformer_engine:
        check_transformer_engine(meta)
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        for spec, layer in zip(block.layer_specs, layers, strict=True):
            if meta.moe is not None and meta.moe.layer_is_moe[layer]:
                place_router(spec, meta.moe)
            if config.context_parallel_size > 1:
                spec.submodules.self_attention.submodules.core_attention = CoreAttention
        return block
    specs = [_local_layer(meta, config, layer, carried) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm_of(meta))


def check_transformer_engine(meta: ModelMeta) -> None:
    """Raise ModelError where a model needs what Transformer Engine's modules do not have."""
    missing = [name for name in LOCAL_ONLY if FEATURES[name](meta)]
    if missing:
        raise ModelError(
            f"model_type={meta.model_type} needs {', '.join(missing)}, which Transformer Engine's layers do not have here. "
            "Run it in an environment without Transformer Engine."
        )


def _local_layer(meta: ModelMeta, config: TransformerConfig, layer: int, carried: Carried) -> ModuleSpec:
    is_moe = meta.moe is not None and meta.moe.layer_is_moe[layer]
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=False,
        qk_layernorm=False,
        multi_latent_attention=meta.mla is not None,
        normalization="RMSNorm",
    )
    if is_moe and meta.moe is not None:
        place_router(spec, meta.moe)
        if meta.moe.expert_bias:
            experts = submodules_of(spec.submodules.mlp).experts
            submodules_of(experts).linear_fc2 = ExpertRowParallelLinear
    _place_norms(spec, meta, config)
    if is_moe and meta.moe is not None and meta.moe.beside_dense:
        spec.submodules.pre_mlp_layernorm = IdentityOp
        spec.submodules.mlp = as_subclass(spec.submodules.mlp, ExpertsBesideDense, norm=norm_of(meta))
    if meta.layer_scalar:
        spec.module = ScaledLayer
    if meta.layer_inputs is not None:
        spec.module = OwnInputLayer
        size = meta.layer_inputs.hidden_size
        spec.params = {**spec.params, "carried": carried, "size": size, "norm": norm_of(meta)}
    if meta.linear_attention is not None and meta.linear_attention.layers[layer]:
        spec.submodules.self_attention = ModuleSpec(module=GatedDeltaNet, params={"meta": meta})
    else:
        _attend(spec, meta, config, layer, carried)
    if not is_moe and config.add_bias_linear and not meta.mlp_bias:
        mlp = submodules_of(spec.submodules.mlp)
        mlp.linear_fc1, mlp.linear_fc2 = UnbiasedColumnParallelLinear, UnbiasedRowParallelLinear
    return spec


def norm_of(meta: ModelMeta) -> ModuleSpec:
    """Return the norm of this model, for the hidden state and for one head."""
    if meta.norm.kind == "layernorm":
        return ModuleSpec(module=LayerNorm, params={"bias": meta.norm.bias})
    return ModuleSpec(module=RMSNorm, params={"zero_centered": meta.norm.zero_centered})


def _place_norms(spec: ModuleSpec, meta: ModelMeta, config: TransformerConfig) -> None:
    """Put norms before the branches, at their ends, or both; the ends also multiply."""
    layer, norm = spec.submodules, norm_of(meta)
    before = IdentityOp if meta.norm.placement == "post" else norm
    layer.input_layernorm = layer.pre_mlp_layernorm = before
    layer.self_attn_bda = layer.mlp_bda = get_bias_dropout_add
    after = None if meta.norm.placement == "pre" else norm
    if after is not None or meta.multipliers.residual != 1.0:
        params = {"config": config, "norm": after, "multiplier": meta.multipliers.residual}
        layer.self_attn_bda = layer.mlp_bda = ModuleSpec(module=BranchEnd, params=params)
    if meta.parallel_residual:
        spec.module = ParallelLayer
        layer.pre_mlp_layernorm = IdentityOp


def _attend(
    spec: ModuleSpec, meta: ModelMeta, config: TransformerConfig, layer: int, carried: Carried
) -> None:
    """Choose the modules of the attention."""
    attention = spec.submodules.self_attention.submodules
    _choose_rope(spec.submodules.self_attention, meta, layer, carried)
    if meta.attention.output_gate:
        spec.submodules.self_attention.module = GatedAttention
    if meta.mla is not None:
        latent = spec.submodules.self_attention
        latent.module = LatentAttention
        latent.params = {**latent.params, "meta": meta, "norm": norm_of(meta)}
        attention.core_attention = CoreAttention
        return
    late_norm = meta.qk_norm == "head" and meta.qk_norm_after_rope
    attention.core_attention = partial(
        SinkAttention if meta.attention.sinks else CoreAttention,
        softcap=meta.attention.softcap,
        query_scaling=meta.attention.query_scaling,
        qk_norm=norm_of(meta) if late_norm else None,
        chunk=meta.attention.chunk[layer] if meta.attention.chunk else None,
    )
    if meta.qk_norm == "l2" and (not meta.rope.layers or meta.rope.layers[layer]):
        # Turning does not change a length: before and after the rotary positions are the same.
        attention.q_layernorm = attention.k_layernorm = L2Norm
    if meta.qk_norm == "head" and not late_norm:
        attention.q_layernorm = attention.k_layernorm = norm_of(meta)
        if KeySource.of(meta.layer_variation, layer).projections is Projections.QUERIES:
            attention.k_layernorm = IdentityOp  # 0.19 refuses None
    if meta.qk_norm == "full":
        attention.q_layernorm, attention.k_layernorm = _norms_of_all_heads(meta, config)
    if config.add_bias_linear and not meta.attention_out_bias:
        attention.linear_proj = UnbiasedRowParallelLinear
    if config.add_bias_linear and not meta.qkv_bias:
        attention.linear_qkv = UnbiasedColumnParallelLinear


def _choose_rope(attention: ModuleSpec, meta: ModelMeta, layer: int, carried: Carried) -> None:
    """Let attention take its own of several kinds of rotary positions, and norm its values where the model does."""
    ropes, of_layers = rope_tables(meta)
    if len(ropes) == 1 and not meta.attention.value_norm:
        return
    own = ropes[of_layers[layer]]
    attention.module = OwnRopeAttention
    attention.params = {
        **attention.params,
        "table": of_layers[layer],
        "size": rotary_dim(own),
        "stretched": own.rope_scaling is not None,
    }
    if meta.attention.value_norm:
        source = KeySource.of(meta.layer_variation, layer)
        attention.module = NormedValueAttention
        attention.params |= {"source": source, "carried": carried}
        if source.projections.absent:
            absent = source.projections.absent
            attention.submodules.linear_qkv = partial(FewerProjectionsLinear, absent=absent)


def _norms_of_all_heads(meta: ModelMeta, config: TransformerConfig) -> tuple[ModuleSpec, ModuleSpec]:
    if config.num_query_groups < config.tensor_model_parallel_size:
        raise ModelError(
            f"tp={config.tensor_model_parallel_size} exceeds num_kv_heads={meta.num_kv_heads} ({meta.model_type}), whose keys "
            "are normed over all heads. Choose tp up to the number of key/value heads."
        )
    query = {"heads": config.num_attention_heads, "real_heads": meta.num_heads}
    key = {"heads": config.num_query_groups, "real_heads": meta.num_kv_heads}
    return tuple(ModuleSpec(module=AllHeadsRMSNorm, params=params) for params in (query, key))  # type: ignore[return-value]  # two of them
