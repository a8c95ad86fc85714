"""Peak memory and time of the fused output layer and loss beside the plain one: `make bench-loss`.

Each runs in its own process; the peak is what the process adds to its resident memory after the inputs exist.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from megaswift.kernels.linear_cross_entropy.ops import linear_cross_entropy
from megaswift.kernels.linear_cross_entropy.reference import linear_cross_entropy as full_logits

WAYS = {"plain": full_logits, "chunked": linear_cross_entropy}


def measure(way: str, tokens: int, vocabulary: int, dim: int, threads: int) -> dict[str, float]:
    """Return peak MiB above the inputs, seconds of forward and backward, loss and norm of the gradient."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden_TD = torch.randn(tokens, dim, requires_grad=True)
    weight_VD = torch.randn(vocabulary, dim).mul_(0.05).requires_grad_()
    labels_T = torch.randint(0, vocabulary, (tokens,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loss = WAYS[way](hidden_TD, weight_VD, labels_T).mean()
    loss.backward()
    seconds = time.perf_counter() - start
    assert weight_VD.grad is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "peak_mib": peak / 1024,
        "time_s": seconds,
        "loss": loss.item(),
        "weight_grad_norm": weight_VD.grad.norm().item(),
    }


def compare(tokens: int, vocabulary: int, dim: int, threads: int) -> dict[str, dict[str, float]]:
    """Return the measurements of both ways, each in its own process."""
    sizes = [f"--tokens={tokens}", f"--vocabulary={vocabulary}", f"--dim={dim}", f"--threads={threads}"]
    found = {}
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, f"--way={way}", *sizes],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found[way] = json.loads(done.stdout)
    return found


def main() -> None:
    """Print a table, or one way's numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    sizes = (chosen.tokens, chosen.vocabulary, chosen.dim, chosen.threads)
    if chosen.way:
        print(json.dumps(measure(chosen.way, *sizes)))
        return
    found = compare(*sizes)
    print(
        f"{chosen.tokens} tokens, vocabulary {chosen.vocabulary}, model size {chosen.dim}, float32, {chosen.threads} CPU threads\n"
    )
    print(
        "| way | peak MiB above inputs | s forward + backward | loss | norm of weight gradient |\n|---|--:|--:|--:|--:|"
    )
    for way, row in found.items():
        print(
            f"| {way} | {row['peak_mib']:.0f} | {row['time_s']:.1f} | {row['loss']:.6f} | {row['weight_grad_norm']:.6f} |"
        )
    print(f"\n{found['plain']['peak_mib'] / found['chunked']['peak_mib']:.1f} times less memory")


if __name__ == "__main__":
    main()
