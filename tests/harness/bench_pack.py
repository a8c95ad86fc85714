"""Packing a million samples, beside TRL's, LLaMA-Factory's and ms-swift's own code: `make bench-pack`.

    python -m tests.harness.bench_pack [--samples 1000000] [--capacity 4096] [--only NAME ...]

Lengths are lognormal with mean 396 (those of alpaca conversations have that order). Every peer runs in a venv of its own
below .bench/ and packs the whole set at once, and by batches of 1000 where its own defaults do.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.data.packing import pack
from tests.harness.bench import BENCH, PEERS, peer_python

WAYS = ("trl whole", "llamafactory whole", "llamafactory per 1000", "ms-swift per 1000")


def draw_lengths(samples: int, capacity: int) -> np.ndarray:
    """Return lognormal lengths, int64 [samples], the longest cut to `capacity`."""
    return np.clip(np.random.default_rng(0).lognormal(5.48, 1, samples), 1, capacity).astype(np.int64)


def ours(lengths: np.ndarray, capacity: int) -> dict[str, Any]:
    """Return our own figures: the best of three."""
    seconds = []
    for _ in range(3):
        started = time.process_time()
        packs = pack(lengths, capacity)
        seconds.append(time.process_time() - started)
    return {"seconds": min(seconds), "bins": len(packs)}


def theirs(way: str, lengths_file: Path, capacity: int) -> dict[str, Any]:
    """Return a peer's figures, measured in its own process."""
    peer, _, mode = way.partition(" ")
    done = subprocess.run(
        [peer_python(peer), PEERS / "pack.py", peer, mode, lengths_file, str(capacity)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--only", nargs="*", help="ways to run besides our own; default: all")
    options = parser.parse_args()
    lengths = draw_lengths(options.samples, options.capacity)
    BENCH.mkdir(exist_ok=True)
    file = BENCH / "lengths.npy"
    np.save(file, lengths)
    least = -(-int(lengths.sum()) // options.capacity)
    print(
        f"{options.samples} samples, {lengths.sum()} tokens, packs of {options.capacity}: at least {least} packs\n"
    )
    print("| algorithm | CPU s | samples/s | packs | fill |\n|---|--:|--:|--:|--:|")
    rows = {"megaswift": ours(lengths, options.capacity)}
    print_row("megaswift", rows["megaswift"], options.samples, least)
    for way in WAYS:
        if options.only is None or any(word in way for word in options.only):
            print_row(way, theirs(way, file, options.capacity), options.samples, least)


def print_row(name: str, row: dict[str, Any], samples: int, least: int) -> None:
    """Print one line of the table."""
    rate = samples / max(row["seconds"], 1e-9)
    print(
        f"| {name} | {row['seconds']:.2f} | {rate:.3g} | {row['bins']} | {least / row['bins']:.3%} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
