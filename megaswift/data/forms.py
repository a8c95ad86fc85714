"""What the rows of a task must hold: the documents that a row becomes, and what it says about them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from megaswift.data.sample import Message, RowError, Sample


@dataclass(frozen=True, kw_only=True)
class Form:
    """How rows become documents. The documents of a row stay together in every batch and in every pack."""

    name: str
    documents: Callable[[Sample], tuple[Sample, ...]]  # raises RowError for a row that the task cannot use
    per_row: int  # how many they are
    target: Callable[[Sample], float | None]  # what the row says beside its text; None: nothing
    asks: bool = False  # documents are prompts that the model is to answer: no token carries loss


def _itself(sample: Sample) -> tuple[Sample, ...]:
    return (sample,)


def _pair(sample: Sample) -> tuple[Sample, ...]:
    """Return the conversation with the chosen answer, then the one with the rejected answer."""
    if not sample.rejected:
        raise RowError(
            "pair", f"a row of layout {sample.layout} has no rejected answer (rejected, rejected_response)"
        )
    return sample, dataclasses.replace(sample, messages=sample.rejected)


def _judged(sample: Sample) -> tuple[Sample, ...]:
    if not isinstance(sample.label, bool | int) or sample.label not in (0, 1):
        raise RowError("label", f"label is {sample.label!r}, not true or false")
    return (sample,)


def _prompt(sample: Sample) -> tuple[Sample, ...]:
    """Return the conversation without its answer, if it has one: that is left to the rewards."""
    asked = asked_of(sample.messages)
    if not asked or asked[-1]["role"] == "system":
        raise RowError("no prompt", f"a row of layout {sample.layout} has no turn to answer")
    return (dataclasses.replace(sample, messages=asked),)


def asked_of(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the conversation up to where the assistant has to speak last."""
    asked = [number for number, message in enumerate(messages) if message["role"] != "assistant"]
    return messages[: asked[-1] + 1] if asked else ()


CONVERSATIONS = Form(name="conversations", documents=_itself, per_row=1, target=lambda sample: None)
PAIRS = Form(name="pairs", documents=_pair, per_row=2, target=lambda sample: sample.margin)
JUDGEMENTS = Form(
    name="judgements",
    documents=_judged,
    per_row=1,
    target=lambda sample: float(sample.label),  # type: ignore[arg-type]  # seen by _judged
)

PROMPTS = Form(name="prompts", documents=_prompt, per_row=1, target=lambda sample: None, asks=True)


def form_for(rlhf_type: str | None) -> Form:
    """Return what rows must hold for a kind of preference training; None: for fine-tuning or pre-training."""
    if rlhf_type is None:
        return CONVERSATIONS
    return {"kto": JUDGEMENTS, "grpo": PROMPTS}.get(rlhf_type, PAIRS)
