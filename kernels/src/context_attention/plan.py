"""Which token of a pack lives on which cp rank: every document is cut so that causal work is even. No tensors.

A document is cut into 2R chunks that differ by at most one token, and ring rank r holds chunks r and 2R - 1 -
r (zig-zag). Chunk sizes need not be equal for the masks to be simple: the order of chunks decides who sees
whom. The tokens left over by the division go to the ranks that have the fewest, so every rank ends with the
same number, whatever the lengths. The tokens of one ring rank are then split evenly and in order over U ranks
that exchange heads (Ulysses).
Letters: N documents, R ring ranks, U ranks of one head exchange, P = R * U cp ranks; cp rank = ring rank * U
+ inner rank.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from megaswift.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive tokens of one document."""

    document: int
    position: int  # of the first token in the document
    length: int
    start: int  # of the first token among the tokens of the ring rank


@dataclass(frozen=True, kw_only=True)
class ContextPlan:
    """Documents of one pack over R ring ranks and U inner ranks."""

    lengths: tuple[int, ...]
    ring: int
    inner: int
    cuts: tuple[tuple[int, ...], ...]  # of every document, 2R + 1 offsets of its chunks

    @property
    def ranks(self) -> int:
        """Number of cp ranks."""
        return self.ring * self.inner

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of every cp rank."""
        return sum(self.lengths) // self.ranks

    @cached_property
    def pieces(self) -> tuple[tuple[tuple[Piece, Piece], ...], ...]:
        """For every ring rank and document, the early and the late piece; a piece may be empty."""
        every = []
        for rank in range(self.ring):
            start, mine = 0, []
            for document, cuts in enumerate(self.cuts):
                pair = []
                for chunk in (rank, 2 * self.ring - 1 - rank):
                    length = cuts[chunk + 1] - cuts[chunk]
                    pair.append(Piece(document=document, position=cuts[chunk], length=length, start=start))
                    start += length
                mine.append((pair[0], pair[1]))
            every.append(tuple(mine))
        return tuple(every)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First token of every document in the pack."""
        return tuple(sum(self.lengths[:document]) for document in range(len(self.lengths)))

    def ranges(self, ring_rank: int) -> list[range]:
        """Return the tokens of one ring rank as ranges of the pack, in the order in which it holds them."""
        return [
            range(
                self.offsets[piece.document] + piece.position,
                self.offsets[piece.document] + piece.position + piece.length,
            )
            for pair in self.pieces[ring_rank]
            for piece in pair
            if piece.length
        ]

    def work(self, ring_rank: int) -> int:
        """Return the pairs of query and key that causal attention visits for the queries of one ring rank."""
        return sum(pairs(piece.position, piece.length) for pair in self.pieces[ring_rank] for piece in pair)


def pairs(position: int, length: int) -> int:
    """Return the keys that `length` queries from `position` on see, themselves included."""
    return length * position + length * (length + 1) // 2


def make_plan(lengths: Sequence[int], *, ring: int = 1, inner: int = 1) -> ContextPlan:
    """Return the plan for documents of these lengths.

    Raises ConfigError where the tokens do not divide by ring * inner: the caller pads the pack, not every
    document.
    """
    tokens, ranks = sum(lengths), ring * inner
    if tokens % ranks:
        raise ConfigError(
            f"tokens={tokens} of a pack do not divide by context_parallel_size={ranks}. "
            "Every rank holds the same number. "
            f"Pad the pack to {-(-tokens // ranks) * ranks} tokens."
        )
    counts, works, cuts = [0] * ring, [0] * ring, []
    for length in lengths:
        sizes = _chunk_sizes(length, counts, works)
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + size)
        for rank in range(ring):
            for chunk in (rank, 2 * ring - 1 - rank):
                counts[rank] += sizes[chunk]
                works[rank] += pairs(bounds[chunk], sizes[chunk])
        cuts.append(tuple(bounds))
    return ContextPlan(lengths=tuple(lengths), ring=ring, inner=inner, cuts=tuple(cuts))


def _chunk_sizes(length: int, counts: list[int], works: list[int]) -> list[int]:
    """Return the sizes of 2R chunks of a document, given the tokens and the work that ranks already have.

    Counts stay within one of each other: at most 2R - 1 tokens are left over, so none needs a third one.
    """
    ring = len(counts)
    base, left_over = divmod(length, 2 * ring)
    sizes = [base] * (2 * ring)
    mean = sum(works) / ring
    waiting: list[tuple[int, int, int, tuple[int, ...]]] = []  # tokens, work, rank, chunks to grow
    for rank in range(ring):
        early, late = rank, 2 * ring - 1 - rank
        # Tokens of the late chunk see more keys: it comes first for a rank with less work than the mean.
        waiting.append(
            (counts[rank], works[rank], rank, (late, early) if works[rank] <= mean else (early, late))
        )
    heapq.heapify(waiting)
    for _ in range(left_over):
        count, work, rank, chunks = heapq.heappop(waiting)
        sizes[chunks[0]] += 1
        if len(chunks) == 2:
            heapq.heappush(waiting, (count + 1, work + base * chunks[0], rank, chunks[1:]))
    return sizes


def balance(plans: Iterable[ContextPlan]) -> list[float]:
    """Return, for every plan, the most causal work of a ring rank over the mean."""
    found = []
    for plan in plans:
        works = [plan.work(rank) for rank in range(plan.ring)]
        found.append(max(works) * plan.ring / max(1, sum(works)))
    return found
