"""Everything between the command line and the batches, in one call."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.config.data import DataConfig
from megaswift.data.address import template_facts
from megaswift.data.encode import EncodedSet, encode_samples
from megaswift.data.forms import CONVERSATIONS, PROMPTS, Form
from megaswift.data.prepare import make_plan
from megaswift.data.prepared import Prepared, check_fits, named_prepared, read_prepared
from megaswift.data.read import ReadData, read_datasets
from megaswift.data.report import Report, merge
from megaswift.data.sample import Sample
from megaswift.data.sources import is_prepared
from megaswift.data.template import Template
from megaswift.errors import DataError
from megaswift.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedData:
    """Tokenised training and validation sets and the ledgers of both steps."""

    train: EncodedSet
    val: EncodedSet | None
    read: ReadData | None = None  # None: tokenised beforehand
    encoding: Report | None = None  # training and validation samples that were tokenised or turned away
    prepared: Prepared | None = None  # where the sets lie, if beforehand


def load_data(
    config: DataConfig,
    tokenizer: Any,
    *,
    max_length: int | None,
    seed: int = 42,
    use_hf: bool = True,
    stop_ids: Iterable[int] = (),
    form: Form = CONVERSATIONS,
) -> LoadedData:
    """Read, render and tokenise the sets of a run, or open what was prepared of them; `stop_ids` are the model's eos_token_ids.

    `form` says what the rows must hold. Raises DataError.
    """
    stop_ids = tuple(stop_ids)
    template = Template.from_config(config, tokenizer, max_length=max_length, stop_ids=stop_ids)
    prepared = named_prepared(config)
    if prepared is None and config.prepared_dir is not None:
        packing_length = config.packing_length if config.packing else None
        plan = make_plan(
            config,
            template,
            form=form,
            seed=seed,
            use_hf=use_hf,
            packing_length=packing_length,
            stop_ids=stop_ids,
        )
        folder = Path(config.prepared_dir).expanduser() / plan.address
        if is_prepared(folder):
            prepared = read_prepared(folder)
        else:
            logger.warning(
                "%s is not there: nothing was prepared of these sets, so that they are tokenised now", folder
            )
    if prepared is not None:
        own = template_facts(template, form=form, stop_ids=stop_ids)
        check_fits(prepared, own, strict=config.strict)
    loaded = _open(prepared) if prepared else _encode(config, template, form, seed=seed, use_hf=use_hf)
    lengths = loaded.train.lengths
    lengths = lengths[lengths > 0]
    logger.info(
        "training rows: %d of %d tokens, %.0f on average, the longest %d; %.0f %% carry loss",
        len(lengths), lengths.sum(), lengths.mean(), lengths.max(), 100 * (loaded.train.loss_weights > 0).mean(),
    )  # fmt: skip
    return loaded


def with_prompts(
    encoded: EncodedSet, samples: Sequence[Sample], template: Template, config: DataConfig
) -> tuple[EncodedSet, EncodedSet]:
    """Return the conversations and, entry by entry, their prompts: each up to its last answer.

    `samples` are those that `encoded` was made of. A row whose prompt cannot be used is reported and left out of both. Raises
    DataError.
    """
    prompts, _ = encode_samples(
        samples,
        template,
        form=PROMPTS,
        processes=config.dataset_num_proc,
        strict=config.strict,
        what="prompts of the training rows",
    )
    both, rows, rows_of_prompts = np.intersect1d(encoded.samples, prompts.samples, return_indices=True)
    if not len(both):
        raise DataError(
            "No training row has a prompt that can be used. Raise --max_length, or lower --max_completion_length."
        )
    return encoded.take(rows), prompts.take(rows_of_prompts)


def _open(prepared: Prepared) -> LoadedData:
    sets = {name: EncodedSet.load(folder) for name, folder in prepared.sets.items()}
    logger.info("opened %s, prepared from %s", prepared.folder, " ".join(prepared.manifest["names"]["train"]))
    return LoadedData(train=sets["train"], val=sets.get("val"), prepared=prepared)


def _encode(config: DataConfig, template: Template, form: Form, *, seed: int, use_hf: bool) -> LoadedData:
    read = read_datasets(config, seed=seed, use_hf=use_hf)
    processes, strict = config.dataset_num_proc, config.strict
    train, encoding = encode_samples(
        read.train, template, form=form, processes=processes, strict=strict, what="training rows"
    )
    val = None
    if read.val:
        val, more = encode_samples(
            read.val, template, form=form, processes=processes, strict=strict, what="validation rows"
        )
        encoding = merge([encoding, more])
    return LoadedData(train=train, val=val, read=read, encoding=encoding)
