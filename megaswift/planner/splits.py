"""How decoder layers are shared out over pipeline stages and their chunks."""

from collections.abc import Iterator
from dataclasses import replace

from megaswift.parallel.layout import Layout

CHUNKS = (1, 2, 4, 8)  # on one stage; beyond, transfers cost more than the bubble they save


def pipeline_splits(num_layers: int, layout: Layout) -> Iterator[Layout]:
    """Yield a layout with every sensible split of the layers: even, lighter at the ends, and interleaved.

    Where the layers do not divide, Megatron-Core takes the number on the first and on the last stage, and those between
    are equal. Lighter ends also make up for the embedding and the output layer.
    """
    pp = layout.pp
    if pp == 1:
        yield layout
        return
    if num_layers % pp == 0:
        for vpp in _chunks(num_layers // pp):
            yield replace(layout, vpp=vpp)
    fullest = -(-num_layers // pp)
    for middle in (fullest, fullest + 1):
        ends = num_layers - middle * (pp - 2) if pp > 2 else num_layers
        last = ends // 2 if pp > 2 else num_layers - middle
        first = ends - last
        if 0 < last <= first <= middle and not first == last == num_layers / pp:
            for vpp in _chunks(first, last, *([middle] if pp > 2 else [])):
                yield replace(layout, vpp=vpp, pp_first=first, pp_last=last)


def _chunks(*sizes: int) -> list[int]:
    """Return the numbers of chunks into which every size divides."""
    return [vpp for vpp in CHUNKS if all(size % vpp == 0 for size in sizes)]
