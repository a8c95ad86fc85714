"""Rules between the settings that say where figures go, and when."""

from importlib.metadata import entry_points
from importlib.util import find_spec

from megaswift.config.case import Case
from megaswift.config.head_rules import predicts_tokens
from megaswift.config.reranker import TASK_TYPES
from megaswift.config.rollout_rules import generates
from megaswift.config.rows import embedding_loss_of
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError, nearest

NLG = ("jieba", "rouge", "nltk")  # what scores generated text: rollout/nlg.py
CALLBACK_GROUP = "megaswift.callbacks"  # of entry points
CALLBACKS_OF_EVERY_RUN = ("print", "default_flow")  # ms-swift's names of what happens without them
# ms-swift's callbacks -> the flag of what they do
FLAGS_OF_CALLBACKS = {
    **{name: f"--report_to {name}" for name in ("tensorboard", "wandb", "swanlab")},
    "early_stop": "--early_stop_interval",
    "lisa": "--lisa_activated_layers",
}
SERVICES = ("wandb", "swanlab")  # packages of their own: training/services.py


def reports_are_known(run: RunConfig) -> None:
    """Metrics go where they can be written; who names a project asks for its service."""
    logging = run.logging
    for name in logging.report_to:
        if name not in ("tensorboard", "none", *SERVICES):
            raise ConfigError(
                f"report_to={name} is not known. Choose from tensorboard, {', '.join(SERVICES)} and none; logging.jsonl is always "
                "written."
            )
        if name in SERVICES and not _is_installed(name):
            raise ConfigError(
                f"report_to={name} needs the package {name}, which is not installed. Install it (pip install 'megaswift[{name}]'), or "
                "leave it out."
            )
    named = {
        "wandb_project": logging.wandb_project,
        "wandb_exp_name": logging.wandb_exp_name,
        "swanlab_project": logging.swanlab_project,
        "swanlab_exp_name": logging.swanlab_exp_name,
    }
    for flag, value in named.items():
        service = flag.partition("_")[0]
        if value is not None and service not in logging.report_to:
            raise ConfigError(f"{flag}={value} is for --report_to {service}. Add it, or leave the name out.")


def metrics_belong_to_the_task(run: RunConfig) -> None:
    """What validations report follows from the task; who asks for something else is told so."""
    asked, task = run.logging.eval_metric, run.model.task_type
    of_texts = "infonce" if embedding_loss_of(run) == "infonce" else "paired"
    by_task = {"seq_cls": "acc", "embedding": of_texts, **dict.fromkeys(TASK_TYPES, "reranker")}
    reported = by_task.get(task)
    if task == "seq_cls" and run.model.problem == "regression":
        reported = None
    if predicts_tokens(run):
        reported = "acc"
    if asked == "nlg" and run.logging.predict_with_generate:
        return
    if asked == "nlg" and run.task == "sft" and task == "causal_lm":
        raise ConfigError("eval_metric=nlg needs generated answers. Add --predict_with_generate true.")
    if asked not in (None, reported):
        what = f"the loss and eval_metric={reported}" if reported else "the loss"
        raise ConfigError(
            f"eval_metric={asked} is not built for this task: validations report {what}. Leave it out."
        )


def answers_are_generated_for_held_back_rows(run: RunConfig) -> None:
    """Generated answers are compared with those of conversations, by packages of their own."""
    if not run.logging.predict_with_generate:
        return
    if run.task != "sft" or run.model.task_type != "causal_lm":
        asked = f"megaswift {run.task}" + (f" --task_type {run.model.task_type}" if run.task == "sft" else "")
        raise ConfigError(
            f"predict_with_generate=true is for `megaswift sft` of language models, not `{asked}`. Leave it out."
        )
    if not _validates(run):
        raise ConfigError(
            "predict_with_generate=true needs validations. Give --val_dataset or --split_dataset_ratio, or leave it out."
        )
    if run.data.streaming:
        raise ConfigError(
            "predict_with_generate=true is not built for streaming=true, whose rows are not kept. Leave one of them out."
        )
    missing = [name for name in NLG if not _is_installed(name)]
    if missing:
        raise ConfigError(
            f"predict_with_generate=true needs {', '.join(missing)}, which is not installed. Install it (pip install "
            "'megaswift[nlg]'), or leave it out."
        )


def an_early_end_follows_from_validations(run: RunConfig) -> None:
    """Whether a run is worth going on with is judged by held-back rows."""
    if run.logging.early_stop_interval is not None and not _validates(run):
        raise ConfigError(
            f"early_stop_interval={run.logging.early_stop_interval} needs validations. Give --val_dataset or "
            "--split_dataset_ratio, or leave it out."
        )


def the_best_checkpoint_follows_from_validations(run: RunConfig) -> None:
    """Another measure than the usual one, which asks for nothing, is one of held-back rows."""
    if _validates(run):
        return
    chosen, usual = run.logging, _usual_metric(run)
    metric = (chosen.metric_for_best_model or usual).removeprefix("eval_")
    if metric != usual:
        asked = f"metric_for_best_model={chosen.metric_for_best_model}"
    elif chosen.greater_is_better not in (None, "loss" not in metric):
        asked = f"greater_is_better={str(chosen.greater_is_better).lower()}"
    else:
        return
    raise ConfigError(
        f"{asked} needs validations. Give --val_dataset or --split_dataset_ratio, or leave it out."
    )


def _usual_metric(run: RunConfig) -> str:
    """Return the figure of validations that says what is best where nobody chose one."""
    return "reward" if generates(run) else "loss"


def callbacks_are_named(run: RunConfig) -> None:
    """Callbacks are of one's own; what ms-swift calls one is done without, or has a flag."""
    known = entry_points(group=CALLBACK_GROUP).names
    for name in run.logging.callbacks:
        if name in known or name in CALLBACKS_OF_EVERY_RUN or ".py:" in name:
            continue
        if name in FLAGS_OF_CALLBACKS:
            raise ConfigError(
                f"callbacks={name} has a flag of its own here. Give {FLAGS_OF_CALLBACKS[name]} instead."
            )
        raise ConfigError(
            f"callbacks={name} is neither FILE.py:NAME nor an entry point of {CALLBACK_GROUP}.{nearest(name, known)}"
        )


def validations_have_a_time(run: RunConfig) -> None:
    """Who validates by epochs, or never, counts no steps in between."""
    chosen = run.logging
    if chosen.eval_strategy in ("epoch", "no") and chosen.eval_steps is not None:
        raise ConfigError(
            f"eval_steps={chosen.eval_steps} is for eval_strategy=steps, not {chosen.eval_strategy}. Leave one of them out."
        )


def reports_have_a_place_and_a_time(case: Case) -> Case:
    """TensorBoard files lie in the run's folder, validation comes with each checkpoint, and the lowest loss or another figure is best."""
    logging, checkpoint = case.run.logging, case.run.checkpoint
    eval_steps = logging.eval_steps or checkpoint.save_steps
    by_epochs = checkpoint.save_strategy == "epoch" and logging.eval_steps is None
    strategy = logging.eval_strategy or ("epoch" if by_epochs else "steps")
    if checkpoint.save_strategy == "epoch":
        apart, mend = strategy != "epoch", "Give --eval_strategy epoch"
    else:
        apart = strategy == "epoch" or checkpoint.save_steps % eval_steps > 0
        mend = (
            f"Make save_steps a multiple of eval_steps={eval_steps}"
            if strategy == "steps"
            else "Give --save_strategy epoch"
        )
    note = f"some checkpoints are saved at steps that are not validated, and the best one is chosen among the others. {mend} to choose among all."
    metric = (logging.metric_for_best_model or _usual_metric(case.run)).removeprefix("eval_")
    greater = "loss" not in metric if logging.greater_is_better is None else logging.greater_is_better
    return case.change(
        "logging",
        note if apart and checkpoint.save_strategy != "no" and _validates(case.run) else None,
        tensorboard_dir=logging.tensorboard_dir or f"{checkpoint.output_dir}/runs",
        eval_strategy=strategy,
        eval_steps=eval_steps if strategy == "steps" else None,
        eval_iters=0 if strategy == "no" else logging.eval_iters,
        metric_for_best_model=metric,
        greater_is_better=greater,
    )


def _is_installed(package: str) -> bool:
    """Return whether a package is there; a folder of that name in the working directory, where wandb leaves one, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _validates(run: RunConfig) -> bool:
    chosen = run.logging
    rows = run.data.val_dataset or run.data.split_dataset_ratio
    return bool(rows and chosen.eval_iters and chosen.eval_strategy != "no")
