"""Global batches, the same for every layout, and the micro batches that one rank takes from them.

An item is what one slot of a batch holds: a row (a tokenised sample, or the documents of a preference pair), or with
packing a pack of rows. The stream of items is epoch after epoch, each in its own order; global batch i is the next
`global_batch_size` items of the stream, so a batch at the end of an epoch runs on into the next and no item is dropped.
The only state of the stream is how many items were consumed: a run may go on from there with another number of ranks or
another micro batch size.

Letters: B rows of a micro batch, S tokens of a row, K likeliest tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megaswift.data.channels import Channels
from megaswift.data.encode import EncodedSet
from megaswift.data.order import long_first, shuffled
from megaswift.data.packing import Packs, pack
from megaswift.errors import ConfigError
from megaswift.kernels.context_attention.plan import ContextPlan

SORTED_ROWS = 4096  # whatever the batch, which may change with the ranks of a resumed run


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How items are formed and put into batches."""

    global_batch_size: int
    micro_batch_size: int = 1
    packing: bool = False
    packing_length: int | None = None  # tokens of a pack; needed with packing
    padding_free: bool = True  # concatenate the samples of a micro batch; false: one row each, padded
    shuffle: bool = True
    group_by_length: bool = False
    seed: int = 42
    pad_to_multiple: int = 1  # S is a multiple of this (tp for sequence parallel)
    round_size: int = 1  # the interleaved schedule takes micro batches in rounds of so many
    token_cost: float = (
        0.0  # of a token outside attention, in keys: what so many more keys to attend to would cost
    )


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The input of one forward pass.

    In rows of several documents B is 1 and `cu_seqlens` marks where each begins; padding is a document of its own at
    the end. In padded rows `cu_seqlens` is None, and causal attention keeps the padding on the right out of sight.
    """

    input_ids: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S]: the next token of the same document
    loss_mask: torch.Tensor  # float32 [B, S]: weight of the label; 0 at the end of a document and on padding
    position_ids: torch.Tensor  # int64 [B, S]: from 0 in every document
    cu_seqlens: torch.Tensor | None  # int32 [documents + 1]
    max_seqlen: int  # tokens of the longest document
    sample_ids: tuple[int, ...]  # entries of the EncodedSet, in the order of the documents
    lengths: tuple[int, ...] = ()  # tokens of these documents
    plan: ContextPlan | None = (
        None  # of one rank's part: where the tokens of all documents are (data/context.py)
    )
    # float32 [rows] or [rows, numbers]: what the rows say beside their text; nan: nothing
    targets: torch.Tensor | None = None
    references: torch.Tensor | None = None  # float64 [documents]: log-probability under the reference model
    # float32 [B, S], of the labels of completions: log-probability when they were generated, under the reference model, and
    # under the engine that drew them, where that was not the model itself
    old_logps: torch.Tensor | None = None
    reference_logps: torch.Tensor | None = None
    sampler_logps: torch.Tensor | None = None
    # uint8 or int16 [B, S, layers with experts, experts of a token]: to be replayed
    experts: torch.Tensor | None = None
    # int32 and float32 [B, S, K]: tokens that a teacher elsewhere finds likeliest at the place of the label, and their logarithms;
    # of completions [B, S]: the logarithm of the label
    teacher_ids: torch.Tensor | None = None
    teacher_logps: torch.Tensor | None = None
    mismatched: "MicroBatch | None" = None  # the same rows, with each prompt answered for another row
    is_own: bool = False  # whether the trained model wrote the answers itself
    noise_keys: torch.Tensor | None = (
        None  # int64 [B, S]: what noise on embeddings follows from (data/noise.py)
    )
    noise_scales: torch.Tensor | None = None  # float32 [B, S]
    channels: torch.Tensor | None = None  # int32 [B, S]: which of `channel_names` the token is of
    channel_names: tuple[str, ...] = ()  # of the whole set, or of a stream's global batch
    prepared: object = None  # what the task found before the step (Task.prepare); no part of the data


class TrainData:
    """The endless stream of items of one training set."""

    def __init__(self, encoded: EncodedSet, settings: BatchSettings, *, pad_id: int = 0) -> None:
        """Form the items; every rank does so alike. Raises DataError for a sample that no pack can hold."""
        self.encoded, self.settings = encoded, settings
        self._rows = _RowBuilder(encoded, settings, pad_id)
        self.num_items = self._rows.num_items
        self._order: tuple[int, np.ndarray] | None = None  # the epoch used last and its order

    @property
    def packs(self) -> Packs | None:
        """The packs, with their fill; None without packing."""
        return self._rows.packs

    def num_steps(self, num_epochs: float) -> int:
        """Return the global batches in which every item of so many epochs is seen: the last one is rounded up."""
        return max(1, -(-int(np.ceil(self.num_items * num_epochs)) // self.settings.global_batch_size))

    def items(self, consumed: int) -> np.ndarray:
        """Return the items of the global batch that begins after `consumed` items, int64 [global_batch_size]."""
        found, wanted = [], self.settings.global_batch_size
        while wanted:
            epoch, position = divmod(consumed, self.num_items)
            taken = self._epoch_order(epoch)[position : position + wanted]
            found.append(taken)
            wanted -= len(taken)
            consumed += len(taken)
        return np.concatenate(found)

    def micro_batches(self, consumed: int, *, dp_rank: int, dp: int) -> Iterator[MicroBatch]:
        """Yield what one data-parallel rank takes of the global batch after `consumed` items.

        Micro batch j of the global batch holds items j * m to (j + 1) * m; ranks get micro batches of like work.
        """
        self.num_micro_batches(dp)  # raises where the ranks do not divide
        micro_batches = self.items(consumed).reshape(-1, self.settings.micro_batch_size)
        for number in even_share(self._rows.work[micro_batches].sum(1), dp_rank=dp_rank, dp=dp):
            yield self._rows.build(micro_batches[number])

    def num_micro_batches(self, dp: int) -> int:
        """Return the micro batches of one rank in one global batch."""
        return micro_batches_per_rank(self.settings, dp)

    def epoch(self, consumed: int) -> float:
        """Return how often the items were seen."""
        return consumed / self.num_items

    def epochs_done(self, consumed: int) -> int:
        """Return how many epochs ended with the items before."""
        return consumed // self.num_items

    def sample_ids(self, consumed: int) -> list[int]:
        """Return the rows of the global batch that follows `consumed` items, over all ranks."""
        items, packs = self.items(consumed), self.packs
        if packs is None:
            return [int(item) for item in items]
        return [int(entry) for item in items for entry in packs[int(item)]]

    def writers(self, consumed: Callable[[], int]) -> dict[str, Callable[[Path], None]]:
        """Return what a checkpoint must hold besides the number of items that are `consumed`: nothing."""
        return {}

    def close(self) -> None:
        """No more batches are needed."""

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            settings = self.settings
            count = self.num_items
            order = (
                shuffled(count, seed=settings.seed, stream=epoch) if settings.shuffle else np.arange(count)
            )
            if settings.group_by_length:
                order = long_first(order, self.encoded.row_lengths, window=SORTED_ROWS)
            self._order = (epoch, order)
        return self._order[1]


class ValidationData:
    """Every item of a validation set once, in order; the last global batch is filled up with empty micro batches."""

    def __init__(self, encoded: EncodedSet, settings: BatchSettings, *, pad_id: int = 0) -> None:
        self.encoded, self.settings = encoded, settings
        self._rows = _RowBuilder(encoded, settings, pad_id)
        self.num_items = self._rows.num_items

    def num_steps(self) -> int:
        """Return the global batches that cover the set."""
        return -(-self.num_items // self.settings.global_batch_size)

    def micro_batches(self, step: int, *, dp_rank: int, dp: int) -> Iterator[MicroBatch]:
        """Yield what one rank takes of global batch `step`: as many micro batches on every rank, some without loss."""
        size = self.settings.global_batch_size
        items = np.full(size, -1, np.int64)
        present = np.arange(step * size, min((step + 1) * size, self.num_items))
        items[: len(present)] = present
        for share in rank_share(items, self.settings.micro_batch_size, dp_rank=dp_rank, dp=dp):
            yield self._rows.build(share[share >= 0])


def all_packed(
    encoded: EncodedSet, settings: BatchSettings, *, dp_rank: int, dp: int, pad_id: int
) -> Iterator[MicroBatch]:
    """Yield one data-parallel rank's micro batches of one step that takes a whole set, packed; some may be empty."""
    assert settings.packing_length is not None, "resolved"
    packs = pack(encoded.row_lengths, settings.packing_length)
    round_size = settings.micro_batch_size * dp * settings.round_size
    size = -(-len(packs) // round_size) * round_size
    data = ValidationData(
        replace(encoded, packs=packs), replace(settings, global_batch_size=size), pad_id=pad_id
    )
    yield from data.micro_batches(0, dp_rank=dp_rank, dp=dp)


def rank_share(items: np.ndarray, micro_batch_size: int, *, dp_rank: int, dp: int) -> Iterator[np.ndarray]:
    """Yield the micro batches of items that one data-parallel rank takes from a global batch."""
    for number in range(_share_of(len(items), micro_batch_size, dp)):
        start = (number * dp + dp_rank) * micro_batch_size
        yield items[start : start + micro_batch_size]


def even_share(work: np.ndarray, *, dp_rank: int, dp: int) -> list[int]:
    """Return which of the micro batches with these amounts of work one rank takes, in their order; as many on every rank.

    From heavy to light, each next `dp` of them go to one rank each, the heaviest to the rank with the least so far: the
    sums are even, and so are the works of ranks that meet in every micro batch (experts).
    """
    order = np.argsort(-work, kind="stable").reshape(-1, dp)
    sums, taken = np.zeros(dp), []
    for heavy_first in order:
        lightest_first = np.argsort(sums, kind="stable")
        sums[lightest_first] += work[heavy_first]
        taken.append(int(heavy_first[np.flatnonzero(lightest_first == dp_rank)[0]]))
    return sorted(taken)


def micro_batches_per_rank(settings: BatchSettings, dp: int) -> int:
    """Return the micro batches of one rank in one global batch. Raises ConfigError where the ranks do not divide."""
    return _share_of(settings.global_batch_size, settings.micro_batch_size, dp)


def _share_of(global_batch_size: int, micro_batch_size: int, dp: int) -> int:
    if global_batch_size % (micro_batch_size * dp):
        raise ConfigError(
            f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size={micro_batch_size} x dp={dp}. "
            f"Choose a multiple of {micro_batch_size * dp}."
        )
    return global_batch_size // (micro_batch_size * dp)


def item_work(encoded: EncodedSet, packs: Packs | None, *, token_cost: float) -> np.ndarray:
    """Return the work of every item, in pairs of query and key, float64 [items]."""
    lengths = encoded.lengths.astype(np.float64)
    work: np.ndarray = (lengths * (lengths / 2 + token_cost)).reshape(-1, encoded.per_row).sum(1)
    return work if packs is None else np.add.reduceat(work[packs.items], packs.starts[:-1])


def build_rows(encoded: EncodedSet, settings: BatchSettings, *, pad_id: int) -> MicroBatch:
    """Return the micro batch of all rows of a small set, in their order."""
    return _RowBuilder(encoded, replace(settings, packing=False), pad_id).build(range(encoded.num_rows))


def with_channels(batch: MicroBatch, channels: Channels) -> MicroBatch:
    """Return the micro batch with the channel of every token; `channels` are those of its documents."""
    numbers = np.zeros(batch.input_ids.numel(), np.int32)
    for document, number in zip(places_of(batch), channels.numbers, strict=True):
        numbers[document] = number
    return replace(
        batch, channels=torch.from_numpy(numbers).view_as(batch.input_ids), channel_names=channels.names
    )


def places_of(batch: MicroBatch) -> list[slice]:
    """Return where the documents of a whole micro batch are among its tokens [B * S]; the rest is padding."""
    rows, width = batch.input_ids.shape
    starts = range(0, rows * width, width) if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    return [slice(start, start + length) for start, length in zip(starts, batch.lengths, strict=False)]


class _RowBuilder:
    """Turns items into tensors."""

    def __init__(self, encoded: EncodedSet, settings: BatchSettings, pad_id: int) -> None:
        self._encoded = encoded
        self._settings = settings
        self._pad_id = pad_id
        self._mismatched: _RowBuilder | None = None
        if encoded.mismatched is not None:
            unpacked = replace(settings, packing=False)
            self._mismatched = _RowBuilder(encoded.mismatched, unpacked, pad_id)
        self.packs: Packs | None = None
        if settings.packing:
            if settings.packing_length is None:
                raise ConfigError("packing=true needs packing_length. Give --packing_length or --max_length.")
            ahead = encoded.packs
            fits = ahead is not None and ahead.capacity == settings.packing_length
            self.packs = ahead if fits else pack(encoded.row_lengths, settings.packing_length)
        self.num_items = len(self.packs) if self.packs is not None else encoded.num_rows
        self.work = item_work(encoded, self.packs, token_cost=settings.token_cost)

    def build(self, items: Sequence[int] | np.ndarray) -> MicroBatch:
        """Return the micro batch of some items; none gives a row of padding."""
        rows = np.asarray(items, np.int64)
        if self.packs is not None and len(rows):
            rows = np.concatenate([self.packs[i] for i in rows])
        encoded, per_row = self._encoded, self._encoded.per_row
        entries = (rows[:, None] * per_row + np.arange(per_row)).ravel()
        ids = tuple(entries[encoded.starts[entries + 1] > encoded.starts[entries]].tolist())
        if self.packs is not None or self._settings.padding_free or not ids:
            batch = self._one_row(ids)
        else:
            batch = self._padded_rows(ids)
        if encoded.channels is not None:
            batch = with_channels(batch, encoded.channels.take(np.array(ids, np.int64)))
        if encoded.targets is None and encoded.references is None and self._mismatched is None:
            return batch
        targets, references = (
            None if values is None else torch.from_numpy(np.array(values[chosen]))
            for values, chosen in ((encoded.targets, rows), (encoded.references, list(ids)))
        )
        mismatched = self._mismatched.build(rows) if self._mismatched is not None else None
        return replace(batch, targets=targets, references=references, mismatched=mismatched)

    def _one_row(self, entries: tuple[int, ...]) -> MicroBatch:
        """Concatenate documents into one row [1, S]."""
        starts = self._encoded.starts
        lengths = [int(starts[entry + 1] - starts[entry]) for entry in entries]
        used = sum(lengths)
        multiple = self._settings.pad_to_multiple
        padding = -used % multiple if used else multiple
        documents = [*lengths, padding] if padding else lengths
        row = _Row(used + padding, self._pad_id)
        bounds = np.concatenate([[0], np.cumsum(documents)]).astype(np.int32)
        for entry, start in zip(entries, bounds, strict=False):
            row.put(self._encoded, entry, int(start))
        row.position_ids[used:] = np.arange(padding)
        return MicroBatch(
            **row.tensors(1),
            cu_seqlens=torch.from_numpy(bounds),
            max_seqlen=max(documents),
            sample_ids=entries,
            lengths=tuple(lengths),
        )

    def _padded_rows(self, entries: tuple[int, ...]) -> MicroBatch:
        """Put every document into a row of its own, padded on the right to the longest [B, S]."""
        starts = self._encoded.starts
        lengths = tuple(int(starts[entry + 1] - starts[entry]) for entry in entries)
        width = max(lengths) + -max(lengths) % self._settings.pad_to_multiple
        row = _Row(width * len(entries), self._pad_id)
        row.position_ids[:] = np.tile(np.arange(width), len(entries))
        for number, entry in enumerate(entries):
            row.put(self._encoded, entry, number * width)
        return MicroBatch(
            **row.tensors(len(entries)),
            cu_seqlens=None,
            max_seqlen=width,
            sample_ids=entries,
            lengths=lengths,
        )


class _Row:
    """The arrays of a micro batch while it is filled; flat [B * S]."""

    def __init__(self, size: int, pad_id: int) -> None:
        self.input_ids = np.full(size, pad_id, np.int64)
        self.labels = np.full(size, pad_id, np.int64)
        self.loss_mask = np.zeros(size, np.float32)
        self.position_ids = np.zeros(size, np.int64)

    def put(self, encoded: EncodedSet, entry: int, start: int) -> None:
        """Write one document at `start`; its labels are its own next tokens."""
        first, last = int(encoded.starts[entry]), int(encoded.starts[entry + 1])
        end = start + last - first
        self.input_ids[start:end] = encoded.input_ids[first:last]
        self.labels[start : end - 1] = encoded.input_ids[first + 1 : last]
        self.loss_mask[start : end - 1] = encoded.loss_weights[first + 1 : last]
        self.position_ids[start:end] = np.arange(last - first)

    def tensors(self, rows: int) -> dict[str, torch.Tensor]:
        names = ("input_ids", "labels", "loss_mask", "position_ids")
        return {name: torch.from_numpy(getattr(self, name)).view(rows, -1) for name in names}
