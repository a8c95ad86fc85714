"""Sample: the one form that every row of every data layout takes before it is tokenised."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[
    str, Any
]  # role, content (str), and where given: reasoning_content, tool_calls, name, loss, loss_scale

MAX_FLOAT32 = (2 - 2.0**-23) * 2.0**127  # IEEE 754: what is above is infinite in training
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One conversation or one text, with what belongs to it.

    Media are paths, URLs, base64 data URIs or bytes, in the order of their tags in the text. `source` is "file:line".
    """

    source: str
    dataset: str = ""  # the --dataset argument that it comes from, by its name
    layout: str = "messages"
    messages: tuple[Message, ...] = ()
    text: str | None = None  # plain text for pre-training; messages is then empty
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas of functions
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()
    audios: tuple[Any, ...] = ()
    rejected: tuple[Message, ...] = ()  # the whole conversation that ends with the rejected answer
    positives: tuple[tuple[Message, ...], ...] = ()  # embedding and reranker groups
    negatives: tuple[tuple[Message, ...], ...] = ()
    label: bool | int | float | tuple[float, ...] | None = None
    margin: float | None = None  # by how much the chosen answer is better (reward models)
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # extra variables for the chat template
    extras: dict[str, Any] = field(default_factory=dict)  # every other column; reward functions read them


class RowError(Exception):
    """A row that cannot be used; `kind` groups the reasons in reports."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind
        self.reason = reason


# What code raises that stumbles over a value it did not expect; memory and files that fail are no fault of a row.
STUMBLES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def row_error(error: Exception) -> RowError:
    """Return the RowError of a row that cannot be used for a foreseen reason, or for one of STUMBLES."""
    return (
        error if isinstance(error, RowError) else RowError("unexpected", f"{type(error).__name__}: {error}")
    )


def unicode(text: str) -> str:
    """Return a text that tokenizers take: JSON can spell half of a pair of surrogates, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "encoding", f"character {error.start + 1} of the text is half of a pair of surrogates"
        ) from error
    return text
