"""Which part of a rendered conversation the assistant wrote, exact to the character.

A chat template gives text, not spans. They are derived from other renderings with the same template:

    prompt     render(turns before the answer, with the generation prompt): what the model sees before it answers
    finished   render(turns up to and including the answer): the prompt, the answer, the token that ends the turn

What `finished` has after `prompt` is what the model is to generate. The same characters are then found in the whole
conversation, at the same position when the template renders earlier turns alike (nearly always), or else behind the
end of the previous turn's text (templates that move the system message or drop the thinking of earlier turns).
Every span is checked against the text of its turn. Where that fails the row is refused with RowError("mask").
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from megaswift.data.sample import Message, RowError

Render = Callable[[Sequence[Message], bool], str]  # (messages, with the generation prompt) -> text
# What a prompt may open and an answer begin with: the two are then told apart by rendering, not by a remembered shape.
THINK = ("think>", "thinking>", "THINK]", "THINKING|>", "think|>", "think\u25b7")
THINK_END = re.compile(r"</think>|\[/THINK\]|</seed:think>")
TAGS_ONLY = re.compile(r"(?:\s|<\|?/?[\w:]*think\w*\|?>|\[/?THINK\]|[\u25c1]/?think[\u25b7])*", re.IGNORECASE)
MAX_SKELETONS = 1024  # conversation shapes remembered
VARIANTS = 4  # remembered ways to render one shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Characters start to end of the rendered text; `turn` is the index of the assistant's message."""

    turn: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Skeleton:
    """What a template puts around the contents of one shape of conversation, and where spans lie relative to them."""

    around: tuple[str, ...]  # text before the first content, between contents, after the last
    anchors: tuple[tuple[int, int, int], ...]  # (turn, start - its content's start, end - its content's end)


class SpanFinder:
    """Finds the assistant's spans with one template; remembers the shapes it has seen."""

    def __init__(self, *, special_tokens: Iterable[str], stop_tokens: Iterable[str]) -> None:
        longest_first = sorted({token for token in special_tokens if token}, key=len, reverse=True)
        special = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._special = re.compile(special)
        stop = "|".join(map(re.escape, filter(None, stop_tokens))) or "(?!)"
        self._stop = re.compile(stop)
        self._one_token = re.compile(rf"\s*(?:{special})")
        # A turn ends with one token, or with several up to one that stops the model (Cohere: END_RESPONSE, END_OF_TURN).
        self._ender = re.compile(rf"\s*(?:(?:{special})*?(?:{stop})|(?:{special}))")
        self._last_token = re.compile(rf"\s*(?:{stop}|{special})\s*\Z")
        self._last_tokens = re.compile(rf"(?:\s*(?:{special}))+\s*\Z")
        self._tail = ""  # what the template writes after a plain last answer
        self._tail_ender = (
            ""  # the beginning of it that the model is to write: up to the token that ends the turn
        )
        self._skeletons: dict[object, list[Skeleton]] = {}

    def learn_tail(self, render: Render, question: str, answer: str) -> None:
        """Render one plain question and answer to learn what follows an answer. Raises RowError("mask")."""
        text = render(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], False
        )
        if answer not in text:
            raise RowError("mask", "the template does not show the text of an answer")
        self._tail = text[text.rindex(answer) + len(answer) :]
        ender = self._ender.match(self._tail)
        if ender is None and self._tail.strip():
            raise RowError(
                "mask",
                f"the template writes {self._tail!r} after the last answer, which is no end-of-turn token",
            )
        self._tail_ender = ender.group() if ender else self._tail

    @property
    def ends_turns(self) -> bool:
        """Whether something follows the last answer that the model can learn to stop with."""
        return bool(self._tail_ender)

    def find(self, text: str, messages: Sequence[Message], render: Render, *, shape: object) -> list[Span]:
        """Return the spans of every assistant turn of `text`, which is render(messages, False).

        `shape` is whatever besides roles and contents the rendering depends on (tools, template variables).
        Raises RowError("mask") where the spans cannot be told.
        """
        plain = all(
            message.keys() == {"role", "content"} and not _has_tag(message["content"]) for message in messages
        )
        key = (shape, tuple(message["role"] for message in messages)) if plain else None
        known = self._skeletons.get(key, ()) if key is not None else ()
        for skeleton in known:
            spans = _apply(skeleton, text, messages)
            if spans is not None:
                return spans
        spans = self._derive(text, messages, render)
        if key is not None and (known or len(self._skeletons) < MAX_SKELETONS):
            learned = _learn(text, messages, spans)
            if learned is not None:
                self._skeletons[key] = [learned, *known][:VARIANTS]
        return spans

    def from_marks(
        self, text: str, messages: Sequence[Message], marks: Sequence[tuple[int, int]]
    ) -> list[Span]:
        """Return the spans that a template's {% generation %} marks give, with the token that ends each turn.

        Raises RowError("mask") where marks and assistant turns do not belong together one by one.
        """
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        joined: list[tuple[int, int]] = []
        for start, end in marks:
            if joined and not text[joined[-1][1] : start].strip():
                start = joined.pop()[0]
            joined.append((start, end))
        if len(turns) != len(joined):
            raise RowError(
                "mask", f"the template marks {len(joined)} generated parts for {len(turns)} assistant turns"
            )
        spans: list[Span] = []
        for turn, (start, end) in zip(turns, joined, strict=True):
            ender = None if self._special.search(text, start, end) else self._special.match(text, end)
            span = Span(turn=turn, start=start, end=ender.end() if ender else end)
            _check(text, span, messages[turn], spans[-1].end if spans else 0)
            spans.append(span)
        return spans

    def ending(self, answer: str) -> int:
        """Return how many characters at the end of a turn are the token that ends it; others may mark what was said."""
        token = self._last_token.search(answer)
        return 0 if token is None else len(answer) - token.start()

    def _derive(self, text: str, messages: Sequence[Message], render: Render) -> list[Span]:
        spans: list[Span] = []
        previous_end = 0
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = render(messages[:turn], True)
            finished = text if turn == len(messages) - 1 else render(messages[: turn + 1], False)
            asked = partial(_asked, messages[:turn], prompt, render)
            start = _answer_start(prompt, finished, asked, turn)
            body, ender = self._split(finished[start:])
            if finished is text:
                span = Span(turn=turn, start=start, end=start + len(body) + len(ender))
            else:
                span = self._place(text, finished[:start], asked, body, ender, messages, turn, previous_end)
            _check(text, span, message, previous_end)
            spans.append(span)
            previous_end = span.end
        return spans

    def _split(self, rest: str) -> tuple[str, str]:
        """Return the last answer and what ends its turn; the second is empty where the template ends it with nothing."""
        if rest.endswith(self._tail):
            return rest[: len(rest) - len(self._tail)], self._tail_ender
        tokens = self._last_tokens.search(rest)  # tool calls may end otherwise than plain answers
        if tokens is None:
            return rest, ""
        *_, last = self._special.finditer(rest, tokens.start())
        return rest[: last.start()], last.group()

    def _place(
        self,
        text: str,
        before: str,
        asked: Callable[[], int],
        body: str,
        ender: str,
        messages: Sequence[Message],
        turn: int,
        previous_end: int,
    ) -> Span:
        """Find an earlier turn's answer in the whole conversation."""
        for start, end in _candidates(text, before, asked, body, messages, turn, previous_end):
            if self._special.search(text, start, end) and not self._special.search(body):
                continue
            if not ender:
                stop = self._stop.match(text, end)
                return Span(turn=turn, start=start, end=stop.end() if stop else end)
            if text.startswith(ender, end):
                return Span(turn=turn, start=start, end=end + len(ender))
            other = self._one_token.match(text, end)
            if other is not None:
                return Span(turn=turn, start=start, end=other.end())
        raise _ambiguous(turn, "an earlier answer is not rendered as it was when it was the last turn")


def _has_tag(content: str) -> bool:
    # Most texts hold neither word; looking for six tags in each takes longer than all else here.
    return ("think" in content or "THINK" in content) and any(tag in content for tag in THINK)


def visible(message: Message) -> str:
    """Return the part of a turn's text that every template shows: what follows the thinking, without outer blanks."""
    content = message["content"]
    return content[_thinking_end(content) :].strip()


def _thinking_end(answer: str) -> int:
    """Return where the thinking of an answer ends, which may hold any of its words; 0 without any."""
    return max((tag.end() for tag in THINK_END.finditer(answer)), default=0)


def drops_thinking(text: str, message: Message, span: Span) -> bool:
    """Return whether the thinking of an answer is missing from its rendering."""
    thinking = message.get("reasoning_content")
    if thinking is None:
        before, found, _ = message["content"].rpartition("</think>")
        thinking = before.rpartition("<think>")[2] if found else ""
    return thinking.strip() not in text[span.start : span.end]


def _asked(turns: Sequence[Message], prompt: str, render: Render) -> int:
    """Return where the text of the last turn ends in its prompt; -1 where it is not shown.

    The word may also be one that the generation prompt adds ("assistant", "think"), which is not looked at.
    """
    question = visible(turns[-1])
    at = prompt.rfind(question, 0, _common(prompt, render(turns, False))) if question else -1
    return at + len(question) if at >= 0 else -1


def _answer_start(prompt: str, finished: str, asked: Callable[[], int], turn: int) -> int:
    """Return where the answer begins in a conversation that it ends."""
    if finished.startswith(prompt):
        return len(prompt)
    start = _before_thinking(prompt, _common(prompt, finished), max(0, asked()))
    if start is None:
        raise _ambiguous(
            turn, "the template renders the turns before an answer differently once it is answered"
        )
    return start


def _before_thinking(prompt: str, common: int, asked: int) -> int | None:
    """Return the end of the prompt without tags that it opens and a finished answer lacks, such as <think>."""
    return next((end for end in range(common, asked - 1, -1) if TAGS_ONLY.fullmatch(prompt, end)), None)


def _candidates(
    text: str,
    before: str,
    asked: Callable[[], int],
    body: str,
    messages: Sequence[Message],
    turn: int,
    previous_end: int,
) -> Iterator[tuple[int, int]]:
    """Yield where an earlier answer (without what ends it) may be: after the same characters as when it was the last
    turn, or else after the end of the question before it, with or without what a prompt adds to open the thinking."""
    key = _key(messages[turn])
    key_at = body.find(key, _thinking_end(body))
    if not key or key_at < 0:
        return
    if text.startswith(before):
        yield from _forms(text, len(before), body, key_at)
    question = visible(messages[turn - 1])
    question_end = asked()
    if question_end < 0:
        return
    gap = before[question_end:]  # from the question to the answer
    position = text.find(question, previous_end)
    while position >= 0:
        gap_at = position + len(question)
        common = _before_thinking(gap, _common(gap, text[gap_at : gap_at + len(gap)]), 1)
        if common is not None:
            yield from _forms(text, gap_at + common, body, key_at)
        position = text.find(question, position + 1)


def _forms(text: str, start: int, body: str, key_at: int) -> Iterator[tuple[int, int]]:
    """Yield the spans at `start` that hold the answer whole, without its thinking, or with empty thinking before it."""
    for cut in range(key_at + 1):
        if text.startswith(body[cut:], start):
            yield start, start + len(body) - cut
            break
    begin = text.find(body[key_at:], start)
    if begin > start and TAGS_ONLY.fullmatch(text, start, begin):
        yield start, begin + len(body) - key_at


def _common(a: str, b: str) -> int:
    """Return the length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _key(message: Message) -> str:
    """Return text that every rendering of an answer holds: what it says, or the function that it calls."""
    calls = message.get("tool_calls") or ()
    return visible(message) or (str(calls[0]["function"]["name"]) if calls else "")


def _check(text: str, span: Span, message: Message, previous_end: int) -> None:
    if not previous_end <= span.start <= span.end <= len(text):
        raise _ambiguous(span.turn, "its characters overlap with another answer")
    written = text[span.start : span.end]
    if visible(message) not in written:
        raise _ambiguous(span.turn, "the template changes or drops the text of the answer")
    if not all(call["function"]["name"] in written for call in message.get("tool_calls") or ()):
        raise _ambiguous(span.turn, "the template does not render tool calls")


def _ambiguous(turn: int, reason: str) -> RowError:
    return RowError("mask", f"which tokens of turn {turn + 1} are the assistant's cannot be told: {reason}")


def _apply(skeleton: Skeleton, text: str, messages: Sequence[Message]) -> list[Span] | None:
    """Return the spans when `text` is exactly the skeleton around these contents."""
    position = len(skeleton.around[0])
    pieces = [skeleton.around[0]]
    starts = []
    for message, after in zip(messages, skeleton.around[1:], strict=True):
        starts.append(position)
        position += len(message["content"]) + len(after)
        pieces += (message["content"], after)
    if position != len(text) or "".join(pieces) != text:
        return None
    return [
        Span(
            turn=turn, start=starts[turn] + before, end=starts[turn] + len(messages[turn]["content"]) + after
        )
        for turn, before, after in skeleton.anchors
    ]


def _learn(text: str, messages: Sequence[Message], spans: Sequence[Span]) -> Skeleton | None:
    around, starts, position = [], [], 0
    for message in messages:
        start = text.find(message["content"], position)
        if start < 0:
            return None
        around.append(text[position:start])
        starts.append(start)
        position = start + len(message["content"])
    around.append(text[position:])
    anchors = tuple(
        (
            span.turn,
            span.start - starts[span.turn],
            span.end - starts[span.turn] - len(messages[span.turn]["content"]),
        )
        for span in spans
    )
    return Skeleton(around=tuple(around), anchors=anchors)
