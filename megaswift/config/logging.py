"""Settings: progress, metrics, validation."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run reports, and when."""

    logging_steps: int = setting(1, "optimizer steps between log lines", aliases=("log_interval",))
    report_to: list[str] = setting(["tensorboard"], "tensorboard or none; logging.jsonl is always written")
    tensorboard_dir: str | None = setting(None, "default: OUTPUT_DIR/runs", aliases=("logging_dir",))
    eval_steps: int | None = setting(
        None, "optimizer steps between validations; default: --save_steps", aliases=("eval_interval",)
    )
    eval_iters: int = setting(-1, "global batches in a validation; -1: the whole set")
    early_stop_interval: int | None = setting(
        None, "validations in a row without a lower loss after which the run ends; default: never"
    )
    verbose: bool = setting(False, "log debugging facts too")
