"""Balance and padding of packed documents over cp ranks, beside two other cuts: `make bench-context`."""

import math
import random
import sys

from megaswift.kernels.context_attention.plan import ContextPlan, balance, make_plan, pairs

MEDIANS = (100, 400, 2200)
CAPACITIES = (8192, 16384, 32768, 65536, 131072)


def draw_packs(count: int) -> list[list[int]]:
    """Draw packs of 8k to 128k tokens full of documents of lognormal length."""
    dice = random.Random(0)
    packs = []
    for _ in range(count):
        capacity, median, lengths = dice.choice(CAPACITIES), dice.choice(MEDIANS), []
        while (left := capacity - sum(lengths)) > 0:
            lengths.append(min(left, max(1, round(dice.lognormvariate(math.log(median), 1.0)))))
        packs.append(lengths)
    return packs


def padded_zigzag(lengths: list[int], ranks: int) -> tuple[float, float]:
    """Return (balance, padding over tokens) by Transformer Engine's rule: documents padded to 2 * ranks."""
    padded = [-(-length // (2 * ranks)) * 2 * ranks for length in lengths]
    plan = make_plan(padded, ring=ranks)
    works = [_real_work(plan, lengths, rank) for rank in range(ranks)]
    return max(works) * ranks / sum(works), sum(padded) / sum(lengths) - 1


def _real_work(plan: ContextPlan, lengths: list[int], rank: int) -> int:
    """Return the work of one rank's queries that are not padding."""
    real = 0
    for pair in plan.pieces[rank]:
        for piece in pair:
            real += pairs(piece.position, min(piece.length, max(0, lengths[piece.document] - piece.position)))
    return real


def whole_pack_zigzag(lengths: list[int], ranks: int) -> float:
    """Return the balance where the pack is cut as if it were one document."""
    cut = sum(lengths) / (2 * ranks)
    works = [0] * ranks
    place = 0
    for length in lengths:
        position = 0
        while position < length:
            chunk = min(int(place / cut), 2 * ranks - 1)
            step = min(length - position, max(1, math.ceil((chunk + 1) * cut) - place))
            works[min(chunk, 2 * ranks - 1 - chunk)] += pairs(position, step)
            position, place = position + step, place + step
    return max(works) * ranks / sum(works)


def main() -> None:
    """Print the table; the argument is the number of packs."""
    packs = draw_packs(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    print(
        f"{len(packs)} packs of {min(CAPACITIES)} to {max(CAPACITIES)} tokens, lognormal documents of median {MEDIANS}, sigma 1"
    )
    print("most attention work of a rank over the mean: worst pack (mean of packs)\n")
    print(
        "| cp | ours | ours: padding | every document padded to 2 cp | its padding | pack cut as one document |\n|--:|--:|--:|--:|--:|--:|"
    )
    for ranks in (2, 4, 8, 16):
        ours = balance(make_plan([*lengths, -sum(lengths) % ranks], ring=ranks) for lengths in packs)
        waste = sum(-sum(lengths) % ranks for lengths in packs) / sum(map(sum, packs))
        padded = [padded_zigzag(lengths, ranks) for lengths in packs]
        cut = [whole_pack_zigzag(lengths, ranks) for lengths in packs]
        columns = [
            f"{max(found):.4f} ({sum(found) / len(found):.4f})"
            for found in (ours, [even for even, _ in padded], cut)
        ]
        padding = sum(extra * sum(lengths) for (_, extra), lengths in zip(padded, packs, strict=True)) / sum(
            map(sum, packs)
        )
        print(f"| {ranks} | {columns[0]} | {waste:.2%} | {columns[1]} | {padding:.2%} | {columns[2]} |")


if __name__ == "__main__":
    main()
