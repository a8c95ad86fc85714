"""From ModelMeta and RunConfig to Megatron-Core's TransformerConfig: the border where Megatron's names begin."""

import math
from collections.abc import Callable
from typing import Any

import megatron.core
import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from packaging.version import Version

from megaswift.config.run import RunConfig
from megaswift.errors import ModelError
from megaswift.mcore.process_groups import context_levels
from megaswift.metadata.meta import ClampedSwiGLU, MLAMeta, ModelMeta, MoEMeta, RopeScaling
from megaswift.parallel.layout import Layout, padded_kv_heads
from megaswift.platforms.platform import Platform

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The approximation of GELU by tanh (Hendrycks and Gimpel 2016, 2)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu2": squared_relu,
    "xielu": F.silu,  # models/build.py puts the learned function in its place
}


def gate_with(swiglu: ClampedSwiGLU) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function of the gate in a clamped SwiGLU."""
    return lambda gate: gate * torch.sigmoid(swiglu.alpha * gate)


class VariedConfig(TransformerConfig):
    """The config of a model whose layers differ in sizes: Megatron's block asks it for each layer's own."""

    layer_configs: list[TransformerConfig]

    def get_config_for_layer(self, layer_number: int) -> TransformerConfig:
        """Return the config of a layer of the whole model, counted from 1."""
        return self.layer_configs[layer_number - 1]


def transformer_config(
    meta: ModelMeta, run: RunConfig, layout: Layout, platform: Platform
) -> TransformerConfig:
    """Return the config of one model under one layout; `run` must be resolved (dtype known)."""
    assert run.model.torch_dtype is not None, "torch_dtype is filled by config/rules.py"
    values: dict[str, Any] = {
        **_architecture(meta, tp=layout.tp),
        **_parallel(layout, run, platform),
        **_precision(meta, run, platform),
        **_recompute(run),
        **_eight_bits(run, platform),
    }
    if meta.moe is not None:
        values |= _experts(meta, meta.moe, run, layout, platform)
    if meta.mla is not None:
        return MLATransformerConfig(**values | _latent_attention(meta, meta.mla))
    if meta.layer_variation is None:
        config = TransformerConfig(**values)
    else:
        config = VariedConfig(**values, heterogeneous_block_specs=True)
        config.layer_configs = [
            transformer_config(meta.of_layer(layer), run, layout, platform)
            for layer in range(meta.num_layers)
        ]
    if meta.rope_scaling is not None:
        # Megatron multiplies cosines and sines by 0.1 * ln(this) + 1 (yarn_rotary_pos_embedding.py, 0.16.1).
        config.yarn_rotary_scaling_factor = math.exp((meta.rope_scaling.amplitude - 1.0) / 0.1)
    return config


def _architecture(meta: ModelMeta, *, tp: int) -> dict[str, Any]:
    if meta.activation not in ACTIVATIONS:
        raise ModelError(
            f"hidden_act={meta.activation} of {meta.model_type} has no gated form here. Known: {', '.join(ACTIVATIONS)}."
        )
    windows = {window for window in meta.sliding_window if window is not None}
    if len(windows) > 1:
        raise ModelError(
            f"sliding_window={sorted(windows)} differs between layers of {meta.model_type}. One window a model is supported."
        )
    window: dict[str, Any] = {}
    if windows:
        # Megatron counts the keys to the left of a query; config.json counts the query too.
        window = {
            "window_size": (windows.pop() - 1, 0),
            "window_attn_skip_freq": [int(one is not None) for one in meta.sliding_window],
        }
    kv_heads = padded_kv_heads(meta.num_heads, meta.num_kv_heads, tp=tp)
    return {
        "num_layers": meta.num_layers,
        "hidden_size": meta.hidden_size,
        "ffn_hidden_size": meta.ffn_hidden_size,
        "num_attention_heads": kv_heads * (meta.num_heads // meta.num_kv_heads),
        "num_query_groups": kv_heads,
        "kv_channels": meta.head_dim,
        "normalization": "LayerNorm" if meta.norm.kind == "layernorm" else "RMSNorm",
        "layernorm_zero_centered_gamma": meta.norm.zero_centered,
        "layernorm_epsilon": meta.norm_eps,
        "gated_linear_unit": meta.gated_mlp,
        "activation_func": ACTIVATIONS[meta.activation],
        "add_bias_linear": meta.mlp_bias or meta.attention_out_bias,
        "add_qkv_bias": meta.qkv_bias,
        # Megatron sums gradients of q_layernorm and k_layernorm over tp: right for a norm that every head shares.
        "qk_layernorm": meta.qk_norm == "head",
        # Megatron (0.19) builds other norms of q and k from the spec only under this switch, which does nothing else.
        "qk_l2_norm": meta.qk_norm in ("l2", "full"),
        "softmax_scale": meta.attention.scale,
        "attention_output_gate": meta.attention.output_gate,
        "hetereogenous_dist_checkpoint": meta.linear_attention
        is not None,  # layers are not alike: no stacking of them
        "rotary_interleaved": meta.rope.interleaved,
        "no_rope_freq": [int(not turns) for turns in meta.rope.layers] or None,
        "init_method_std": meta.initializer_range,
        **window,
        **(_clamped(meta.clamped_swiglu) if meta.clamped_swiglu else {}),
    }


def _clamped(swiglu: ClampedSwiGLU) -> dict[str, Any]:
    return {
        "activation_func": gate_with(swiglu),
        "activation_func_clamp_value": swiglu.limit,
        "glu_linear_offset": 1.0,
    }


def _latent_attention(meta: ModelMeta, mla: MLAMeta) -> dict[str, Any]:
    if not meta.rope.interleaved:
        raise ModelError(
            f"rope_interleave=false of {meta.model_type} is not supported: Megatron's latent attention turns neighbouring pairs."
        )
    scaling = meta.rope_scaling or RopeScaling(kind="default")
    return {
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_head_dim": mla.nope_head_dim,
        "qk_pos_emb_head_dim": mla.rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rotary_interleaved": False,  # the module turns pairs by itself and refuses the switch
        # The scale of the scores; the angles are those of models/mla.py.
        "rope_type": "yarn",
        "rotary_scaling_factor": scaling.factor,
        "mscale_all_dim": scaling.mscale_all_dim or 0.0,
    }


def _parallel(layout: Layout, run: RunConfig, platform: Platform) -> dict[str, Any]:
    interleaved = layout.vpp > 1
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if interleaved else None,
        "num_layers_in_first_pipeline_stage": layout.pp_first,
        "num_layers_in_last_pipeline_stage": layout.pp_last,
        "context_parallel_size": layout.cp,
        "cp_comm_type": layout.cp_comm_type,
        "hierarchical_context_parallel_sizes": context_levels(layout),
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.sequence_parallel,
        "variable_seq_lengths": layout.pp > 1,  # packs and padding-free rows differ in length
        "moe_token_dispatcher_type": "alltoall",  # the default refuses variable_seq_lengths in dense models too (0.16.1)
        # pp=2 with vpp posts two sends between the same pair of ranks; unless they are separate calls they are matched in
        # posting order and the gradients are silently wrong (megatron-core 0.16.1; its own check lives in training scripts).
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # An output's memory goes once it is sent. The interleaved schedule does not wait for that: NCCL keeps the memory of a
        # send that is under way, gloo does not, and the next stage then reads what was written there since.
        "deallocate_pipeline_outputs": platform.backend == "nccl" or not interleaved,
        "deterministic_mode": run.training.deterministic and platform.name == "cuda",
    }


def _precision(meta: ModelMeta, run: RunConfig, platform: Platform) -> dict[str, Any]:
    assert run.model.torch_dtype is not None
    dtype = DTYPES[run.model.torch_dtype]
    fused = platform.name == "cuda"
    wgrad_fusion = run.training.gradient_accumulation_fusion
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "attention_softmax_in_fp32": True,
        "attention_backend": AttnBackend[run.model.attention_backend] if fused else AttnBackend.auto,
        "attention_dropout": run.training.attention_dropout,
        "hidden_dropout": run.training.hidden_dropout,
        "calculate_per_token_loss": run.training.calculate_per_token_loss,
        # Megatron's fused GELU is the tanh approximation whatever the model asks for (fused_bias_geglu.py, 0.16.1).
        "bias_activation_fusion": fused
        and meta.activation == "silu"
        and meta.gated_mlp
        and meta.clamped_swiglu is None,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,  # only Megatron's local attention has it, which is not used
        # The output layer is Megatron's own in every spec, and needs apex's extension for it.
        "gradient_accumulation_fusion": platform.apex if wgrad_fusion is None else wgrad_fusion,
        # The weights are about to be loaded: an initialiser that does nothing keeps the attributes that initialising sets
        # (grad-norm and checkpointing read tensor_model_parallel), at no cost.
        "perform_initialization": True,
        "use_cpu_initialization": run.tuner.quant_bits is not None,
        **(
            {}
            if run.model.random_init
            else {"init_method": _leave, "output_layer_init_method": _leave, "embedding_init_method": _leave}
        ),
    }


def _eight_bits(run: RunConfig, platform: Platform) -> dict[str, Any]:
    """Return Megatron's FP8 settings; on a CPU models/fp8.py emulates them and Megatron need not know."""
    precision = run.precision
    if precision.fp8_format == "none" or platform.name == "cpu":
        return {}
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_param": precision.fp8_param_gather,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _recompute(run: RunConfig) -> dict[str, Any]:
    training = run.training
    if training.recompute_granularity == "none":
        return {}
    if training.recompute_granularity == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": training.recompute_modules or ["core_attn"],
        }
    return {
        "recompute_granularity": "full",
        "recompute_method": training.recompute_method or "uniform",
        "recompute_num_layers": training.recompute_num_layers or 1,
    }


def _experts(
    meta: ModelMeta, moe: MoEMeta, run: RunConfig, layout: Layout, platform: Platform
) -> dict[str, Any]:
    # Megatron (0.16.1, router.py) weighs a rank's share of a router loss by that rank's tokens where it divides by tokens
    # later: as many times too little as ranks share a sequence. 0.19 weighs it right.
    weighs_too_little = Version(megatron.core.__version__) < Version("0.19")
    parts = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    weight = parts if run.training.calculate_per_token_loss and weighs_too_little else 1
    if moe.scale_input and moe.topk > 1:
        raise ModelError(
            f"num_experts_per_tok={moe.topk} is not supported where experts are scaled at their input: Megatron scales one."
        )
    balancing = run.moe.moe_router_load_balancing_type or (
        "aux_loss" if run.moe.moe_aux_loss_coeff else "none"
    )
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.topk,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_layer_freq": [int(is_moe) for is_moe in moe.layer_is_moe],
        # A dense part beside the experts is a shared expert to Megatron; models/experts.py gives both their norms.
        "moe_shared_expert_intermediate_size": (
            meta.ffn_hidden_size if moe.beside_dense else moe.shared_ffn_hidden_size or None
        ),
        "moe_shared_expert_gate": moe.shared_gate,
        # Normalising the chosen probabilities is a softmax over the chosen logits; not normalising is a softmax before the choice.
        "moe_router_pre_softmax": moe.score_function == "softmax"
        and (not moe.norm_topk_prob or moe.topk == 1),
        "moe_router_score_function": moe.score_function,
        # Fine-tuning keeps the bias of the checkpoint; a router of models/router.py holds its own.
        "moe_router_enable_expert_bias": moe.router_bias and moe.score_function == "sigmoid",
        "moe_router_bias_update_rate": 0.0,
        "moe_router_num_groups": moe.num_groups,
        "moe_router_group_topk": moe.topk_groups,
        "moe_router_topk_scaling_factor": moe.routed_scaling_factor
        if moe.routed_scaling_factor != 1.0
        else None,
        "moe_apply_probs_on_input": moe.scale_input,
        "moe_router_load_balancing_type": balancing,
        "moe_aux_loss_coeff": run.moe.moe_aux_loss_coeff * weight,
        "moe_z_loss_coeff": None if run.moe.moe_z_loss_coeff is None else run.moe.moe_z_loss_coeff * weight,
        "moe_router_dtype": run.moe.moe_router_dtype,
        "moe_token_dispatcher_type": run.moe.moe_token_dispatcher_type,
        # An adapter is a property of one linear: grouped experts have none.
        "moe_grouped_gemm": run.moe.moe_grouped_gemm
        and platform.transformer_engine
        and run.tuner.tuner_type != "lora",
        "moe_expert_capacity_factor": run.moe.moe_expert_capacity_factor,
        "moe_pad_expert_input_to_capacity": run.moe.moe_pad_expert_input_to_capacity,
        "moe_token_drop_policy": run.moe.moe_token_drop_policy,
        "moe_permute_fusion": run.moe.moe_permute_fusion and platform.transformer_engine,
    }
