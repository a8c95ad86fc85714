"""Rules between batches, the length of the run, precision, recomputation, data, tuner and checkpoints."""

from math import ceil

from megaswift.config.case import Case
from megaswift.config.rows import texts_of_a_row
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError, nearest

DEFAULT_GLOBAL_BATCH = 16  # ms-swift 4.6.0.dev0, swift/megatron/arguments
DEFAULT_LR = {"full": 1e-5, "lora": 1e-4}  # the same
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")


def a_model_is_named(run: RunConfig) -> None:
    """There is something to train."""
    if not run.model.model:
        raise ConfigError("model is not set. Give --model with a hub id or a folder.")


def rows_are_named(run: RunConfig) -> None:
    """There is something to train on."""
    if not run.data.dataset:
        raise ConfigError("dataset is not set. Give --dataset with files, folders or ids.")


def random_weights_are_for_pre_training(run: RunConfig) -> None:
    """Fine-tuning starts from trained weights."""
    if run.model.random_init and run.task != "pt":
        raise ConfigError(
            f"random_init=true is for pre-training. Use `megaswift pt`, or leave it out of `megaswift {run.task}`."
        )
    if run.model.random_init and run.tuner.tuner_type != "full":
        raise ConfigError(
            f"random_init=true needs tuner_type=full, not {run.tuner.tuner_type}. Adapters need trained weights."
        )
    if run.model.random_init and run.freeze.chooses:
        raise ConfigError(
            "random_init=true leaves nothing worth freezing. Leave it out, or the freeze_parameters and trainable_parameters."
        )


def sizes_are_positive(run: RunConfig) -> None:
    """Counts are counts, and shares are shares."""
    training, data, checkpoint, logging = run.training, run.data, run.checkpoint, run.logging
    for name, size in (
        ("micro_batch_size", training.micro_batch_size),
        ("global_batch_size", training.global_batch_size),
        ("gradient_accumulation_steps", training.gradient_accumulation_steps),
        ("train_iters", training.train_iters),
        ("max_length", data.max_length),
        ("packing_length", data.packing_length),
        ("dataset_num_proc", data.dataset_num_proc),
        ("save_steps", checkpoint.save_steps),
        ("save_total_limit", None if checkpoint.save_total_limit == -1 else checkpoint.save_total_limit),
        ("logging_steps", logging.logging_steps),
        ("eval_steps", logging.eval_steps),
        ("early_stop_interval", logging.early_stop_interval),
        ("lora_rank", run.tuner.lora_rank),
        ("nproc_per_node", run.launch.nproc_per_node),
    ):
        if size is not None and size < 1:
            raise ConfigError(f"{name}={size} is too small. Give 1 or more.")
    if training.num_train_epochs is not None and training.num_train_epochs <= 0:
        raise ConfigError(f"num_train_epochs={training.num_train_epochs} is too small. Give more than 0.")
    if training.spike_factor is not None and training.spike_factor <= 1:
        raise ConfigError(f"spike_factor={training.spike_factor} is too small. Give more than 1, such as 2.")
    for name, share in (
        ("split_dataset_ratio", data.split_dataset_ratio),
        ("lora_dropout", run.tuner.lora_dropout),
        ("attention_dropout", training.attention_dropout),
        ("hidden_dropout", training.hidden_dropout),
        ("lr_warmup_fraction", run.optimizer.lr_warmup_fraction or 0.0),
    ):
        if not 0 <= share < 1:
            raise ConfigError(f"{name}={share} is not a share. Give 0 or more and less than 1.")


def dtype_fits_the_platform(case: Case) -> Case | None:
    """The model trains in its own dtype on a GPU and in float32 on a CPU, unless another is asked for."""
    dtype = case.run.model.torch_dtype
    if dtype == "float16" and case.platform == "cpu":
        raise ConfigError("torch_dtype=float16 does not train on a CPU. Use bfloat16 or float32.")
    if dtype is None:
        return case.change("model", torch_dtype="float32" if case.platform == "cpu" else case.meta.dtype)
    return None


def fused_kernels_need_a_gpu(case: Case) -> Case | None:
    """On a CPU attention is SDPA, and fused permutation and gradient accumulation are plain."""
    if case.platform != "cpu":
        return None
    if case.run.model.attention_backend in ("flash", "fused"):
        asked = case.run.model.attention_backend
        case = case.change(
            "model",
            f"attention_backend={asked} needs a GPU; SDPA is used on the CPU.",
            attention_backend="auto",
        )
    for section, name in (
        ("training", "gradient_accumulation_fusion"),
        ("moe", "moe_permute_fusion"),
    ):
        if getattr(getattr(case.run, section), name):
            case = case.change(section, f"{name} needs a GPU; it is off on the CPU.", **{name: False})
    return case


def batches_divide(case: Case) -> Case:
    """A step has a whole number of micro batches on every data-parallel rank."""
    training, dp = case.run.training, case.layout.dp
    once = training.micro_batch_size * dp
    total, steps = training.global_batch_size, training.gradient_accumulation_steps
    sizes = f"micro_batch_size={training.micro_batch_size} x dp={dp}"
    if total is None:
        total = once * steps if steps else once * ceil(DEFAULT_GLOBAL_BATCH / once)
        note = f"global_batch_size={total}: {sizes} does not divide the default, {DEFAULT_GLOBAL_BATCH}."
        default_fits = steps is not None or total == DEFAULT_GLOBAL_BATCH
        return case.change(
            "training",
            None if default_fits else note,
            global_batch_size=total,
            gradient_accumulation_steps=None,
        )
    if total % once:
        below, above = total // once * once, (total // once + 1) * once
        raise ConfigError(
            f"global_batch_size={total} is not a multiple of {sizes} = {once}. "
            f"Choose {f'{below} or ' if below else ''}{above}, or another micro batch."
        )
    if steps is not None and steps * once != total:
        raise ConfigError(
            f"gradient_accumulation_steps={steps} contradicts global_batch_size={total}: {sizes} makes it "
            f"{total // once}. Give one of them."
        )
    return case.change("training", gradient_accumulation_steps=None)


def interleaved_stages_need_full_rounds(case: Case) -> None:
    """The interleaved schedule sends micro batches round the stages in groups of pp (megatron-core 0.16.1, schedules.py)."""
    parallel, training = case.run.parallel, case.run.training
    if parallel.vpp is None or parallel.vpp == 1 or training.global_batch_size is None:
        return
    micro_batches = training.global_batch_size // (training.micro_batch_size * case.layout.dp)
    if micro_batches % parallel.pp:
        unit = training.micro_batch_size * case.layout.dp * parallel.pp
        raise ConfigError(
            f"vpp={parallel.vpp} needs micro batches in multiples of pp={parallel.pp}, and global_batch_size="
            f"{training.global_batch_size} makes {micro_batches}. Choose a multiple of {unit}."
        )


def the_run_has_one_end(case: Case) -> Case | None:
    """Steps end a run before epochs do; one epoch where neither is given."""
    training = case.run.training
    if training.train_iters is None and training.num_train_epochs is None:
        return case.change("training", num_train_epochs=1.0)
    if training.train_iters is not None and training.num_train_epochs is not None:
        note = f"train_iters={training.train_iters} ends the run; num_train_epochs={training.num_train_epochs:g} is not used."
        return case.change("training", note, num_train_epochs=None)
    return None


def recomputation_is_complete(case: Case) -> Case | None:
    """Full recomputation has a method and a number of layers; selective has modules."""
    training = case.run.training
    layers = training.recompute_num_layers
    if training.recompute_granularity == "full":
        if training.recompute_modules:
            raise ConfigError(
                "recompute_modules is for recompute_granularity=selective; full recomputes whole layers. Leave one out."
            )
        if layers is not None and not 1 <= layers <= case.meta.num_layers:
            raise ConfigError(
                f"recompute_num_layers={layers} is not between 1 and num_layers={case.meta.num_layers}."
            )
        return case.change(
            "training",
            recompute_method=training.recompute_method or "uniform",
            recompute_num_layers=layers or 1,
        )
    if training.recompute_method is not None or layers is not None:
        raise ConfigError(
            "recompute_method and recompute_num_layers need recompute_granularity=full, not "
            f"{training.recompute_granularity}. Leave them out, or set it."
        )
    if training.recompute_granularity == "none":
        if training.recompute_modules:
            raise ConfigError("recompute_modules needs recompute_granularity=selective.")
        return None
    for module in training.recompute_modules:
        if module not in RECOMPUTE_MODULES:
            raise ConfigError(f"recompute_modules={module} is not known.{nearest(module, RECOMPUTE_MODULES)}")
    return case.change("training", recompute_modules=training.recompute_modules or ["core_attn"])


def the_learning_rate_has_a_default(case: Case) -> Case | None:
    """Adapters learn ten times faster than all parameters."""
    if case.run.optimizer.lr is None:
        return case.change("optimizer", lr=DEFAULT_LR[case.run.tuner.tuner_type])
    return None


def the_schedule_is_complete(case: Case) -> None:
    """Warm-up is said in one way, rates are ordered, and WSD knows its last phase."""
    optimizer = case.run.optimizer
    if optimizer.lr_warmup_fraction and optimizer.lr_warmup_iters:
        raise ConfigError(
            f"lr_warmup_iters={optimizer.lr_warmup_iters} and lr_warmup_fraction={optimizer.lr_warmup_fraction} are "
            "both set. Give one of them."
        )
    assert optimizer.lr is not None, "filled by the_learning_rate_has_a_default"
    if not 0 <= optimizer.min_lr <= optimizer.lr or not 0 <= optimizer.lr_warmup_init <= optimizer.lr:
        raise ConfigError(
            f"lr={optimizer.lr:g} must be at least min_lr={optimizer.min_lr:g} and lr_warmup_init="
            f"{optimizer.lr_warmup_init:g}, and none of them negative."
        )
    if optimizer.lr_decay_style == "WSD" and not optimizer.lr_wsd_decay_iters:
        raise ConfigError("lr_decay_style=WSD needs --lr_wsd_decay_iters, the steps of its last phase.")


def host_memory_holds_adamw_shards(case: Case) -> None:
    """Megatron offloads the state of a distributed AdamW alone (HybridDeviceOptimizer, OptimizerConfig; 0.16.1)."""
    chosen = case.run.optimizer
    if not chosen.optimizer_cpu_offload:
        return
    if chosen.optimizer != "adamw" or not case.run.parallel.use_distributed_optimizer:
        raise ConfigError(
            "optimizer_cpu_offload=true needs --optimizer adamw and --use_distributed_optimizer true. Set both, or leave "
            "the flag out."
        )
    if not 0.0 < chosen.optimizer_offload_fraction <= 1.0:
        raise ConfigError(
            f"optimizer_offload_fraction={chosen.optimizer_offload_fraction} is not a share. Give more than 0 and at most 1."
        )


def subspaces_are_of_whole_matrices(case: Case) -> Case | None:
    """GaLore projects matrices, and the distributed optimizer holds flat pieces of them."""
    chosen = case.run.optimizer
    if not chosen.use_galore:
        return None
    if chosen.optimizer != "adamw" or case.run.tuner.tuner_type != "full" or chosen.optimizer_cpu_offload:
        raise ConfigError(
            "use_galore=true needs --optimizer adamw, --tuner_type full and no --optimizer_cpu_offload. Adapters have low "
            "rank already."
        )
    if min(chosen.galore_rank, chosen.galore_update_proj_gap) < 1 or chosen.galore_scale <= 0:
        raise ConfigError(
            "galore_rank and galore_update_proj_gap are 1 or more, and galore_scale is above 0. Raise them."
        )
    if chosen.galore_proj_type == "full":
        raise ConfigError(
            "galore_proj_type=full is not built: between its own singular vectors a gradient is diagonal, and Adam makes whole "
            "steps of the rounding errors beside the diagonal. Give std, reverse_std, left or right."
        )
    if case.run.parallel.use_distributed_optimizer:
        note = "use_galore: moments are small, so every data-parallel rank holds them (use_distributed_optimizer is off)."
        return case.change("parallel", note, use_distributed_optimizer=False, overlap_param_gather=False)
    return None


def lengths_fit_the_model(case: Case) -> Case:
    """Samples fit the context, and packs hold at least one sample."""
    data, context = case.run.data, case.meta.max_length
    if data.max_length is not None and data.max_length > context:
        raise ConfigError(
            f"max_length={data.max_length} is above the context of {case.model_name}, {context} tokens. Choose at most "
            f"{context}; a longer context must be declared in config.json (max_position_embeddings, rope_scaling)."
        )
    max_length = data.max_length or context
    documents = texts_of_a_row(case.run)
    pack = data.packing_length or documents * max_length
    if pack < documents * max_length:
        whole = "a sample" if documents == 1 else f"all {documents} texts of a row"
        times = f"{documents} x " if documents > 1 else ""
        raise ConfigError(
            f"packing_length={pack} is below {times}max_length={max_length}: {whole} must fit a pack. Lower max_length."
        )
    return case.change(
        "data",
        max_length=max_length,
        packing_length=pack,
        data_seed=case.run.training.seed if data.data_seed is None else data.data_seed,
    )


def packs_are_free_of_padding(case: Case) -> None:
    """A pack is a row of documents, which padded rows are not."""
    if case.run.data.packing and not case.run.data.padding_free:
        raise ConfigError("packing=true needs padding_free=true. Leave --padding_free out.")


def text_is_split_for_pre_training_only(case: Case) -> None:
    """Cutting a conversation in two makes rows that nobody said."""
    if case.run.data.truncation_strategy == "split" and case.run.task != "pt":
        raise ConfigError(
            f"truncation_strategy=split is for `megaswift pt`, not {case.run.task}. Choose delete, left or right."
        )


def a_run_without_optimizer_state_does_not_resume(case: Case) -> Case | None:
    """Say at the start what a checkpoint will be good for."""
    if case.run.checkpoint.save_optim:
        return None
    return case.change("checkpoint", "save_optim=false: a run that stops cannot resume from its checkpoints.")


def what_is_saved_in_the_background_is_there(case: Case) -> None:
    """An export is gathered from all ranks, and written before training goes on."""
    if case.run.checkpoint.async_save and not case.run.checkpoint.save_optim:
        raise ConfigError(
            "async_save=true writes the state to resume from in the background, but save_optim=false saves none. "
            "Leave one of them out."
        )


def router_losses_have_a_kind(case: Case) -> Case | None:
    """A load-balancing loss is computed where it has a weight."""
    moe = case.run.moe
    if case.meta.moe is None or moe.moe_router_load_balancing_type is not None:
        return None
    return case.change("moe", moe_router_load_balancing_type="aux_loss" if moe.moe_aux_loss_coeff else "none")
