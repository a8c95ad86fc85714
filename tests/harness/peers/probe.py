"""Run a peer's own command with a stopwatch in transformers.Trainer; the peers' venvs run this file, megaswift does not.

    python probe.py RESULT.json MODULE[:FUNCTION] [ARGUMENTS ...]

Writes the real (non-padding) tokens and the seconds of every step after the first, and the peak resident memory.
"""

import importlib
import json
import resource
import sys
import time

started = time.perf_counter()
starts: list[float] = []
tokens: list[int] = []


def real_tokens(inputs):  # type: ignore[no-untyped-def]
    """Return the tokens that are not padding: those that a mask lets see themselves."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs["input_ids"].numel()
    if mask.dim() == 4:  # a packed batch's mask [B, 1, S, S]: boolean, or 0 where a token is seen
        mask = mask.diagonal(dim1=-2, dim2=-1)
        return int((mask == 0).sum()) if mask.is_floating_point() else int(mask.sum())
    return int((mask != 0).sum())


def install(result: str) -> None:
    """Time Trainer.training_step: a step lasts from its start to the next one's, optimizer included."""
    from transformers import Trainer

    original = Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):  # type: ignore[no-untyped-def]
        starts.append(time.perf_counter())
        tokens.append(real_tokens(inputs))
        return original(self, model, inputs, *args, **kwargs)

    original_train = Trainer.train

    def train(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        out = original_train(self, *args, **kwargs)
        starts.append(time.perf_counter())
        seconds = starts[-1] - starts[1]
        report = {
            "tokens_per_s": sum(tokens[1:]) / seconds,
            "seconds_per_step": seconds / (len(tokens) - 1),
            "steps": len(tokens) - 1,
            "first_step_s": starts[0] - started,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        with open(result, "w") as file:
            json.dump(report, file)
        return out

    Trainer.training_step = training_step
    Trainer.train = train


if __name__ == "__main__":
    result, target, *arguments = sys.argv[1:]
    install(result)
    module, _, function = target.partition(":")
    sys.argv = [target, *arguments]
    getattr(importlib.import_module(module), function or "main")()
