"""What a log line says: figures of the steps since the last one."""

import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megaswift.training.loop import Step

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Window:
    """Sums over the steps since the last log line."""

    tokens: int = 0
    flop: float = 0.0
    time_s: float = 0.0
    steps: int = 0

    def plus(self, step: Step) -> "Window":
        """Return the window with one more step."""
        return Window(
            tokens=self.tokens + step.result.tokens,
            flop=self.flop + step.result.flop,
            time_s=self.time_s + step.time_s,
            steps=self.steps + 1,
        )


def step_line(step: Step, window: Window, *, epoch: float, memory_gib: float) -> dict[str, Any]:
    """Return one training line of logging.jsonl.

    Loss, gradient norm and learning rate are those of this step, in full precision, so that runs compare bit for bit;
    speeds are means over the window. Tokens leave padding out; model FLOPs are defined in training/flops.py.
    """
    result, progress = step.result, step.progress
    return {
        "step": progress.step,
        "epoch": epoch,
        "consumed_samples": progress.consumed_samples,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        **result.router,
        **result.metrics,
        "tokens": result.tokens,
        "loss_tokens": result.loss_tokens,
        "step_time_s": window.time_s / window.steps,
        "tokens_per_s": window.tokens / window.time_s,
        "model_tflops_per_s": window.flop / window.time_s / 1e12,
        "memory_gib": memory_gib,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Return the highest memory that any rank has held, in GiB: of the GPU, or resident on a CPU; every rank calls it."""
    if device.type == "cuda":
        used = float(torch.cuda.max_memory_allocated(device))
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
        used = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
    highest = torch.tensor([used], dtype=torch.float64, device=device)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return float(highest) / GIB
