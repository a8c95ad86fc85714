"""Which forward step a task has."""

from collections.abc import Callable
from typing import Any

from megaswift.tasks import sft

# Pre-training differs from fine-tuning in the data alone: its loss mask is one everywhere.
TASKS: dict[str, Callable[..., tuple[Any, Any]]] = {"sft": sft.forward_step, "pt": sft.forward_step}
