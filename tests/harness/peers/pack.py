"""Time a peer's own packing function; the peers' venvs run this file, megaswift does not.

python pack.py PEER whole|per LENGTHS.npy CAPACITY  -- "per" stands for batches of 1000 samples.
"""

import json
import sys
import time

import numpy as np


def trl(lengths, capacity):  # type: ignore[no-untyped-def]
    """Return the bins of TRL's best-fit decreasing over a table of token lists of these lengths."""
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(int(lengths.sum()), np.int8)))
    started = time.process_time()
    packed = _pack_bfd(pa.table({"input_ids": tokens}), capacity)
    return time.process_time() - started, len(packed)


def llamafactory(lengths, capacity):  # type: ignore[no-untyped-def]
    """Return the bins of LLaMA-Factory's greedy knapsack."""
    from llamafactory.data.processor.processor_utils import greedy_knapsack

    values = lengths.tolist()
    started = time.process_time()
    return len(greedy_knapsack(values, capacity)), started


def ms_swift(lengths, capacity):  # type: ignore[no-untyped-def]
    """Return the bins of ms-swift's packing, which carries the last bin of a batch over to the next."""
    from swift.dataset.packing import calculate_matched_group

    pairs = list(enumerate(lengths.tolist()))
    started, left, bins = time.process_time(), [], 0
    for first in range(0, len(pairs), 1000):
        last = first + 1000 >= len(pairs)
        full, left = calculate_matched_group(left + pairs[first : first + 1000], capacity, is_finished=last)
        bins += len(full)
    return time.process_time() - started, bins


def main() -> None:
    """Print seconds and bins as JSON."""
    peer, mode, file, capacity = sys.argv[1:]
    lengths = np.load(file)
    if peer == "ms-swift":
        seconds, bins = ms_swift(lengths, int(capacity))
    elif peer == "trl":
        seconds, bins = trl(lengths, int(capacity))
    else:
        seconds, bins = 0.0, 0
        step = len(lengths) if mode == "whole" else 1000
        for first in range(0, len(lengths), step):
            found, started = llamafactory(lengths[first : first + step], int(capacity))
            seconds, bins = seconds + time.process_time() - started, bins + found
    print(json.dumps({"seconds": seconds, "bins": bins}))


if __name__ == "__main__":
    main()
