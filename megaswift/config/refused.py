"""Flags of ms-swift that ask for something this project does not do (yet): refused by name, never ignored.

Each flag stands with the values that ask for nothing (ms-swift's own defaults that equal what happens here); with one
of those it is accepted. Names and defaults: ms-swift 4.6.0.dev0.
"""

from dataclasses import dataclass

from megaswift.config.value import Raw
from megaswift.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Why a flag is refused, what to do instead, and the values that are harmless."""

    what: str
    instead: str = ""
    harmless: tuple[str, ...] = ()


def _refuse(what: str, instead: str = "", **flags: str) -> dict[str, Refused]:
    """Return one Refused for every flag; its value lists the harmless values, separated by blanks."""
    return {
        flag: Refused(what=what, instead=instead, harmless=tuple(words.split()))
        for flag, words in flags.items()
    }


# Flags of reinforcement learning and distillation.
_RLHF = """
    use_ray
    reward_adapters num_ppo_epochs kl_coef cliprange vf_coef
    cliprange_value gamma lam num_mini_batches response_length async_generate whiten_rewards
    missing_eos_penalty
    vllm_limit_mm_per_prompt vllm_disable_cascade_attn vllm_mm_processor_cache_gb wandb_log_unique_prompts
""".split()

REFUSED: dict[str, Refused] = {
    # Model and template
    **_refuse(
        "changing the rotary embedding",
        "Write rope_scaling into config.json.",
        rope_scaling="none",
        max_model_len="none",
    ),
    **_refuse(
        "running code files of your own",
        custom_register_path="",
        megatron_extra_kwargs="none {}",
    ),
    **_refuse(
        "choosing a template by name",
        "The chat template of the model's tokenizer is used; edit its chat_template to change it.",
        template="none",
        template_backend="jinja",
        response_prefix="none",
        preserve_thinking="none false",
        add_non_thinking_prefix="true",
    ),
    **_refuse(
        "images", max_pixels="none", norm_bbox="none", vit_attn_impl="none", vit_lr="none", aligner_lr="none"
    ),
    **_refuse(
        "images",
        freeze_llm="false",
        freeze_vit="true",
        freeze_aligner="true",
        vit_gradient_checkpointing="true false none",
    ),
    **_refuse("images", language_model_only="false true"),
    # Data
    **_refuse(
        "a registry of data sets",
        "Give files, folders or hub ids as --dataset, with --columns.",
        custom_dataset_info="",
    ),
    **_refuse("shuffling validation rows", val_dataset_shuffle="false"),
    **_refuse(
        "another order of packs",
        "Packing is best-fit decreasing over all samples.",
        packing_strategy="binpack",
        sequence_packing_scheduler="none",
    ),
    **_refuse(
        "reading columns by their exact names only",
        "Use --columns.",
        disable_auto_column_mapping="false",
    ),
    **_refuse("another order of samples", data_sharding="false"),
    # Layout and speed
    **_refuse(
        "a layout written as text",
        "Use --decoder_first_pipeline_num_layers and --decoder_last_pipeline_num_layers.",
        pipeline_model_parallel_layout="none",
        account_for_embedding_in_pipeline_split="false",
        account_for_loss_in_pipeline_split="false",
    ),
    **_refuse(
        "groups of micro batches in the interleaved schedule", microbatch_group_size_per_vp_stage="none"
    ),
    **_refuse("sending parts of products while others are computed", tp_comm_overlap="false"),
    **_refuse("another split of the sequence", cp_partition_mode="zigzag"),
    **_refuse(
        "FSDP and other ways of sharding weights",
        "Use --tensor_model_parallel_size or --pipeline_model_parallel_size.",
        use_megatron_fsdp="false",
        data_parallel_sharding_strategy="no_shard optim",
        fsdp="none",
        zero_hpz_partition_size="none",
        deepspeed_autotp_size="none 1",
    ),
    **_refuse(
        "optimizer state in low precision",
        main_grads_dtype="fp32",
        main_params_dtype="fp32",
        exp_avg_dtype="fp32",
        exp_avg_sq_dtype="fp32",
    ),
    **_refuse("FP4", fp4_format="none", fp4_recipe="nvfp4", fp4_param_gather="false"),
    **_refuse(
        "choosing fusions one by one",
        "They follow the platform.",
        apply_rope_fusion="false",
        bias_dropout_fusion="true",
    ),
    **_refuse(
        "choosing fusions one by one",
        "They follow the platform.",
        bias_activation_fusion="true",
        attention_softmax_in_fp32="true",
    ),
    **_refuse(
        "reducing gradients in another dtype",
        "Gradients are accumulated in fp32.",
        accumulate_allreduce_grads_in_fp32="true",
    ),
    **_refuse("Transformer Engine's random states", te_rng_tracker="false"),
    **_refuse("steering Python's garbage collector", manual_gc="false", manual_gc_steps="0"),
    **_refuse("linear attention", linear_decoupled_in_proj="false"),
    # Mixture of experts, multi-token prediction
    **_refuse("this part of expert routing", moe_enable_deepep="false"),
    **_refuse("multi-token prediction", mtp_num_layers="none 0", mtp_loss_scaling_factor="0.1"),
    # Optimizer
    **_refuse(
        "another optimizer",
        "Choose --optimizer adamw, adam, sgd or muon.",
        galore_target_modules="none",
        use_q_galore="false",
    ),
    **_refuse("stepping what Muon leaves with another optimizer than AdamW", muon_scalar_optimizer="adam"),
    **_refuse(
        "weight decay that changes over the run",
        weight_decay_incr_style="constant",
        start_weight_decay="none",
        end_weight_decay="none",
    ),
    # Tuners
    **_refuse(
        "this variant of LoRA",
        lora_bias="none",
        lora_dtype="none",
    ),
    **_refuse(
        "LoRA-GA on rows of its own",
        "It takes the gradient of the first global batch as it is: --global_batch_size, --max_length.",
        lora_ga_batch_size="2",
        lora_ga_iters="2",
        lora_ga_max_length="1024",
    ),
    **_refuse(
        "another way of quantising base weights",
        "Four bits are --quant_method bnb --quant_bits 4; products have --torch_dtype.",
        hqq_axis="none",
        load_in_4bit="false",
        load_in_8bit="false",
        bnb_4bit_quant_storage="none",
    ),
    # Checkpoints and logs
    **_refuse(
        "folders with a time in their name",
        "The folder is --output_dir, so that the same command resumes.",
        add_version="false",
    ),
    **_refuse(
        "going back to the best checkpoint when training ends",
        "The file OUTPUT_DIR/best names it (--metric_for_best_model), and it is never deleted.",
        load_best_model_at_end="false",
    ),
    **_refuse(
        "a checkpoint that resumes only in part",
        no_load_optim="false",
        no_load_rng="false",
        ignore_data_skip="false",
    ),
    **_refuse(
        "adapters in a Megatron-Core checkpoint",
        "Adapters are PEFT folders here: give --adapters; --resume continues a run.",
        mcore_adapter="none",
        mcore_adapters="none",
    ),
    **_refuse(
        "sending files to a hub",
        push_to_hub="false",
        hub_model_id="none",
        hub_private_repo="false",
        hub_strategy="every_save",
    ),
    # Export
    **_refuse(
        "`megaswift convert`",
        "Training reads and writes Hugging Face folders itself.",
        to_mcore="false",
        to_hf="false",
        exist_ok="false",
    ),
    **_refuse(
        "`megaswift export`",
        test_convert_precision="false",
        test_convert_dtype="float32",
        thread_count="none",
        to_peft_format="false",
        to_ollama="false",
    ),
    **_refuse(
        "tokenising by `megaswift export`",
        "Use `megaswift data --prepare FOLDER`.",
        to_cached_dataset="false",
    ),
    **_refuse(
        "`megaswift export`",
        template_mode="train",
        quant_n_samples="256",
        quant_batch_size="1",
        group_size="128",
    ),
    **_refuse(
        "adapters in a Megatron-Core checkpoint",
        "Adapters are PEFT folders here: give --ref_adapters.",
        ref_adapter_load="none",
        mcore_ref_adapter="none",
    ),
    **_refuse(
        "another use of a reward model",
        "Its one label is the reward; write a reward function that asks it otherwise.",
        reward_model_plugin="none default",
    ),
    **_refuse(
        "counting the tokens of all turns together",
        "--max_completion_length is of each turn; --max_length bounds the whole.",
        completion_length_limit_scope="per_round",
    ),
    **{
        flag: Refused(what="reinforcement learning and distillation", harmless=("false", "none"))
        for flag in _RLHF
    },
}


def check_refused(name: str, raw: Raw) -> bool:
    """Return true where `name` is a refused flag with a harmless value, false where it is none; raises ConfigError."""
    refused = REFUSED.get(name)
    if refused is None:
        return False
    words = (
        [raw]
        if not isinstance(raw, (list, tuple))
        else list(raw) or ([True] if "" not in refused.harmless else [])
    )
    text = " ".join(
        "none" if word is None else str(word).lower() if isinstance(word, bool) else str(word)
        for word in words
    )
    if not text or text in refused.harmless or text.lower() in refused.harmless:
        return True
    instead = f" {refused.instead}" if refused.instead else " Leave it out."
    raise ConfigError(f"{name}={text} asks for {refused.what}, which is not built.{instead}")
