"""What `megaswift data` shows: what was recognised, rendered samples, lengths, packing, and every bad row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megaswift.data.encode import encode_samples
from megaswift.data.forms import CONVERSATIONS, Form
from megaswift.data.packing import pack
from megaswift.data.prompts import encode_prompts
from megaswift.data.read import ReadData, ReadSet
from megaswift.data.report import BadRow, Report
from megaswift.data.sample import RowError, Sample
from megaswift.data.template import Template

NUM_EXAMPLES = 3
NUM_BINS = 12
TRAINED = "black on green"
BAR_WIDTH = 40


@dataclass(frozen=True, kw_only=True)
class Example:
    """One rendered sample: its text in order, cut where the loss weight changes."""

    source: str
    layout: str
    num_tokens: int
    parts: tuple[tuple[str, float], ...]  # (text, loss weight)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Everything that is shown about the sets of a run."""

    sets: tuple[ReadSet, ...]
    bad: tuple[BadRow, ...]  # of reading and of tokenising
    examples: tuple[Example, ...] = ()
    lengths: np.ndarray | None = None  # tokens of every training entry, int64
    loss_tokens: int = 0
    encoding: Report | None = None
    packing_length: int | None = None
    num_packs: int = 0
    fill: float = 0.0


def make_preview(
    read: ReadData,
    template: Template | None,
    *,
    packing_length: int | None,
    form: Form = CONVERSATIONS,
    processes: int = 1,
) -> Preview:
    """Return the preview of what was read, as the documents of `form`; without a template nothing is rendered or tokenised.

    Raises DataError when no row can be tokenised.
    """
    if template is None:
        return Preview(sets=read.sets, bad=read.report.bad)
    encoded, encoding = encode_samples(
        read.train, template, form=form, processes=processes, what="training rows"
    )
    lengths, row_lengths = encoded.lengths, encoded.row_lengths
    length = packing_length or form.per_row * (template.max_length or int(lengths.max()))
    packs = pack(row_lengths, max(length, int(row_lengths.max())))
    return Preview(
        sets=read.sets,
        bad=(*read.report.bad, *encoding.bad),
        examples=_examples(read.train, template, form),
        lengths=lengths[lengths > 0],
        loss_tokens=int((encoded.loss_weights > 0).sum()),
        encoding=encoding,
        packing_length=packs.capacity,
        num_packs=len(packs),
        fill=packs.fill,
    )


def _examples(samples: Sequence[Sample], template: Template, form: Form) -> tuple[Example, ...]:
    """Render the first samples that can be rendered, from different layouts where there are several."""
    earlier: Counter[str] = Counter()  # samples of each layout so far
    ranks = []
    for sample in samples:
        ranks.append(earlier[sample.layout])
        earlier[sample.layout] += 1
    found: list[Example] = []
    for index in sorted(range(len(samples)), key=ranks.__getitem__):
        if len(found) >= NUM_EXAMPLES * form.per_row:
            break
        try:
            found += [_example(document, template, form) for document in form.documents(samples[index])]
        except RowError:
            continue  # it is in the report of bad rows
    return tuple(found)


def _example(sample: Sample, template: Template, form: Form) -> Example:
    carries_loss = not (form.asks or form.reads)
    outcome = (
        template.encode(sample) if carries_loss else encode_prompts(template, [sample], whole=form.reads)[0]
    )
    if isinstance(outcome, RowError):
        raise outcome
    encoded = outcome[0]
    weights = encoded.loss_weights
    cuts = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
    parts = tuple(
        (template.tokenizer.decode(encoded.input_ids[start:end].tolist()), float(weights[start]))
        for start, end in pairwise(cuts)
    )
    return Example(source=sample.source, layout=sample.layout, num_tokens=len(weights), parts=parts)


def render(preview: Preview) -> RenderableType:
    """Return the preview for a rich console; the summary comes last, where a terminal ends up."""
    shown: list[RenderableType] = [_bad_rows_table(preview.bad)] if preview.bad else []
    shown += [_example_panel(example) for example in preview.examples]
    shown.append(_sets_table(preview))
    if preview.lengths is not None:
        shown += [_lengths_table(preview.lengths), _facts(preview)]
    return Group(*shown)


def _sets_table(preview: Preview) -> Table:
    table = Table(title="sets", title_justify="left")
    table.add_column("set", overflow="fold")
    table.add_column("layouts")
    for name in ("rows read", "bad", "used"):
        table.add_column(name, justify="right")
    for one in preview.sets:
        layouts = ", ".join(f"{name} {count}" for name, count in one.layouts.items())
        table.add_row(
            one.name, layouts, str(one.report.read), str(len(one.report.bad)), str(len(one.samples))
        )
    return table


def _example_panel(example: Example) -> Panel:
    text = Text()
    for part, weight in example.parts:
        text.append(part, style=TRAINED if weight else "")
    trained = "trained tokens are coloured"
    title = Text(f"{example.source} ({example.layout}, {example.num_tokens} tokens; {trained})")
    return Panel(text, title=title, title_align="left")


def _lengths_table(lengths: np.ndarray) -> Table:
    counts, edges = np.histogram(lengths, bins=min(NUM_BINS, int(lengths.max())))
    table = Table(title="lengths in tokens", title_justify="left", show_header=False, box=None)
    for edge, following, count in zip(edges, edges[1:], counts, strict=False):
        bar = Bar(size=int(counts.max()), begin=0, end=int(count), width=BAR_WIDTH)
        table.add_row(f"{np.ceil(edge):.0f} - {np.floor(following):.0f}", str(count), bar)
    return table


def _facts(preview: Preview) -> Text:
    assert preview.lengths is not None
    lengths = preview.lengths
    median, tail = np.percentile(lengths, [50, 95])
    total = int(lengths.sum())
    padded = int(lengths.max()) * len(lengths)
    return Text(
        f"{len(lengths)} entries, {total} tokens, {100 * preview.loss_tokens / total:.1f} % with loss\n"
        f"mean {lengths.mean():.1f}, median {median:.0f}, 95 % below {tail:.0f}, longest {lengths.max()}\n"
        f"packed into {preview.num_packs} rows of {preview.packing_length}: {100 * preview.fill:.2f} % filled; "
        f"padded to the longest: {100 * total / padded:.2f} %\n"
    )


def _bad_rows_table(bad: Sequence[BadRow]) -> Table:
    table = Table(title=f"bad rows: {len(bad)}", title_justify="left")
    for name in ("where", "kind", "reason"):
        table.add_column(name, overflow="fold")
    for row in bad:
        table.add_row(Text(row.source), row.kind, Text(row.reason))
    return table
