"""Everything between the command line and the batches, in one call."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megaswift.config.data import DataConfig
from megaswift.data.encode import EncodedSet, encode_samples
from megaswift.data.forms import CONVERSATIONS, Form
from megaswift.data.read import ReadData, read_datasets
from megaswift.data.report import Report, merge
from megaswift.data.template import Template
from megaswift.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedData:
    """Tokenised training and validation sets and the ledgers of both steps."""

    train: EncodedSet
    val: EncodedSet | None
    read: ReadData
    encoding: Report  # training and validation samples that were tokenised or turned away


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
    """Read, render and tokenise the sets of a run; `stop_ids` are the model's eos_token_ids. Raises DataError.

    `form` says what the rows must hold.
    """
    read = read_datasets(config, seed=seed, use_hf=use_hf)
    template = Template.from_config(config, tokenizer, max_length=max_length, stop_ids=stop_ids)
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
    lengths = train.lengths
    logger.info(
        "training rows: %d of %d tokens, %.0f on average, the longest %d; %.0f %% carry loss",
        len(train), lengths.sum(), lengths.mean(), lengths.max(), 100 * (train.loss_weights > 0).mean(),
    )  # fmt: skip
    return LoadedData(train=train, val=val, read=read, encoding=encoding)
