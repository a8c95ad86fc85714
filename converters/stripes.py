"""Rows chosen from a matrix in equal runs: the one piece of geometry that every fused weight is made of."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stripe:
    """`width` rows at `start`, at `start + pitch`, and so on, `runs` times.

    q in a fused qkv of 4 groups, each [q q k v], is Stripe(start=0, runs=4, pitch=4, width=2) in units of a head.
    """

    start: int
    runs: int
    pitch: int
    width: int

    @property
    def rows(self) -> int:
        """How many rows are chosen."""
        return self.runs * self.width

    @property
    def end(self) -> int:
        """The row after the last one."""
        return self.start + (self.runs - 1) * self.pitch + self.width

    @property
    def is_contiguous(self) -> bool:
        """Whether the rows follow each other without a gap."""
        return self.runs == 1 or self.pitch == self.width

    def intervals(self) -> list[tuple[int, int]]:
        """Return the chosen rows as half-open intervals."""
        if self.is_contiguous:
            return [(self.start, self.start + self.rows)]
        return [
            (begin, begin + self.width)
            for begin in range(self.start, self.start + self.runs * self.pitch, self.pitch)
        ]


def block(start: int, width: int) -> Stripe:
    """Return `width` rows from `start` on."""
    return Stripe(start, 1, width, width)
