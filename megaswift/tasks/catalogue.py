"""Which task a run has."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from megaswift.config.preference import PreferenceConfig
from megaswift.config.reference import compares
from megaswift.config.reranker import TASK_TYPES as RERANKERS
from megaswift.config.rollout_rules import generates
from megaswift.config.rows import embedding_loss_of, reranker_loss_of
from megaswift.config.run import RunConfig
from megaswift.data.tokenizer import load_tokenizer, pad_id_of, token_of
from megaswift.metadata.meta import ModelMeta
from megaswift.tasks import classification, cpo, dpo, orpo, rm
from megaswift.tasks.answers import Answers, Outcome
from megaswift.tasks.embedding import Embedding, embedding_model
from megaswift.tasks.gkd import Distillation
from megaswift.tasks.grpo import Grpo, at_temperature
from megaswift.tasks.preference import Kto, Preference
from megaswift.tasks.reranker import Reranker, answer_scores
from megaswift.tasks.scores import DocumentScores, ReadScores, ScoresLoss, head_scores, scoring_model
from megaswift.tasks.sft import ACCURACIES, NextToken
from megaswift.tasks.task import CallIn, RunModel, Task, run_model

# rlhf_type -> the loss of pairs, and the names of what it logs
PAIR_LOSSES: dict[str, tuple[Callable[[Answers, PreferenceConfig], Outcome], tuple[str, ...]]] = {
    "dpo": (dpo.dpo_loss, dpo.METRICS),
    "orpo": (orpo.orpo_loss, orpo.METRICS),
    "simpo": (cpo.simpo_loss, cpo.METRICS),
    "cpo": (cpo.cpo_loss, cpo.METRICS),
}


def trained_model(run: RunConfig, meta: ModelMeta, *, pad_id: int | None = None) -> ModelMeta:
    """Return the facts of the model that the task trains: a reward model and a classifier have another head, an embedding
    model has none, and GRPO's logits are divided by the temperature at which it samples.

    `pad_id` is that of the model's tokenizer unless given. Raises UserError.
    """
    if generates(run):
        return at_temperature(meta, run.rollout.temperature)
    if run.model.task_type == "embedding":
        return embedding_model(meta)
    if run.model.task_type == "generative_reranker":
        if pad_id is None:
            judging_words(run, meta)  # an error now is better than one after minutes of loading weights
        return meta
    is_classifier, is_reranker = run.model.task_type == "seq_cls", run.model.task_type == "reranker"
    if not is_classifier and not is_reranker and (run.task != "rlhf" or run.preference.rlhf_type != "rm"):
        return meta
    if pad_id is None:
        trust = run.model.trust_remote_code
        pad_id = pad_id_of(load_tokenizer(str(meta.folder), trust_remote_code=trust))
    return scoring_model(
        meta,
        num_labels=run.model.num_labels or 1,
        pad_id=pad_id,
        problem_type=run.model.problem if is_classifier else None,
        asked="rlhf_type=rm" if run.task == "rlhf" else f"task_type={run.model.task_type}",
    )


def judging_words(run: RunConfig, meta: ModelMeta) -> tuple[int, int]:
    """Return the tokens with which a generative reranker says that a document is relevant, and that it is not. Raises UserError."""
    tokenizer = load_tokenizer(str(meta.folder), trust_remote_code=run.model.trust_remote_code)
    yes, no = run.reranker.generative_reranker_positive_token, run.reranker.generative_reranker_negative_token
    return (
        token_of(tokenizer, yes, setting="generative_reranker_positive_token"),
        token_of(tokenizer, no, setting="generative_reranker_negative_token"),
    )


def make_task(
    run: RunConfig,
    meta: ModelMeta,
    *,
    reference: Sequence[Any] | None = None,
    teacher: Sequence[Any] | None = None,
    call_in: CallIn = nullcontext,
    words: tuple[int, int] | None = None,
    run_model: RunModel = run_model,
) -> Task:
    """Return the task of a resolved run on the model of trained_model().

    `reference` are the chunks of a frozen model to compare with, `teacher` those of one to learn from, where there is one, which
    `call_in` brings to memory; `words` are those of judging_words(), read from the tokenizer unless given.

    Pre-training differs from fine-tuning in the data alone: its loss mask is one everywhere.
    """
    settings = run.preference
    if run.model.task_type == "seq_cls":
        loss = partial(classification.classification_loss, problem=run.model.problem)
        return _document_scores(loss, classification.METRICS[run.model.problem], meta, run_model)
    if run.model.task_type in RERANKERS:
        read = (
            _head_scores(meta)
            if run.model.task_type == "reranker"
            else partial(answer_scores, words=words or judging_words(run, meta))
        )
        return Reranker(reranker_loss_of(run), run.reranker, read=read, run=run_model)
    if run.model.task_type == "embedding":
        return Embedding(embedding_loss_of(run), run.embedding, run=run_model)
    if run.task != "rlhf":
        accuracy = ACCURACIES[run.logging.acc_strategy]
        return NextToken(accuracy, by_probability=run.training.enable_dft_loss, run=run_model)
    if settings.rlhf_type == "kto":
        return Kto(settings, reference=reference, run=run_model)
    if settings.rlhf_type == "gkd":
        return Distillation(settings, teacher=teacher, call_in=call_in, run=run_model)
    if settings.rlhf_type == "grpo":
        return Grpo(settings, run.rollout, run.sampler, run.policy, run=run_model)
    if settings.rlhf_type == "rm":
        return _document_scores(partial(rm.rm_loss, settings=settings), rm.METRICS, meta, run_model)
    pair_loss, metrics = PAIR_LOSSES[settings.rlhf_type]
    return Preference(
        settings, pair_loss, metrics=metrics, compares=compares(run), reference=reference, run=run_model
    )


def logged_beside_the_loss(run: RunConfig, meta: ModelMeta) -> list[str]:
    """Return the names of what the task of a resolved run logs, but for channels, which are in the rows; arguments as make_task's."""
    task = make_task(run, meta)
    return list(task.summary(dict.fromkeys(task.metrics, 0.0)))


def _document_scores(
    loss: ScoresLoss, metrics: Sequence[str], meta: ModelMeta, run_model: RunModel
) -> DocumentScores:
    return DocumentScores(loss, metrics=metrics, read=_head_scores(meta), run=run_model)


def _head_scores(meta: ModelMeta) -> ReadScores:
    pad_id = int(str(meta.raw["pad_token_id"]))  # as scoring_model has written it
    return partial(head_scores, pad_id=pad_id)
