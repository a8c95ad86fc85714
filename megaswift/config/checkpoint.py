"""Settings: what is saved, where, and how a run resumes."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Training checkpoints and Hugging Face exports."""

    output_dir: str = setting("output", "folder of this run: checkpoints, logs, exports", aliases=("save",))
    save_steps: int = setting(500, "optimizer steps between checkpoints", aliases=("save_interval",))
    save_strategy: str = setting(
        "steps",
        "save every --save_steps, at the end of each epoch, or only at the end",
        choices=("steps", "epoch", "no"),
    )
    save_total_limit: int | None = setting(
        None, "complete checkpoints to keep; the newest and the best are never deleted"
    )
    save_safetensors: bool = setting(
        True, "write a complete Hugging Face folder (or PEFT adapter) at each save"
    )
    max_shard_size: str = setting("5GB", "largest safetensors file")
    save_optim: bool = setting(True, "save optimizer state, so that a run can resume", flag="save_optim")
    resume: str = setting(
        "auto",
        "auto: continue from the newest complete checkpoint in --output_dir; never; or a checkpoint folder",
        aliases=("resume_from_checkpoint",),
    )
    exit_after_save: bool = setting(False, "stop after the first checkpoint")
    async_save: bool = setting(
        False,
        "write the state to resume from in the background: training waits for a copy of it in host memory, where it takes as "
        "many bytes as on the disk (with GPUs up to twice as many, as it is pinned), and for the export, as without",
        aliases=("use_flash_ckpt",),
    )
