"""What the model answers to held-back rows at a validation, and how near that is to the answers of the rows.

The likeliest token is taken each time, so that figures depend on the weights alone, and no random state is touched.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from megaswift.checkpoint.store import Checkpoint
from megaswift.config.run import RunConfig
from megaswift.data.questions import Questions
from megaswift.data.tokenizer import load_tokenizer
from megaswift.logs import get_logger
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout
from megaswift.rollout.engine import Answer, Prompt, Sampling
from megaswift.rollout.nlg import nlg_scores
from megaswift.training.author import Author, Complete, completions_table, stop_ids_of
from megaswift.training.engine import Engine
from megaswift.training.reporters import JsonLines
from megaswift.training.setup import Sets

logger = get_logger(__name__)

Scored = tuple[str, dict[str, float] | None]  # what was written, and its scores where there are words


class Predictions:
    """Answers questions with the weights of now; every rank of the world calls it alike."""

    def __init__(
        self, author: Author, engine: Engine, questions: Questions, tokenizer: Any, *, table: JsonLines | None
    ) -> None:
        """`table` takes what is written, on rank 0."""
        self._author, self._engine, self._questions = author, engine, questions
        self._tokenizer, self._table = tokenizer, table

    def __call__(self, step: int) -> dict[str, float]:
        """Return the means over rows, times 100, of the scores of what is written after `step`. Raises UserError."""
        encoded = self._questions.prompts
        prompts = [
            Prompt(ids=np.asarray(encoded.input_ids[start:end]), key=(number,))
            for number, (start, end) in enumerate(zip(encoded.starts, encoded.starts[1:], strict=False))
        ]
        with self._engine.settled_parameters():
            found = self._author.write(prompts, self._scored, lead=likeliest)
        if self._table is not None:
            self._write(self._table, step, found)
        scores = [one for _, one in found if one is not None]
        if not scores:
            logger.warning("step %d: none of %d generated answers has words to compare", step, len(found))
            return {}
        return {name: 100 * fmean(one[name] for one in scores) for name in scores[0]}

    def _scored(self, places: Sequence[int], answers: Sequence[Answer]) -> list[Scored]:
        texts = self._tokenizer.batch_decode([one.ids for one in answers], skip_special_tokens=True)
        return [
            (text, nlg_scores(text, self._questions.answers[place]))
            for place, text in zip(places, texts, strict=True)
        ]

    def _write(self, table: JsonLines, step: int, found: Sequence[Scored]) -> None:
        asked = self._questions
        for source, answer, (text, scores) in zip(asked.sources, asked.answers, found, strict=True):
            table.report(
                {"step": step, "source": source, "completion": text, "answer": answer, "scores": scores}
            )


def likeliest(
    places: Sequence[int], prompts: Sequence[Prompt], complete: Complete, sampling: Sampling
) -> list[Answer]:
    """Return completions of the likeliest token each: those that are no matter of luck."""
    return complete(prompts, replace(sampling, top_k=1))


def predictions_of(
    run: RunConfig,
    meta: ModelMeta,
    layout: Layout,
    engine: Engine,
    sets: Sets,
    *,
    checkpoint: Checkpoint | None,
    group: Any,
) -> Predictions:
    """Return what answers the questions of a resolved run; every rank calls it. Raises UserError."""
    assert sets.questions is not None, "predict_with_generate"
    tokenizer = load_tokenizer(str(meta.folder), trust_remote_code=run.model.trust_remote_code)
    author = Author(
        run,
        meta,
        layout,
        [chunk.module for chunk in engine.chunks],
        stop_ids=stop_ids_of(meta, tokenizer),
        pad_id=sets.pad_id,
        group=group,
    )
    limit, size = run.logging.eval_iters, sets.settings.global_batch_size
    asked = sets.questions if limit < 0 else sets.questions.first(limit * size)
    return Predictions(author, engine, asked, tokenizer, table=completions_table(run, checkpoint))
