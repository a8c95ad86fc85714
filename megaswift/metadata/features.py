"""What a model needs beyond a Llama, by name, and which of these features the model builder has.

A feature is built when models/ has a module for it and a parity test; its name then moves to BUILT.
"""

from collections.abc import Callable

from megaswift.errors import ModelError
from megaswift.metadata.catalogue import FAMILIES
from megaswift.metadata.meta import ModelMeta

FEATURES: dict[str, Callable[[ModelMeta], bool]] = {
    "biases of attention and feed-forward": lambda m: m.qkv_bias or m.attention_out_bias or m.mlp_bias,
    "branches that differ in biases": lambda m: (m.attention_out_bias or m.mlp_bias) and not _same_biases(m),
    "bias of the output layer": lambda m: m.lm_head_bias,
    "layer norm": lambda m: m.norm.kind == "layernorm",
    "layer norm without a bias": lambda m: m.norm.kind == "layernorm" and not m.norm.bias,
    "norm weights stored minus one": lambda m: m.norm.zero_centered,
    "norms after each branch": lambda m: m.norm.placement == "post",
    "norms before and after each branch": lambda m: m.norm.placement == "sandwich",
    "norms of q and k per head": lambda m: m.qk_norm == "head",
    "norms of q and k over all heads": lambda m: m.qk_norm == "full",
    "q and k of unit length": lambda m: m.qk_norm == "l2",
    "norms of q and k after rotary positions": lambda m: m.qk_norm is not None and m.qk_norm_after_rope,
    "norm of v": lambda m: m.attention.value_norm,
    "activation gelu": lambda m: m.activation == "gelu" and m.gated_mlp,
    "activation gelu_pytorch_tanh": lambda m: m.activation == "gelu_pytorch_tanh",
    "activation relu2": lambda m: m.activation == "relu2",
    "activation xielu": lambda m: m.activation == "xielu",
    "feed-forward without a gate": lambda m: not m.gated_mlp,
    "clamped SwiGLU": lambda m: m.clamped_swiglu is not None,
    "rope scaling linear": lambda m: _scaling(m) == "linear",
    "rope scaling llama3": lambda m: _scaling(m) == "llama3",
    "rope scaling yarn": lambda m: _scaling(m) == "yarn",
    "rope scaling longrope": lambda m: _scaling(m) == "longrope",
    "rope scaling dynamic": lambda m: _scaling(m) == "dynamic",
    "rope scaling ntk_alpha": lambda m: _scaling(m) == "ntk_alpha",
    "rope scaling proportional": lambda m: _scaling(m) == "proportional",
    "partial rotary positions": lambda m: m.rotary_fraction != 1.0,
    "interleaved rotary positions": lambda m: m.rope.interleaved,
    "layers without rotary positions": lambda m: bool(m.rope.layers) and not all(m.rope.layers),
    "own rotary positions of sliding layers": lambda m: (
        m.rope.local_theta is not None and (m.rope.local_theta != m.rope_theta or m.rope_scaling is not None)
    ),
    "sliding window": lambda m: bool(m.sliding_window),
    "chunked attention": lambda m: any(m.attention.chunk),
    "own scale of the scores": lambda m: m.attention.scale is not None,
    "soft-capped scores": lambda m: m.attention.softcap is not None,
    "attention sinks": lambda m: m.attention.sinks,
    "gated attention": lambda m: m.attention.output_gate,
    "clamped q, k and v": lambda m: m.attention.clip_qkv is not None,
    "queries scaled by position": lambda m: m.attention.query_scaling is not None,
    "multi-head latent attention": lambda m: m.mla is not None,
    "biases of attention without those of experts": lambda m: (
        m.moe is not None and m.attention_out_bias and not (m.moe.expert_bias and m.moe.router_linear_bias)
    ),
    "biases of latent attention": lambda m: m.mla is not None and m.qkv_bias,
    "Gated DeltaNet": lambda m: m.linear_attention is not None,
    "embedding multiplier": lambda m: m.multipliers.embedding != 1.0,
    "residual multiplier": lambda m: m.multipliers.residual != 1.0,
    "logits multiplier": lambda m: m.multipliers.logits != 1.0,
    "soft-capped logits": lambda m: m.multipliers.logits_softcap is not None,
    "parallel branches": lambda m: m.parallel_residual,
    "multi-token prediction": lambda m: m.num_mtp_layers > 0,
    "sizes that differ between layers": lambda m: m.layer_variation is not None,
    "keys and values of an earlier layer": lambda m: (
        m.layer_variation is not None and any(one is not None for one in m.layer_variation.kv_from_layer)
    ),
    "per-layer embeddings": lambda m: m.layer_inputs is not None,
    "scalar of each layer": lambda m: m.layer_scalar,
    "mixture of experts": lambda m: m.moe is not None,
    "shared experts": lambda m: m.moe is not None and m.moe.shared_ffn_hidden_size > 0,
    "sigmoid routing": lambda m: m.moe is not None and m.moe.score_function == "sigmoid",
    "router with a bias for the choice": lambda m: m.moe is not None and m.moe.router_bias,
    "group-limited routing": lambda m: m.moe is not None and m.moe.num_groups is not None,
    "scaled routing weights": lambda m: m.moe is not None and m.moe.routed_scaling_factor != 1.0,
    "router projection with a bias": lambda m: m.moe is not None and m.moe.router_linear_bias,
    "experts with biases": lambda m: m.moe is not None and m.moe.expert_bias,
    "experts scaled at their input": lambda m: m.moe is not None and m.moe.scale_input,
    "experts beside a dense part": lambda m: m.moe is not None and m.moe.beside_dense,
    "router with a norm of its input": lambda m: m.moe is not None and m.moe.router_norm,
    "weights scaled by expert": lambda m: m.moe is not None and m.moe.expert_scale,
    "weights quantised otherwise than in block FP8 or MXFP4": lambda m: (
        m.quantization is not None and m.quantization.get("quant_method") not in ("fp8", "mxfp4")
    ),
}

BUILT = frozenset(
    {
        "biases of attention and feed-forward",
        "branches that differ in biases",
        "layer norm",
        "layer norm without a bias",
        "norm weights stored minus one",
        "norms after each branch",
        "norms before and after each branch",
        "norms of q and k over all heads",
        "norms of q and k after rotary positions",
        "activation gelu_pytorch_tanh",
        "activation relu2",
        "activation xielu",
        "feed-forward without a gate",
        "rope scaling yarn",
        "rope scaling longrope",
        "rope scaling dynamic",
        "rope scaling ntk_alpha",
        "partial rotary positions",
        "interleaved rotary positions",
        "layers without rotary positions",
        "own rotary positions of sliding layers",
        "own scale of the scores",
        "soft-capped scores",
        "queries scaled by position",
        "embedding multiplier",
        "residual multiplier",
        "logits multiplier",
        "soft-capped logits",
        "parallel branches",
        "norms of q and k per head",
        "activation gelu",
        "rope scaling linear",
        "rope scaling llama3",
        "sliding window",
        "mixture of experts",
        "shared experts",
        "attention sinks",
        "chunked attention",
        "q and k of unit length",
        "experts scaled at their input",
        "clamped SwiGLU",
        "experts with biases",
        "router projection with a bias",
        "multi-head latent attention",
        "multi-token prediction",  # its layers are not trained, as in transformers
        "sigmoid routing",
        "router with a bias for the choice",
        "group-limited routing",
        "scaled routing weights",
        "gated attention",
        "Gated DeltaNet",
        "norm of v",
        "rope scaling proportional",
        "sizes that differ between layers",
        "scalar of each layer",
        "experts beside a dense part",
        "router with a norm of its input",
        "weights scaled by expert",
        "keys and values of an earlier layer",
        "per-layer embeddings",
    }
)


def missing_features(meta: ModelMeta) -> tuple[str, ...]:
    """Return the features that a model needs and the builder does not have."""
    return tuple(name for name, needed in FEATURES.items() if name not in BUILT and needed(meta))


def check_supported(meta: ModelMeta) -> None:
    """Raise ModelError where a model can be described but not yet built, naming what is missing."""
    missing = missing_features(meta)
    if missing:
        raise ModelError(
            f"model_type={meta.model_type} cannot be trained yet: it needs {', '.join(missing)}. "
            f"`megaswift models` lists what can be trained."
        )
    if not FAMILIES[meta.family].supported:
        raise ModelError(
            f"model_type={meta.model_type} cannot be trained yet: no parity test has proven the family {meta.family}. "
            f"`megaswift models` lists what can be trained."
        )


def _same_biases(meta: ModelMeta) -> bool:
    """Whether one switch for all linears of a layer says it; experts have a switch of their own."""
    dense = meta.moe is None or not all(meta.moe.layer_is_moe)
    return meta.qkv_bias and meta.attention_out_bias and (meta.mlp_bias or not dense)


def _scaling(meta: ModelMeta) -> str | None:
    """Return the kind of rope scaling."""
    return meta.rope_scaling.kind if meta.rope_scaling else None
