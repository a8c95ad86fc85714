"""Names and values that ms-swift users type, in this project's settings.

A plain renaming is an alias of the field itself (config/model.py and its siblings). Here are the names whose *value*
changes on the way, and the names that ask for something which is always so.
Names and values: ms-swift 4.6.0.dev0 (swift/megatron/arguments, swift/arguments/base_args) and its releases 2 and 3.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from megaswift.config.value import Raw, number_of, text_of, truth_of
from megaswift.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Translated:
    """Settings that an old name stands for, and a line for the user where something is not as he may expect."""

    settings: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


def _is(flag: str, value: Any, note: str | None = None) -> Translated:
    return Translated(settings={flag: value}, note=note)


NOTHING = Translated()


def _bf16(name: str, raw: Raw) -> Translated:
    return _is("torch_dtype", "bfloat16") if truth_of(name, raw) else NOTHING


def _fp16(name: str, raw: Raw) -> Translated:
    return _is("torch_dtype", "float16") if truth_of(name, raw) else NOTHING


def _use_flash_attn(name: str, raw: Raw) -> Translated:
    return _is("attention_backend", "flash") if truth_of(name, raw) else NOTHING


def _inverted(flag: str) -> Callable[[str, Raw], Translated]:
    def translate(name: str, raw: Raw) -> Translated:
        return _is(flag, not truth_of(name, raw))

    return translate


def _chosen(flag: str, values: dict[str, Any]) -> Callable[[str, Raw], Translated]:
    """Translate one word by a table."""

    def translate(name: str, raw: Raw) -> Translated:
        word = text_of(name, raw)
        if word not in values:
            raise ConfigError(
                f"{name}={word} is not known here.{nearest(word, values)} The setting itself is --{flag}."
            )
        return _is(flag, values[word])

    return translate


def _gradient_checkpointing(name: str, raw: Raw) -> Translated:
    if not truth_of(name, raw):
        return _is("recompute_granularity", "none")
    return Translated(
        settings={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    )


def _deepspeed(name: str, raw: Raw) -> Translated:
    word = text_of(name, raw)
    stage = word.removesuffix("_offload")
    if word in ("none", ""):
        return NOTHING
    if word == "zero0":
        return _is("use_distributed_optimizer", False)
    if stage not in ("zero1", "zero2", "zero3"):
        raise ConfigError(
            f"{name}={word} is not understood: DeepSpeed is not used, and its files are not read. "
            "Choose zero0 to zero3, or zero2_offload and zero3_offload."
        )
    note = f"{name} {word}: Megatron-Core's distributed optimizer shards the optimizer state; DeepSpeed is not used."
    if stage == "zero3":
        note += (
            " Weights are sharded by --tensor_model_parallel_size and --pipeline_model_parallel_size, which the planner "
            "chooses where the command names no layout."
        )
    offload = {"optimizer_cpu_offload": True} if word != stage else {}
    return Translated(settings={"use_distributed_optimizer": True, **offload}, note=note)


def _ddp_timeout(name: str, raw: Raw) -> Translated:
    return _is("ddp_timeout_minutes", number_of(name, raw) / 60)


def _steps(flag: str) -> Callable[[str, Raw], Translated]:
    """transformers writes 'no limit' as -1."""

    def translate(name: str, raw: Raw) -> Translated:
        number = number_of(name, raw)
        return NOTHING if number < 0 else _is(flag, text_of(name, raw))

    return translate


def _optimizer_of_transformers(name: str, raw: Raw) -> Translated:
    word = text_of(name, raw)
    if word.startswith("adamw"):
        return _is("optimizer", "adamw")
    return _is("optimizer", word)


def _truncation(name: str, raw: Raw) -> Translated:
    """ms-swift 2 called the cut of the right end truncation_left and its opposite."""
    word = text_of(name, raw)
    return _is(
        "truncation_strategy", {"truncation_left": "left", "truncation_right": "right"}.get(word, word)
    )


def _finetune(name: str, raw: Raw) -> Translated:
    return _is("resume", "never" if truth_of(name, raw) else "auto")


def _resume_only_model(name: str, raw: Raw) -> Translated:
    if not truth_of(name, raw):
        return NOTHING
    raise ConfigError(
        f"{name}=true is not built. To start anew from saved weights, give the exported folder as --model."
    )


def _cached_dataset(name: str, raw: Raw) -> Translated:
    """A prepared folder is given as any other set."""
    return _is("dataset", raw) if raw else NOTHING


def _sequence_parallel_size(name: str, raw: Raw) -> Translated:
    return _is("context_parallel_size", text_of(name, raw))


TRANSLATIONS: dict[str, Callable[[str, Raw], Translated]] = {
    "bf16": _bf16,
    "fp16": _fp16,
    "gradient_checkpointing": _gradient_checkpointing,
    "deepspeed": _deepspeed,
    "ddp_timeout": _ddp_timeout,
    "max_steps": _steps("train_iters"),
    "warmup_steps": _steps("lr_warmup_iters"),
    "optim": _optimizer_of_transformers,
    "truncation": _truncation,
    "finetune": _finetune,
    "resume_only_model": _resume_only_model,
    "cached_dataset": _cached_dataset,
    "cached_val_dataset": lambda name, raw: NOTHING,  # join_cached_sets left it, as it names nothing
    "sequence_parallel_size": _sequence_parallel_size,
    "no_save_optim": _inverted("save_optim"),
    "save_only_model": _inverted("save_optim"),
    "attn_impl": _chosen(
        "attention_backend",
        {
            "auto": "auto",
            "sdpa": "auto",
            "eager": "unfused",
            "flash_attn": "flash",
            "flash_attention_2": "flash",
            "flash_attention_3": "flash",
        },
    ),
    "use_flash_attn": _use_flash_attn,
    "lr_scheduler_type": _chosen(
        "lr_decay_style",
        {
            "cosine": "cosine",
            "linear": "linear",
            "constant": "constant",
            "constant_with_warmup": "constant",
            "cosine_with_min_lr": "cosine",
            "inverse_sqrt": "inverse-square-root",
            "warmup_stable_decay": "WSD",
        },
    ),
}

# Asked for, and always so, or without effect on any result: one line says which.
ALWAYS_SO: dict[str, str] = {
    "log_rollout_offpolicy_metrics": "how vLLM's probabilities differ from the trainer's is always logged",
    "no_save_rng": "random states are a few kilobytes, and always saved beside an optimizer's: a run goes on as if nothing had been",
    "dataloader_drop_last": "every global batch is full: what an epoch leaves over opens the next",
    "remove_unused_columns": "columns that a task does not read are left alone, and rewards and schedulers get them all",
    "vllm_server_pass_dataset": "rewards and schedulers get all columns of a row",
    "bnb_4bit_compute_dtype": "products with a base in four bits have the type of --torch_dtype",
    "offload_bridge": "weights reach vLLM tensor by tensor, and no copy of them stays",
    "move_model_batches": "weights reach vLLM tensor by tensor",
    "experts_impl": "experts are Megatron-Core's",
    "teacher_deepspeed": "the teacher is spread over the ranks as the model that trains is",
    "label_names": "labels are what the task reads",
    "use_precision_aware_optimizer": "state and master weights of the optimizer are float32",
    "moe_shared_expert_overlap": "shared experts take their turn after the others, with the same result",
    "load_safetensors": "weights are always read from safetensors",
    "packing_cache": "packs are computed at the start and need no cache",
    "packing_num_proc": "packs are computed in one process",
    "load_from_cache_file": "rows are encoded anew at each start; --prepared_dir finds those encoded before",
    "overwrite_cache": "rows are encoded anew at each start; --prepared_dir finds those encoded before",
    "lazy_tokenize": "rows are encoded at the start, by --dataset_num_proc processes",
    "tensorboard_log_interval": "TensorBoard follows --logging_steps",
    "logging_first_step": "the first step is always logged",
    "check_model": "files that differ from the hub's are found when they are read",
    "create_checkpoint_symlink": "the pointer file in --output_dir names the newest checkpoint",
    "save_on_each_node": "each rank writes its own part to --output_dir, which all nodes share",
    "use_cpu_initialization": "weights are read straight into their shards",
    "perform_initialization": "weights that are read are not initialised first; --random_init true asks for random ones",
    "no_initialization": "weights that are read are not initialised first",
    "bridge_backend": "weights are converted by megaswift.converters",
    "ddp_backend": "the back end follows --platform: nccl on GPUs, gloo on CPUs",
    "ddp_find_unused_parameters": "Megatron-Core's own data parallelism is used",
    "nccl_comm_warmup": "NCCL opens its connections when they are first used",
    "dataloader_pin_memory": "batches are small integer tensors",
    "dataloader_persistent_workers": "workers stay",
    "dataloader_prefetch_factor": "the next batch is always prepared ahead",
    "per_device_eval_batch_size": "validation uses --micro_batch_size",
    "use_liger_kernel": "fused kernels come from Transformer Engine where it is installed",
    "use_logits_to_keep": "the output layer always runs only for tokens that carry loss",
    "masked_softmax_fusion": "attention is Transformer Engine's or torch's, whose kernels hold the softmax",
    "cross_entropy_loss_fusion": "the loss is computed by the output layer",
    "cross_entropy_fusion_impl": "the loss is computed by the output layer",
    "use_persistent_ckpt_worker": "checkpoints are written by the ranks themselves",
    "dist_ckpt_optim_fully_reshardable": "optimizer state can always be resumed in another layout",
    "dist_ckpt_save_pre_mcore_014": "checkpoints are in Megatron-Core's torch_dist format",
    "torch_empty_cache_steps": "the allocator's cache is left alone",
    "gradient_checkpointing_kwargs": "Megatron-Core recomputes without reentrant autograd",
    "is_binary_loss_scale": "weights of 0 and 1 are always folded into the labels",
    "save_missing_weights": "an export always holds every tensor of the model",
    "overlap_p2p_comm": "pipeline stages overlap their messages where the schedule allows it",
}


# A run of adapters is resumed from them, whose base is still to be read.
LOAD_POINTS = (("mcore_adapter", "mcore_adapters", "adapter_load"), ("mcore_model", "load"))


def join_resume_point(words: dict[str, Raw]) -> dict[str, Raw]:
    """Return `words` with ms-swift's two flags for resuming, `--mcore_model D --finetune false`, as `--resume D`."""
    points = next(filter(None, ([name for name in names if name in words] for names in LOAD_POINTS)), [])
    if not points or "finetune" not in words or truth_of("finetune", words["finetune"]):
        return words
    joined = {name: raw for name, raw in words.items() if name != "finetune" and name not in points}
    if "resume" in joined:
        raise ConfigError(
            f"{points[0]} with finetune=false and resume are the same setting (resume). Give one of them."
        )
    return {**joined, "resume": words[points[0]]}


def join_cached_sets(words: dict[str, Raw]) -> dict[str, Raw]:
    """Return `words` with ms-swift's `--cached_dataset D/train --cached_val_dataset D/val` as `--cached_dataset D`, which holds both.

    There may be no validation set.
    """
    train, val = (_paths(words.get(name)) for name in ("cached_dataset", "cached_val_dataset"))
    if not val and [path.name for path in train] != ["train"]:
        return words
    home = (val or train)[0].parent
    if (train, val or [home / "val"]) != ([home / "train"], [home / "val"]):
        raise ConfigError(
            f"cached_val_dataset={' '.join(map(str, val))} does not belong to cached_dataset={' '.join(map(str, train)) or 'none'}: what "
            "is tokenised ahead lies in one folder, D/train and D/val. Give both of one `megaswift data --prepare D`."
        )
    joined = {name: raw for name, raw in words.items() if name != "cached_val_dataset"}
    return {**joined, "cached_dataset": [str(home)]}


def _paths(raw: Raw) -> list[PurePath]:
    return [PurePath(str(one)) for one in (raw if isinstance(raw, (list, tuple)) else [raw]) if one]


def translate(name: str, raw: Raw) -> Translated | None:
    """Return what the old name `name` with value `raw` stands for, or None where it is no old name; raises ConfigError."""
    if name in TRANSLATIONS:
        return TRANSLATIONS[name](name, raw)
    if name in ALWAYS_SO:
        return Translated(note=f"{name}: {ALWAYS_SO[name]}.")
    return None
