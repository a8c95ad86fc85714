"""Rules of --task_type: which settings a head needs, and what a loss of whole rows excludes."""

from collections.abc import Collection, Mapping

from megaswift.config.case import Case
from megaswift.config.embedding import LOSS_TYPES, EmbeddingConfig
from megaswift.config.field import declared
from megaswift.config.reranker import LOSS_TYPES as RERANKER_LOSSES
from megaswift.config.reranker import TASK_TYPES as RERANKERS
from megaswift.config.reranker import RerankerConfig
from megaswift.config.rollout_rules import distils_completions, generates
from megaswift.config.rows import embedding_loss_of, reranker_loss_of
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError, nearest


def heads_are_for_fine_tuning(run: RunConfig) -> None:
    """Labels and embeddings are learnt by `megaswift sft`."""
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


def embeddings_have_a_loss(run: RunConfig) -> None:
    """Settings of embeddings belong to their task, and each to its loss."""
    chosen, blank = run.embedding, EmbeddingConfig()
    kind = embedding_loss_of(run)
    is_embedding = run.model.task_type == "embedding"
    if is_embedding and kind not in LOSS_TYPES:
        raise ConfigError(
            f"loss_type={kind} is not built for task_type=embedding.{nearest(kind, LOSS_TYPES)}"
        )
    for name, value in vars(chosen).items():
        if name == "mrl_dims":
            continue
        if value != getattr(blank, name) and not (is_embedding and kind == "infonce"):
            raise ConfigError(
                f"{name}={value} is for --task_type embedding --loss_type infonce. Leave it out."
            )
    if chosen.infonce_temperature <= 0 or chosen.infonce_hard_negatives < 0:
        raise ConfigError(
            f"infonce_temperature={chosen.infonce_temperature:g} must be above 0, and infonce_hard_negatives="
            f"{chosen.infonce_hard_negatives} not below it."
        )
    if is_embedding and not chosen.infonce_use_batch and not chosen.infonce_hard_negatives:
        raise ConfigError(
            "infonce_use_batch=false leaves no negatives. Give --infonce_hard_negatives N, or leave it out."
        )
    if is_embedding and not run.data.padding_free:
        raise ConfigError(
            "padding_free=false does not go with task_type=embedding, which reads the last token of a text, whatever it is. "
            "Leave it out."
        )


def rerankers_have_a_loss(run: RunConfig) -> None:
    """Settings of rerankers belong to their tasks, and some to one of them, or to one loss."""
    chosen, blank, task, loss = run.reranker, RerankerConfig(), run.model.task_type, reranker_loss_of(run)
    if task in RERANKERS and loss not in RERANKER_LOSSES:
        raise ConfigError(
            f"loss_type={loss} is not built for task_type={task}.{nearest(loss, RERANKER_LOSSES)}"
        )
    for name, value in vars(chosen).items():
        wants = f"--task_type {' or '.join(RERANKERS)}"
        fits = task in RERANKERS
        if name.startswith("listwise_reranker"):
            wants, fits = f"{wants} with --loss_type listwise_reranker", fits and loss == "listwise_reranker"
        elif name.startswith("generative_reranker"):
            wants, fits = "--task_type generative_reranker", task == "generative_reranker"
        if value != getattr(blank, name) and not fits:
            raise ConfigError(f"{name}={value} is for {wants}. Leave it out.")
    if chosen.max_positive_samples < 1 or chosen.max_negative_samples < 1:
        raise ConfigError(
            f"max_positive_samples={chosen.max_positive_samples} and max_negative_samples={chosen.max_negative_samples}: a group "
            "has a positive and a negative document. Give 1 or more."
        )
    if chosen.listwise_reranker_temperature <= 0:
        raise ConfigError(
            f"listwise_reranker_temperature={chosen.listwise_reranker_temperature:g} is too small. Give more than 0."
        )
    fewest, most = chosen.listwise_reranker_min_group_size, 1 + chosen.max_negative_samples
    if not 2 <= fewest <= most:
        raise ConfigError(
            f"listwise_reranker_min_group_size={fewest} is not from 2 to {most} (a positive, and max_negative_samples="
            f"{chosen.max_negative_samples})."
        )


def judges_are_asked_and_answer(run: RunConfig) -> None:
    """A generative reranker reads what follows a question of a fixed form, whole."""
    if run.model.task_type != "generative_reranker":
        return
    data, chosen = run.data, run.reranker
    refused = {
        f"system={data.system}": (
            data.system is not None,
            "the question has a system turn of its own, and an instruction comes with the rows, as their system turn",
        ),
        "use_chat_template=false": (
            not data.use_chat_template,
            "the question is asked in the model's chat template",
        ),
        "enable_thinking=true": (data.enable_thinking is True, "the answer is read where it begins"),
        "truncation_strategy=right": (
            data.truncation_strategy == "right",
            "it cuts off where the answer begins",
        ),
        "padding_free=false": (
            not data.padding_free,
            "the answer is read behind the last token, whatever that is",
        ),
    }
    for setting, (is_so, reason) in refused.items():
        if is_so:
            raise ConfigError(
                f"{setting} does not go with task_type=generative_reranker: {reason}. Leave it out."
            )
    if chosen.generative_reranker_positive_token == chosen.generative_reranker_negative_token:
        raise ConfigError(
            f"generative_reranker_positive_token and generative_reranker_negative_token are both "
            f"{chosen.generative_reranker_positive_token!r}. Give two words."
        )


def parts_of_embeddings_exist(case: Case) -> None:
    """--mrl_dims names parts of the model's hidden states, and their weights."""
    dims, size = case.run.embedding.mrl_dims, case.meta.hidden_size
    if dims and case.run.model.task_type != "embedding":
        raise ConfigError(f"mrl_dims={dims} is for --task_type embedding. Leave it out.")
    for dim, weight in dims.items():
        if not dim.isdecimal() or not 0 < int(dim) <= size:
            raise ConfigError(
                f"mrl_dims names {dim} of the {size} numbers that {case.model_name} has for a token. Give 1 to {size}."
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight <= 0:
            raise ConfigError(f"mrl_dims weighs {dim} with {weight!r}. Give a number above 0.")


def predicts_tokens(run: RunConfig) -> bool:
    """Whether the loss is that of next tokens, which `megaswift sft` and `megaswift pt` have without another head."""
    return run.task != "rlhf" and run.model.task_type == "causal_lm"


def token_losses_are_of_answers(run: RunConfig) -> None:
    """A weight by probability is of tokens, and so are the mean of a channel and what makes an answer right."""
    asked = {
        "enable_dft_loss=true": run.training.enable_dft_loss,
        "enable_channel_loss=true": run.training.enable_channel_loss,
        "acc_strategy=seq": run.logging.acc_strategy == "seq",
    }
    for setting in [setting for setting, on in asked.items() if on]:
        if not predicts_tokens(run):
            what = "`megaswift rlhf`" if run.task == "rlhf" else f"task_type={run.model.task_type}"
            raise ConfigError(f"{setting} is for token losses, not for {what}. Leave it out.")


def noise_is_on_given_answers(run: RunConfig) -> None:
    """NEFTune is for answers that are learnt from as they are."""
    alpha = run.training.neftune_noise_alpha
    if alpha is not None and alpha < 0:
        raise ConfigError(f"neftune_noise_alpha={alpha} is too small. Give 0 or more, such as 5.")
    if alpha and (generates(run) or distils_completions(run)):
        raise ConfigError(
            f"neftune_noise_alpha={alpha} is for answers of the rows, not for completions that the run makes. Leave it out."
        )


def rows_are_whole_documents(case: Case) -> None:
    """A loss over documents is not a mean over micro batches of tokens."""
    run = case.run
    if run.training.calculate_per_token_loss or predicts_tokens(run):
        return
    what = "`megaswift rlhf`" if run.task == "rlhf" else f"task_type={run.model.task_type}"
    raise ConfigError(
        f"calculate_per_token_loss=false is for token losses: {what} always divides by the rows of the global batch. "
        "Leave it out."
    )


def variables_are_flags(run: RunConfig, given: Collection[str], environ: Mapping[str, str]) -> None:
    """What ms-swift reads from environment variables about groups of texts are flags here; raises ConfigError for one that is set."""
    if run.model.task_type not in ("embedding", *RERANKERS):
        return
    for flag, setting in declared(RunConfig).items():
        variable = flag.upper()
        if setting.section in ("embedding", "reranker") and variable in environ and flag not in given:
            value = environ[variable]
            raise ConfigError(
                f"{variable}={value} of the environment is not read. Give --{flag} {value}, or unset it."
            )
