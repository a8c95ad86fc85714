"""Rules of --task_type: which settings a head needs, and what a loss of whole rows excludes."""

from megaswift.config.case import Case
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError


def heads_are_for_fine_tuning(run: RunConfig) -> None:
    """Labels are learnt by `megaswift sft`."""
    if run.model.task_type != "causal_lm" and run.task != "sft":
        raise ConfigError(
            f"task_type={run.model.task_type} is for `megaswift sft`, not `megaswift {run.task}`. Leave it out."
        )


def labels_are_counted(run: RunConfig) -> None:
    """A classifier knows how many labels there are; nothing else has any."""
    model = run.model
    if model.task_type != "seq_cls":
        for name, value in (("num_labels", model.num_labels), ("problem_type", model.problem_type)):
            if value is not None:
                raise ConfigError(
                    f"{name}={value} is for sequence classification. Add --task_type seq_cls, or leave it out."
                )
        return
    if model.num_labels is None:
        raise ConfigError(
            "task_type=seq_cls needs num_labels. Give --num_labels N; the column label then holds 0 to N - 1."
        )
    fewest = 2 if model.problem == "single_label_classification" else 1
    if model.num_labels < fewest:
        raise ConfigError(
            f"num_labels={model.num_labels} is too small for {model.problem}. Give {fewest} or more."
        )


def rows_are_whole_documents(case: Case) -> None:
    """A loss over documents is not a mean over micro batches of tokens."""
    run = case.run
    if run.training.calculate_per_token_loss or (run.task != "rlhf" and run.model.task_type == "causal_lm"):
        return
    what = "`megaswift rlhf`" if run.task == "rlhf" else f"task_type={run.model.task_type}"
    raise ConfigError(
        f"calculate_per_token_loss=false is for token losses: {what} always divides by the rows of the global batch. "
        "Leave it out."
    )
