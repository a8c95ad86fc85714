"""Settings: progress, metrics, validation."""

from dataclasses import dataclass

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run reports, and when."""

    logging_steps: int = setting(1, "optimizer steps between log lines", aliases=("log_interval",))
    report_to: list[str] = setting(
        ["tensorboard"],
        "tensorboard, wandb, swanlab (several at once), or none; logging.jsonl is always written. WANDB_MODE=offline and "
        "SWANLAB_MODE=offline keep lines in --output_dir where there is no network",
    )
    wandb_project: str | None = setting(None, "default: WANDB_PROJECT, else megaswift")
    wandb_exp_name: str | None = setting(
        None, "name of the run in wandb; default: WANDB_NAME, else --output_dir"
    )
    swanlab_project: str | None = setting(None, "default: SWANLAB_PROJ_NAME, else megaswift")
    swanlab_exp_name: str | None = setting(
        None, "name of the experiment in swanlab; default: SWANLAB_EXP_NAME, else --output_dir"
    )
    tensorboard_dir: str | None = setting(None, "default: OUTPUT_DIR/runs", aliases=("logging_dir",))
    eval_strategy: str | None = setting(
        None,
        "validate every --eval_steps, at the end of each epoch, or never; default: epoch with --save_strategy epoch and without "
        "--eval_steps, else steps",
        choices=("steps", "epoch", "no"),
        aliases=("evaluation_strategy",),
    )
    eval_steps: int | None = setting(
        None, "optimizer steps between validations; default: --save_steps", aliases=("eval_interval",)
    )
    eval_iters: int = setting(-1, "global batches in a validation; -1: the whole set")
    eval_metric: str | None = setting(
        None,
        "ms-swift's name of what validations report beside the loss, which they do in any case: acc for next tokens and seq_cls, "
        "infonce, paired (of embeddings with labels: the correlations of similarities with them, eval_pearson_cosine, eval_spearman_cosine "
        "and those of euclidean, manhattan, dot_product), reranker; nlg: what --predict_with_generate adds",
    )
    predict_with_generate: bool = setting(
        False,
        "at every validation of sft, generate the last answers of the held-back conversations as well, of the likeliest token each (nothing "
        "is drawn) and of --max_completion_length tokens at most, and log how near they are to those of the rows, from 0 to 100: "
        "eval_rouge-1, eval_rouge-2, eval_rouge-l, eval_bleu-4 (pip install 'megaswift[nlg]'). --eval_iters N: for the first N x "
        "--global_batch_size rows; --log_completions true writes them to completions.jsonl. One device of each copy of the model holds all "
        "of its weights meanwhile",
    )
    acc_strategy: str = setting(
        "token",
        "accuracy that sft and pt log: token: share of the loss tokens that are the likeliest ones (token_acc); seq: share of the samples "
        "of which all are (seq_acc)",
        choices=("token", "seq"),
    )
    metric_for_best_model: str | None = setting(
        None,
        "the figure of validations by which OUTPUT_DIR/best names a checkpoint and --early_stop_interval counts, with or without eval_: "
        "loss, token_acc, rouge-l, rewards/margins, accuracy and whatever else they report; default: loss, of grpo reward",
    )
    greater_is_better: bool | None = setting(
        None, "whether the best is the greatest; default: unless --metric_for_best_model contains loss"
    )
    early_stop_interval: int | None = setting(
        None,
        "validations in a row without a better --metric_for_best_model after which the run ends; default: never",
    )
    callbacks: list[str] = setting(
        [],
        "callbacks of your own: FILE.py:NAME, or entry points of the group megaswift.callbacks. NAME(run) gets the settings and returns an "
        "object with some of the methods after_step(step), after_validation(line) and after_save(folder), which every rank calls; the first "
        "two may return True to end the run",
    )
    verbose: bool = setting(False, "log debugging facts too")
