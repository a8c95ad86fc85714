"""Prompts: conversations that wait for an answer, and the rows behind them, kept on disk for the ranks that reward."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.data.forms import asked_of
from megaswift.data.sample import STUMBLES, Message, RowError, Sample, row_error
from megaswift.data.template import Encoded, Template

FILE, STARTS = "rows.jsonl", "rows.npy"


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """What a reward function may read about a prompt."""

    source: str  # "file:line"
    messages: tuple[Message, ...]  # the conversation without its answer
    columns: dict[str, Any]  # every column of the row that is no part of the conversation
    tools: tuple[dict[str, Any], ...] = ()
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def sample(self, messages: Iterable[Message]) -> Sample:
        """Return another conversation of the row."""
        return Sample(
            source=self.source,
            messages=tuple(messages),
            tools=self.tools,
            template_kwargs=self.template_kwargs,
        )


class PromptRows:
    """Rows by number; a rank reads the lines that it needs."""

    def __init__(self, folder: Path) -> None:
        """Open what `save_rows` wrote."""
        self._starts = np.load(folder / STARTS)
        self._file = (folder / FILE).open("rb")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> PromptRow:
        self._file.seek(self._starts[number])
        row = json.loads(self._file.readline())
        return PromptRow(**{**row, "messages": tuple(row["messages"]), "tools": tuple(row["tools"])})


def encode_prompts(
    template: Template, samples: Sequence[Sample], *, whole: bool = False
) -> list[list[Encoded] | RowError]:
    """Tokenise conversations that are read, or wait for the assistant's answer; no token carries loss.

    `whole` texts without a chat template end as the tokenizer ends them.
    """
    texts = [_text_or_error(template, sample) for sample in samples]
    encoded = iter(template.encoder.encode([text for text in texts if isinstance(text, str)]))
    encoder, limit = template.encoder, template.max_length
    bos, end = ([], []) if template.uses_chat_template else (encoder.bos, encoder.end if whole else [])
    outcomes: list[list[Encoded] | RowError] = []
    for text in texts:
        if isinstance(text, RowError):
            outcomes.append(text)
            continue
        ids = np.concatenate([bos, next(encoded), end]).astype(np.int32)
        if limit is not None and len(ids) > limit:
            if template.truncation_strategy not in ("left", "right"):
                outcomes.append(RowError("too long", f"{len(ids)} tokens, and there is room for {limit}"))
                continue
            ids = ids[-limit:] if template.truncation_strategy == "left" else ids[:limit]
        if not len(ids):
            outcomes.append(RowError("empty text", "the text has no tokens"))
            continue
        outcomes.append([Encoded(input_ids=ids, loss_weights=np.zeros(len(ids), np.float32))])
    return outcomes


def _text_or_error(template: Template, sample: Sample) -> str | RowError:
    try:
        return template.prompt(sample)
    except (RowError, *STUMBLES) as error:
        return row_error(error)


def save_rows(folder: Path, samples: Iterable[Sample]) -> None:
    """Write one line a sample, and where each begins. Values that JSON does not know become their text."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = [0]
    with (folder / FILE).open("wb") as file:
        for sample in samples:
            row = {
                "source": sample.source,
                "messages": asked_of(sample.messages),
                "columns": sample.extras,
                "tools": sample.tools,
                "template_kwargs": sample.template_kwargs,
            }
            starts.append(starts[-1] + file.write(json.dumps(row, default=str).encode() + b"\n"))
    np.save(folder / STARTS, np.array(starts, np.int64))
