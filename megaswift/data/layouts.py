"""Data layouts: which columns mean what. One raw row becomes one Sample.

The names of columns are those that ms-swift, LLaMA-Factory, TRL, OpenAI and Anthropic data use.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaswift.data.media import TAGS, MediaList, add_column, match_tags
from megaswift.data.sample import MAX_FLOAT32, Message, RowError, Sample
from megaswift.data.turns import answer_only, check_conversation, messages_of, parse_literal, tools_of

ALIASES = {  # canonical column -> names it goes by
    "system": ("system", "system_prompt"),
    "query": ("query", "prompt", "input", "instruction", "question", "problem"),
    "response": (
        "response", "answer", "output", "targets", "target", "answer_key", "answers", "solution",
        "text", "completion", "content",
    ),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
    "audios": ("audios", "audio"),
    "conversations": ("conversations", "conversation"),
    "rejected_response": ("rejected_response", "rejected_answer", "rejected_output"),
}  # fmt: skip
KNOWN = (
    "messages", "conversations", "instruction", "input", "output", "history", "system", "query", "response",
    "tools", "images", "videos", "audios", "chosen", "rejected", "rejected_response", "rejected_messages",
    "positive_messages", "negative_messages", "label", "kto_tag", "margin", "chat_template_kwargs",
)  # fmt: skip
Columns = dict[str, Any]


def to_sample(
    row: dict[str, Any],
    source: str,
    *,
    columns: dict[str, str] | None = None,
    folder: Path,
    dataset: str = "",
) -> Sample:
    """Return the Sample of one raw row of a set; `columns` renames, `folder` is where relative media paths begin.

    Raises RowError with the kind and the reason when the row cannot be used.
    """
    row = _renamed(row, columns or {})
    named = _canonical(row)
    name, read = _layout_of(named)
    media = MediaList()
    messages = read(named, media)
    if named.get("label") is not None and answer_only(messages) is not None:
        messages = [{**messages[0], "role": "user"}]  # a text that is judged answers nothing
    if "system" in named and named["system"] and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(named, "system")}, *messages]
    for kind in TAGS:
        add_column(media, kind, named.get(kind))
    rejected = _rejected(named, messages, media)
    if rejected and "chosen" in named:
        messages = _answered(named, "chosen", messages, media)
    text = None if rejected or named.get("label") is not None else answer_only(messages)
    if text is None:
        messages = match_tags(messages, media, folder)
        check_conversation(messages, has_media=bool(media))
        if rejected:
            _ends_with_answer(messages, name)
            check_conversation(rejected, has_media=bool(media))
            if rejected == messages:
                raise RowError("pair", "the chosen and the rejected answer are the same")
    kwargs = parse_literal(named.get("chat_template_kwargs")) or {}
    if not isinstance(kwargs, dict):
        raise RowError("type", "chat_template_kwargs is not an object")
    return Sample(
        source=source,
        dataset=dataset,
        layout="text" if text is not None else name,
        messages=() if text is not None else tuple(messages),
        text=text,
        tools=tools_of(named.get("tools")),
        images=tuple(media.images),
        videos=tuple(media.videos),
        audios=tuple(media.audios),
        rejected=tuple(rejected),
        positives=_group(named, "positive", media),
        negatives=_group(named, "negative", media),
        label=_label(named),
        margin=_number(named, "margin"),
        template_kwargs=kwargs,
        extras={key: value for key, value in row.items() if key.lower() not in KNOWN},
    )


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    if not columns:
        return row
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in columns and key not in taken}
    return kept | {columns[key]: value for key, value in row.items() if key in columns}


def _canonical(row: dict[str, Any]) -> Columns:
    """Return the filled columns under canonical names; alpaca's instruction, input and output keep theirs."""
    lower = {key.lower(): value for key, value in row.items() if isinstance(key, str) and value is not None}
    is_alpaca = "instruction" in lower and ("output" in lower or "input" in lower)
    if is_alpaca or "messages" in lower:
        groups = {name: names for name, names in ALIASES.items() if name not in ("query", "response")}
    else:
        groups = ALIASES
    named: Columns = dict(lower)
    for canonical, names in groups.items():
        if canonical in lower:
            continue
        present = [name for name in names if name in lower]
        if canonical == "response" and len(present) > 1:
            present = [name for name in present if name not in ("text", "content", "solution")] or present
        if len(present) > 1:
            raise RowError(
                "columns", f"{' and '.join(present)} may each be the {canonical}; say which with --columns"
            )
        if present:
            named[canonical] = named.pop(present[0])
    return named


def _layout_of(named: Columns) -> tuple[str, Callable[[Columns, MediaList], list[Message]]]:
    for name, needed, read in LAYOUTS:
        if all(column in named for column in needed):
            return name, read
    raise RowError(
        "columns",
        f"no known layout has the columns {', '.join(named) or '(none)'}; expected messages, conversations, "
        "instruction/output, query/response, prompt/completion, question/answer or text; rename with --columns",
    )


def _messages(named: Columns, media: MediaList) -> list[Message]:
    return messages_of(named["messages"], column="messages", media=media)


def _conversations(named: Columns, media: MediaList) -> list[Message]:
    turns = parse_literal(named["conversations"])
    if (
        isinstance(turns, list)
        and turns
        and isinstance(turns[0], dict)
        and {"human", "assistant"} & turns[0].keys()
    ):
        return _human_assistant_pairs(turns)
    return messages_of(turns, column="conversations", media=media)


def _human_assistant_pairs(turns: list[Any]) -> list[Message]:
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or "human" not in turn or "assistant" not in turn:
            raise RowError("columns", f"pair {number} lacks human or assistant")
        messages.append({"role": "user", "content": _text(turn, "human")})
        messages.append({"role": "assistant", "content": _text(turn, "assistant")})
    return messages


def _alpaca(named: Columns, media: MediaList) -> list[Message]:
    instruction = _text(named, "instruction")
    more = _text(named, "input") if "input" in named else ""
    question = f"{instruction}\n{more}" if instruction and more else instruction or more
    return _with_history(named, question, _answer(named, "output") if "output" in named else None)


def _query_response(named: Columns, media: MediaList) -> list[Message]:
    query = parse_literal(named["query"]) if _looks_like_turns(named["query"]) else named["query"]
    if isinstance(query, list):  # TRL's conversational prompt and completion
        messages = messages_of(query, column="prompt", media=media)
        if "response" in named:
            completion = named["response"]
            turns = (
                completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
            )
            messages += messages_of(turns, column="completion", media=media)
        return messages
    return _with_history(
        named, _text(named, "query"), _answer(named, "response") if "response" in named else None
    )


def _looks_like_turns(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith(('[{"', "[{'")))


def _with_history(named: Columns, question: str, answer: str | None) -> list[Message]:
    history = parse_literal(named.get("history")) or []
    if not isinstance(history, list):
        raise RowError("type", f"history is {type(history).__name__}, not a list of [question, answer] pairs")
    messages: list[Message] = []
    for number, pair in enumerate(history, start=1):
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not all(isinstance(part, str) for part in pair)
        ):
            raise RowError("type", f"entry {number} of history is not a [question, answer] pair of texts")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    messages.append({"role": "user", "content": question})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages


def _answer(named: Columns, column: str) -> str:
    """Return an answer; of a list of answers the first, as ms-swift does."""
    value = named[column]
    if isinstance(value, list):
        if not value:
            raise RowError("empty answer", f"{column} is an empty list")
        value = value[0]
    return _text({column: value}, column)


def _text(named: Columns, column: str) -> str:
    value = named[column]
    if not isinstance(value, str):
        raise RowError("type", f"{column} is {type(value).__name__}, not text")
    return value


def _plain_text(named: Columns, media: MediaList) -> list[Message]:
    text = _text(named, "response")
    if not text.strip():
        raise RowError("empty text", "the text is empty")
    return [{"role": "assistant", "content": text}]


def _pair_only(named: Columns, media: MediaList) -> list[Message]:
    """Read chosen and rejected that each hold the whole conversation; this is its prompt."""
    chosen = parse_literal(named["chosen"])
    if not isinstance(chosen, list):
        raise RowError("pair", "chosen holds one answer and there is no prompt to it")
    messages = messages_of(chosen, column="chosen", media=media)
    return _prompt(messages)


def _last_user(messages: list[Message]) -> int:
    return max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)


def _prompt(messages: list[Message]) -> list[Message]:
    return messages[: _last_user(messages) + 1]


def _answer_turns(value: Any, column: str, prompt: list[Message], media: MediaList) -> list[Message]:
    """Return prompt + answer for an answer given as text, one turn, the turns after the prompt, or all turns."""
    value = parse_literal(value) if _looks_like_turns(value) else value
    if isinstance(value, str):
        return [*prompt, {"role": "assistant", "content": value}]
    turns = messages_of([value] if isinstance(value, dict) else value, column=column, media=media)
    whole = any(message["role"] == "user" for message in turns)
    return turns if whole else [*prompt, *turns]


def _rejected(named: Columns, messages: list[Message], media: MediaList) -> list[Message]:
    present = [name for name in ("rejected_messages", "rejected_response", "rejected") if name in named]
    if not present:
        if "chosen" in named:
            raise RowError("pair", "there is a chosen answer and no rejected one")
        return []
    if "chosen" not in named and present[0] == "rejected":
        raise RowError("pair", "there is a rejected answer and no chosen one")
    return _answered(named, present[0], messages, media)


def _answered(named: Columns, column: str, messages: list[Message], media: MediaList) -> list[Message]:
    """Return the prompt of a conversation with the answer of a column, and the system turn in any case."""
    turns = _answer_turns(named[column], column, _prompt(messages), media)
    system = [message for message in messages[:1] if message["role"] == "system"]
    if turns and turns[0]["role"] != "system":
        turns = [*system, *turns]
    return _ends_with_answer(turns, column)


def _ends_with_answer(messages: list[Message], column: str) -> list[Message]:
    if not messages or messages[-1]["role"] != "assistant":
        raise RowError("pair", f"{column} does not end with an assistant turn")
    return messages


def _group(named: Columns, kind: str, media: MediaList) -> tuple[tuple[Message, ...], ...]:
    """Return the conversations of a column such as positive_messages, or the texts of one such as positive (MTEB's sets)."""
    column, texts = f"{kind}_messages", named.get(kind)
    texts = [texts] if isinstance(texts, str) else texts
    if column not in named and isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return tuple(({"role": "user", "content": text},) for text in texts)
    conversations = parse_literal(named.get(column)) or []
    if not isinstance(conversations, list):
        raise RowError("type", f"{column} is not a list of conversations")
    if conversations and isinstance(conversations[0], dict):
        conversations = [conversations]
    group = tuple(tuple(messages_of(turns, column=column, media=media)) for turns in conversations)
    if not all(any(message["content"].strip() for message in messages) for messages in group):
        raise RowError("empty text", f"a text of {column} is empty")
    return group


def _label(named: Columns) -> bool | int | float | tuple[float, ...] | None:
    value = named.get("label", named.get("kto_tag"))
    value = parse_literal(value)
    if isinstance(value, list) and all(isinstance(item, (bool, int, float)) for item in value):
        return tuple(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise RowError("label", f"label is {value!r}, not a number, true or false, or a list of numbers")


def _number(named: Columns, column: str) -> float | None:
    value = parse_literal(named.get(column))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or (is_number and not abs(value) > MAX_FLOAT32):  # NaN: nothing is said
        return value
    raise RowError("type", f"{column} is {value!r}, not a finite number")


LAYOUTS: tuple[tuple[str, tuple[str, ...], Callable[[Columns, MediaList], list[Message]]], ...] = (
    ("messages", ("messages",), _messages),
    ("sharegpt", ("conversations",), _conversations),
    ("alpaca", ("instruction", "input"), _alpaca),
    ("alpaca", ("instruction", "output"), _alpaca),
    ("query-response", ("query",), _query_response),
    ("preference", ("chosen", "rejected"), _pair_only),
    ("text", ("response",), _plain_text),
)
