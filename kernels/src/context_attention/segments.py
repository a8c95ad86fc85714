"""Which queries meet which keys: rows of queries against rows of keys, with their distance. No tensors.

Letters: R ring ranks.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from megaswift.kernels.context_attention.plan import ContextPlan, Piece


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Who sees whom within a document, and how scores are scaled."""

    causal: bool = True
    window: int | None = None  # keys that a query sees, itself included; causal only
    scale: float

    def __post_init__(self) -> None:
        assert self.window is None or (self.causal and self.window > 0), (
            f"window={self.window} of attention with causal={self.causal}"
        )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive rows of queries and of keys of one document.

    Query i and key j of the segment are `offset` + i - j tokens apart; causal attention shows j to i where
    that is >= 0.
    """

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    offset: int

    @property
    def full(self) -> bool:
        """True where causality hides no key."""
        return self.offset >= self.k_len - 1

    @property
    def bottom_right(self) -> bool:
        """True where the last query is the last key."""
        return self.offset == self.k_len - self.q_len


@functools.lru_cache(maxsize=1024)
def ring_segments(plan: ContextPlan, pattern: Pattern, rank: int, source: int) -> tuple[Segment, ...]:
    """Return the segments of ring rank `rank`'s queries and ring rank `source`'s keys."""
    pairs = zip(plan.pieces[rank], plan.pieces[source], strict=True)
    return tuple(
        segment
        for queries, keys in pairs
        for segment in _pair_segments(queries, keys, pattern, source - rank)
    )


def _pair_segments(
    queries: tuple[Piece, Piece], keys: tuple[Piece, Piece], pattern: Pattern, ahead: int
) -> Iterator[Segment]:
    """Yield the segments of one document's pieces; the keys' rank is `ahead` of ours."""
    if pattern.window is not None:
        # Distances count, so pieces stay apart.
        for query in queries:
            for key in keys:
                offset = query.position - key.position
                nearest = max(0, offset - key.length + 1)
                if query.length and key.length and offset + query.length > 0 and nearest < pattern.window:
                    yield Segment(
                        q_start=query.start,
                        q_len=query.length,
                        k_start=key.start,
                        k_len=key.length,
                        offset=offset,
                    )
        return
    q_start, q_len = queries[0].start, queries[0].length + queries[1].length
    k_start, k_len = keys[0].start, keys[0].length + keys[1].length
    if not pattern.causal or ahead == 0:
        offset = 0 if pattern.causal else k_len - 1  # rows of one rank keep the order of positions
    elif ahead < 0:  # its early piece lies before all of ours, its late piece behind
        k_len, offset = keys[0].length, keys[0].length - 1
    else:  # all of its tokens lie between our two pieces
        q_start, q_len, offset = queries[1].start, queries[1].length, k_len - 1
    if q_len and k_len:
        yield Segment(q_start=q_start, q_len=q_len, k_start=k_start, k_len=k_len, offset=offset)


@functools.lru_cache(maxsize=64)
def gathered_segments(plan: ContextPlan, pattern: Pattern, rank: int) -> tuple[Segment, ...]:
    """Return the segments of ring rank `rank`'s queries and the keys of the whole pack in its own order."""
    segments = []
    for first, length, pair in zip(plan.offsets, plan.lengths, plan.pieces[rank], strict=True):
        whole = Piece(document=pair[0].document, position=0, length=length, start=first)
        for piece in (whole,) if plan.ring == 1 else pair:
            if not piece.length:
                continue
            seen_from = 0 if pattern.window is None else max(0, piece.position - pattern.window + 1)
            seen_to = piece.position + piece.length if pattern.causal else length
            offset = piece.position - seen_from if pattern.causal else seen_to - 1
            segments.append(
                Segment(
                    q_start=piece.start,
                    q_len=piece.length,
                    k_start=first + seen_from,
                    k_len=seen_to - seen_from,
                    offset=offset,
                )
            )
    return tuple(segments)
