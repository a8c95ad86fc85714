"""What one rank is fed when a teacher is learnt from on completions: Agarwal et al. 2023 (arXiv 2306.13649), algorithm 1.

At every step a number from 0 to 1 is drawn: below lambda the student completes the prompts of all rows of the global batch;
else they have their own answers, or with --seq_kd the teacher's. What is drawn follows from the seed and the rows consumed alone,
every completion from the seed, the epoch and its row: the same under every layout, and after a resume. With packing the global
batch counts packs of rows, or rows where no answer of theirs is ever read; completions are packed anew at every step.
"""

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import numpy as np
from megatron.core import parallel_state

from megaswift.checkpoint.store import Checkpoint
from megaswift.config.run import RunConfig
from megaswift.data.batches import BatchSettings, MicroBatch, TrainData
from megaswift.data.encode import EncodedSet
from megaswift.data.prompt_set import PromptSet
from megaswift.data.prompts import PromptRows
from megaswift.data.tokenizer import load_tokenizer
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout
from megaswift.rollout.engine import Answer, Prompt
from megaswift.rollout.generate import chances
from megaswift.rollout.rollout import Completions, joined
from megaswift.tasks.task import CallIn
from megaswift.training.author import Author, completions_table, stop_ids_of
from megaswift.training.engine import Engine
from megaswift.training.feed import TrainFeed
from megaswift.training.guides import Guides
from megaswift.training.reference import teacher_meta
from megaswift.training.reporters import JsonLines
from megaswift.training.set_aside import room_for_authors
from megaswift.training.setup import Sets

LOT = (0, 1)  # behind seed and position: keys of completions go on otherwise


class Writer(Enum):
    """Whose answers a step learns from."""

    ROWS = "rows"
    STUDENT = "student"
    TEACHER = "teacher"


def writer_of(*, seed: int, consumed: int, lmbda: float, seq_kd: bool) -> Writer:
    """Return whose answers the step learns from that follows so many consumed items."""
    if chances((seed, consumed, *LOT), length=1)[0] < lmbda:
        return Writer.STUDENT
    return Writer.TEACHER if seq_kd else Writer.ROWS


class DistillationFeed(TrainFeed):
    """This data-parallel rank's share of each step's answers; every rank of the world calls it alike."""

    phase, patient = "generating completions", True

    def __init__(
        self,
        data: TrainData,
        authors: dict[Writer, Author],
        *,
        run: RunConfig,
        engine: Engine,
        settings: BatchSettings,
        prompts: EncodedSet,
        rows: PromptRows,
        pad_id: int,
        tokenizer: Any,
        table: JsonLines | None,
        call_in: CallIn,
        dp_rank: int,
        dp: int,
    ) -> None:
        """`prompts` are those of the entries of `data`, `rows` what is behind them; `settings` are those of batches of
        completions, which `table` takes on rank 0; `call_in` brings a teacher to memory who writes."""
        super().__init__(data, dp_rank=dp_rank, dp=dp)
        self._train, self._authors, self._run, self._engine = data, authors, run, engine
        self._asked, self._pad_id = PromptSet(encoded=prompts, rows=rows), pad_id
        self._settings = settings
        self._tokenizer, self._table, self._call_in = tokenizer, table, call_in
        self._figures: dict[str, float] = {}

    def batch(self, consumed: int) -> list[MicroBatch]:
        """Return the micro batches of the global batch that follows `consumed` items. Raises UserError."""
        chosen = self._run.preference
        seed = self._run.training.seed
        writer = writer_of(seed=seed, consumed=consumed, lmbda=chosen.lmbda, seq_kd=chosen.seq_kd)
        self._figures = {"on_policy": float(writer is Writer.STUDENT)}
        if writer is Writer.ROWS:
            return super().batch(consumed)
        prompts = [
            Prompt(ids=self._asked.ids(entry), key=(seed, epoch, entry))
            for epoch, entry in self._entries(consumed)
        ]
        with self._engine.settled_parameters() if writer is Writer.STUDENT else self._call_in():
            answers = self._authors[writer].write(prompts, lambda places, answers: list(answers))
        completions = Completions(
            **joined([prompt.ids for prompt in prompts], answers), targets=self._targets(consumed)
        )
        self._figures |= completions.length_figures()
        if self._table is not None:
            self._write(self._table, consumed, writer, answers)
        settings = replace(self._settings, global_batch_size=len(completions))
        batches = completions.micro_batches(settings, dp_rank=self._dp_rank, dp=self._dp, pad_id=self._pad_id)
        return [replace(batch, is_own=writer is Writer.STUDENT) for batch in batches]

    def figures(self) -> dict[str, float]:
        """Return who wrote the newest batch, and lengths of completions."""
        return self._figures

    def _entries(self, consumed: int) -> list[tuple[int, int]]:
        """Return epoch and number of every entry of the global batch that follows `consumed` items."""
        data, packs = self._train, self._train.packs
        return [
            ((consumed + place) // data.num_items, int(entry))
            for place, item in enumerate(data.items(consumed))
            for entry in ([item] if packs is None else packs[int(item)])
        ]

    def _targets(self, consumed: int) -> np.ndarray | None:
        """Return what the rows of a global batch say beside their text: the numbers of their teachers, if there are several."""
        targets = self._train.encoded.targets
        return None if targets is None else targets[[entry for _, entry in self._entries(consumed)]]

    def _write(self, table: JsonLines, consumed: int, writer: Writer, answers: Sequence[Answer]) -> None:
        texts = self._tokenizer.batch_decode([one.ids for one in answers], skip_special_tokens=True)
        for (_, entry), text, answer in zip(self._entries(consumed), texts, answers, strict=True):
            row = self._asked.row(entry)
            table.report(
                {
                    "step": consumed // self.items_per_step + 1,
                    "source": row.source,
                    "prompt": row.messages,
                    "writer": writer.value,
                    "completion": text,
                    "tokens": len(answer.ids),
                }
            )


def distillation_feed(
    run: RunConfig,
    meta: ModelMeta,
    layout: Layout,
    engine: Engine,
    sets: Sets,
    guides: Guides,
    *,
    checkpoint: Checkpoint | None,
    group: Any,
) -> DistillationFeed:
    """Return the feed of a resolved run; `checkpoint` is the one that it goes on from. Every rank calls it; raises UserError."""
    assert sets.rows is not None and sets.prompts is not None and isinstance(sets.train, TrainData)
    tokenizer = load_tokenizer(str(meta.folder), trust_remote_code=run.model.trust_remote_code)
    theirs = teacher_meta(run, meta)
    stop_ids = tuple(sorted({*stop_ids_of(meta, tokenizer), *theirs.eos_token_ids}))

    aside = room_for_authors(run, engine, guides.frozen)

    def author(meta: ModelMeta, chunks: Any, **more: Any) -> Author:
        return Author(run, meta, layout, chunks, stop_ids=stop_ids, pad_id=sets.pad_id, group=group, **more)

    authors = {}  # those who will write: an engine may be held by each
    student = [chunk.module for chunk in engine.chunks]
    if run.preference.lmbda:
        authors[Writer.STUDENT] = author(meta, student, aside=aside)
    if run.preference.seq_kd and guides.served is not None:  # it has devices of its own
        authors[Writer.TEACHER] = author(meta, student, served=guides.served.servers[0])
    elif run.preference.seq_kd:
        authors[Writer.TEACHER] = author(theirs, guides.teacher, aside=aside)
    return DistillationFeed(
        sets.train,
        authors,
        run=run,
        engine=engine,
        settings=sets.settings,
        prompts=sets.prompts,
        rows=sets.rows,
        pad_id=sets.pad_id,
        tokenizer=tokenizer,
        table=completions_table(run, checkpoint),
        call_in=guides.call_in,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp=layout.dp,
    )
