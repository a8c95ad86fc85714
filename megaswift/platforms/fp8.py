"""What a GPU and the software on it allow of FP8."""

import importlib.util
from dataclasses import dataclass
from importlib.metadata import version

import torch

from megaswift.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a recipe asks for; Transformer Engine 2.8, pytorch/fp8.py, check_*_support, and Megatron-Core 0.16.1, fp8_utils.py."""

    capability: tuple[int, int]
    before: tuple[int, int] | None = None  # the first compute capability that does not have it any more
    transformer_engine: tuple[int, int]
    cuda: tuple[int, int] = (12, 1)


RECIPES = {
    "delayed": Needs(capability=(8, 9), transformer_engine=(1, 0)),
    "tensorwise": Needs(capability=(8, 9), transformer_engine=(2, 2)),
    "blockwise": Needs(capability=(9, 0), before=(10, 0), transformer_engine=(2, 3), cuda=(12, 9)),
    "mxfp8": Needs(capability=(10, 0), transformer_engine=(2, 1), cuda=(12, 8)),
}
LARGE_HIDDEN_SIZE = 4096  # models below it gain nothing or lose: tests/golden/published_runs/fp8_speedups.csv


@dataclass(frozen=True, kw_only=True)
class Software:
    """A GPU and what runs on it."""

    device: str
    capability: tuple[int, int]
    transformer_engine: str | None
    cuda: str | None


def software_here(local_rank: int) -> Software:
    """Return what this rank's GPU is and has."""
    installed = importlib.util.find_spec("transformer_engine") is not None
    return Software(
        device=torch.cuda.get_device_name(local_rank),
        capability=torch.cuda.get_device_capability(local_rank),
        transformer_engine=version("transformer_engine") if installed else None,
        cuda=torch.version.cuda,
    )


def obstacle(recipe: str, software: Software) -> str | None:
    """Return why a recipe cannot run, in a few words, or None where it can."""
    needs = RECIPES[recipe]
    if software.capability < needs.capability:
        return f"{software.device} has compute capability {_dotted(software.capability)}, below {_dotted(needs.capability)}"
    if needs.before is not None and software.capability >= needs.before:
        return f"{software.device} has compute capability {_dotted(software.capability)}; it is for those below {_dotted(needs.before)}"
    for name, found, least in (
        ("Transformer Engine", software.transformer_engine, needs.transformer_engine),
        ("CUDA", software.cuda, needs.cuda),
    ):
        if found is None:
            return f"{name} is not installed"
        if _numbers(found) < least:
            return f"{name} is {found}, older than {_dotted(least)}"
    return None


def check_fp8(recipe: str, software: Software) -> None:
    """Raise ConfigError where a recipe cannot run, with those that can."""
    why = obstacle(recipe, software)
    if why is None:
        return
    others = [other for other in RECIPES if obstacle(other, software) is None]
    advice = f"Choose --fp8_recipe {' or '.join(others)}." if others else "Leave --fp8_format out."
    raise ConfigError(f"fp8_recipe={recipe} cannot run here: {why}. {advice}")


def format_for(
    asked: str, recipe: str, *, hidden_size: int, software: Software | None
) -> tuple[str, str | None]:
    """Return the format for the one asked, and why where it was left to us: hybrid where FP8 runs and pays, none elsewhere."""
    if asked != "auto":
        return asked, None
    why = "there is no GPU" if software is None else obstacle(recipe, software)
    if why is None and hidden_size < LARGE_HIDDEN_SIZE:
        why = f"hidden_size={hidden_size} is below {LARGE_HIDDEN_SIZE}, where products in FP8 begin to pay"
    if why is not None:
        return "none", f"fp8_format=auto: none, because {why}."
    return "hybrid", f"fp8_format=auto: hybrid, {recipe} scaling."


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def _numbers(text: str) -> tuple[int, int]:
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in f"{text}.0".split(".")[:2])
    return major, minor
