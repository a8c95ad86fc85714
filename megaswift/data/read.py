"""Data sets named on the command line, read into Samples; every row is kept or reported."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.config.data import DataConfig
from megaswift.data.layouts import to_sample
from megaswift.data.mixture import draw, log_mixture, select
from megaswift.data.report import BadRow, Report, merge, stop_at
from megaswift.data.rows import Row
from megaswift.data.sample import STUMBLES, RowError, Sample, row_error
from megaswift.data.sources import Source, open_source, parse_source
from megaswift.errors import DataError
from megaswift.logs import get_logger

logger = get_logger(__name__)

DEFAULT_NAME = "Swift"
DEFAULT_AUTHOR = "the megaswift developers"


@dataclass(frozen=True, kw_only=True)
class ReadSet:
    """The rows of one --dataset argument."""

    name: str
    samples: tuple[Sample, ...]  # after sampling
    drawn: Sequence[int]  # which of its usable rows they are
    report: Report  # of all its rows, before sampling
    layouts: dict[str, int] = field(default_factory=dict)  # rows of each recognised layout


@dataclass(frozen=True, kw_only=True)
class ReadData:
    """Training and validation samples, and the ledger of every row that was read."""

    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    report: Report
    sets: tuple[ReadSet, ...]


def read_datasets(config: DataConfig, *, seed: int = 42, use_hf: bool = True) -> ReadData:
    """Read --dataset and --val_dataset, sample them, and split off --split_dataset_ratio for validation.

    `seed` is used where --data_seed is not given. Raises DataError for a set that cannot be read, for a set without
    a usable row, and with --strict for the first bad row.
    """
    if not config.dataset:
        raise DataError(
            "dataset=[] names no rows to train on. Give --dataset with files, folders or hub ids."
        )
    if not 0 <= config.split_dataset_ratio < 1:
        raise DataError(
            f"split_dataset_ratio={config.split_dataset_ratio} is wrong. It is a share from 0 to below 1."
        )
    seed = config.data_seed if config.data_seed is not None else seed
    train_sets = [read_set(parse_source(name, use_hf=use_hf), config, seed=seed) for name in config.dataset]
    val_sets = [read_set(parse_source(name, use_hf=use_hf), config, seed=seed) for name in config.val_dataset]
    sets = (*train_sets, *val_sets)
    samples = [sample for read in sets for sample in read.samples]
    counts = [len(read.samples) for read in train_sets]
    firsts = accumulate((read.report.kept for read in train_sets), initial=0)
    drawn = [np.array(read.drawn) + first for read, first in zip(train_sets, firsts, strict=False)]
    chosen = select(
        counts, [len(read.samples) for read in val_sets], config, seed=seed, drawn=np.concatenate(drawn)
    )
    if config.interleave_prob:
        log_mixture([read.name for read in train_sets], counts, chosen.train)
    return ReadData(
        train=tuple(samples[i] for i in chosen.train),
        val=tuple(samples[i] for i in chosen.val),
        report=merge(read.report for read in sets),
        sets=sets,
    )


def read_set(source: Source, config: DataConfig, *, seed: int) -> ReadSet:
    """Read all rows of one source and draw the sample that it asks for."""
    rows, folder = open_source(source)
    samples, bad = take_rows(rows, config, source=source, folder=folder)
    report = Report(read=len(samples) + len(bad), kept=len(samples), bad=tuple(bad))
    report.log(source.name)
    if not samples:
        raise no_usable_row(source.name, report)
    layouts = dict(Counter(sample.layout for sample in samples).most_common())
    wanted = source.rows
    drawn = range(len(samples)) if wanted is None else draw(len(samples), wanted, seed=seed)
    return ReadSet(
        name=source.name,
        samples=tuple(samples[i] for i in drawn),
        drawn=drawn,
        report=report,
        layouts=layouts,
    )


def read_first(source: Source, config: DataConfig, *, count: int) -> tuple[list[Sample], list[BadRow]]:
    """Return what the first `count` rows of a source are, usable or not; raises DataError where it cannot be read at all."""
    rows, folder = open_source(source)
    return take_rows(islice(rows, count), config, source=source, folder=folder)


def take_rows(
    rows: Iterable[Row], config: DataConfig, *, source: Source, folder: Path
) -> tuple[list[Sample], list[BadRow]]:
    """Return the Samples of raw rows and those that are none; with --strict raises DataError for the first of these."""
    samples: list[Sample] = []
    bad: list[BadRow] = []
    for place, row in rows:
        outcome = _sample_or_bad(place, row, config, folder=folder, dataset=source.tag)
        if isinstance(outcome, Sample):
            samples.append(_named(outcome, config) if source.is_self_cognition else outcome)
            continue
        if config.strict:
            stop_at(outcome)
        bad.append(outcome)
    return samples, bad


def no_usable_row(name: str, report: Report) -> DataError:
    """Return the error of a set that has nothing to train on."""
    first = f" The first reason: {report.bad[0]}." if report.bad else ""
    return DataError(
        f"dataset={name} has no usable row ({report.read} read).{first} Mend the file or name another."
    )


def _sample_or_bad(
    place: str, row: dict[str, Any] | BadRow, config: DataConfig, *, folder: Path, dataset: str
) -> Sample | BadRow:
    if isinstance(row, BadRow):
        return row
    try:
        return to_sample(row, place, columns=config.columns, folder=folder, dataset=dataset)
    except (RowError, *STUMBLES) as error:
        refused = row_error(error)
        return BadRow(source=place, kind=refused.kind, reason=refused.reason)


def _named(sample: Sample, config: DataConfig) -> Sample:
    """Put the model's and the author's name into a self-cognition row."""
    place = 0 if sample.extras.get("lang") == "zh" else -1
    name, author = (
        (config.model_name or [DEFAULT_NAME])[place],
        (config.model_author or [DEFAULT_AUTHOR])[place],
    )
    messages = tuple(
        {**message, "content": message["content"].replace("{{NAME}}", name).replace("{{AUTHOR}}", author)}
        for message in sample.messages
    )
    return dataclasses.replace(sample, messages=messages)
