"""Turns of a conversation as data sets write them, made into messages with the four roles of chat templates."""

import ast
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from megaswift.data.media import MediaList, media_of_block
from megaswift.data.sample import Message, RowError

ROLE_OF = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "tool": "tool", "observation": "tool", "tool_response": "tool", "function_response": "tool", "function": "tool",
    "tool_call": "tool_call", "function_call": "tool_call",
}  # fmt: skip
KEPT_KEYS = ("reasoning_content", "thinking", "name", "tool_call_id", "loss", "loss_scale")


def parse_literal(value: Any) -> Any:
    """Return the list or dict that a string spells as JSON or as a Python literal; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return value


def messages_of(turns: Any, *, column: str, media: MediaList) -> list[Message]:
    """Return the messages of a list of turns ({role, content} or {from, value}); media blocks go to `media`.

    Raises RowError for unknown roles, content that is not text, and broken tool calls.
    """
    turns = parse_literal(turns)
    if not isinstance(turns, list):
        raise RowError("type", f"{column} is {type(turns).__name__}, not a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowError("type", f"turn {number} of {column} is {type(turn).__name__}, not an object")
        messages += _messages_of_turn({k: v for k, v in turn.items() if v is not None}, number, media)
    return _merge_tool_calls(messages)


def _messages_of_turn(turn: dict[str, Any], number: int, media: MediaList) -> list[Message]:
    name = turn.get("role", turn.get("from"))
    if name is None:
        raise RowError("role", f"turn {number} has no role (columns {', '.join(turn)})")
    role = ROLE_OF.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowError("role", f"turn {number} has role {name!r}; known are {', '.join(ROLE_OF)}")
    content = turn.get("content", turn.get("value"))
    if role == "tool_call":
        return [{"role": "assistant", "content": "", "tool_calls": _calls_of(content, number)}]
    message: Message = {"role": role}
    before: list[Message] = []
    if isinstance(content, list):
        content = _text_of_blocks(content, number, message, before, media)
    elif content is None:
        content = ""
    if role == "tool" and isinstance(content, (dict, list)):
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise RowError("type", f"the content of turn {number} is {type(content).__name__}, not text")
    message["content"] = content
    message.update((key, turn[key]) for key in KEPT_KEYS if key in turn)
    _check_kept(message, number)
    if turn.get("tool_calls"):
        message["tool_calls"] = _calls_of(turn["tool_calls"], number)
    if before and not content:
        return before  # an Anthropic turn that only carries tool results
    return [*before, message]


def _check_kept(message: Message, number: int) -> None:
    """Raise RowError for thinking that is not text, and for a loss or loss_scale that weighs nothing."""
    for key in ("reasoning_content", "thinking"):
        if key in message:
            _string(message[key], f"the {key} of turn {number}")
    for key in ("loss", "loss_scale"):
        value = message.get(key, 1)
        if not isinstance(value, bool | int | float) or not 0 <= value < math.inf:
            raise RowError("type", f"the {key} of turn {number} is {value!r}, not a number from 0 on")


def _text_of_blocks(
    blocks: list[Any], number: int, message: Message, before: list[Message], media: MediaList
) -> str:
    """Join OpenAI or Anthropic content blocks; thinking and tool use go to `message`, tool results to `before`."""
    texts: list[str] = []
    for block in blocks:
        if isinstance(block, str):
            texts.append(block)
            continue
        if not isinstance(block, dict):
            raise RowError(
                "type", f"a content block of turn {number} is {type(block).__name__}, not an object"
            )
        kind = block.get("type", "text" if "text" in block else None)
        if kind == "text":
            texts.append(_string(block.get("text"), f"a text block of turn {number}"))
        elif kind == "thinking":
            message["reasoning_content"] = _string(
                block.get("thinking"), f"a thinking block of turn {number}"
            )
        elif kind == "tool_use":
            call = {"name": block.get("name"), "arguments": block.get("input"), "id": block.get("id")}
            message.setdefault("tool_calls", []).extend(_calls_of([call], number))
        elif kind == "tool_result":
            result = block.get("content", "")
            if isinstance(result, list):
                result = _text_of_blocks(result, number, {}, [], media)
            before.append({"role": "tool", "content": _string(result, f"a tool result of turn {number}")})
            if block.get("tool_use_id"):
                before[-1]["tool_call_id"] = block["tool_use_id"]
        else:
            tag = media_of_block(block, media)
            if tag is None:
                raise RowError("type", f"turn {number} has a content block of unknown type {kind!r}")
            texts.append(tag)
    return "".join(texts)


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RowError("type", f"{what} is {type(value).__name__}, not text")
    return value


def _calls_of(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return tool calls in OpenAI's form with arguments as an object, which is what chat templates expect."""
    calls = parse_literal(calls)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(
            "tool call", f"the tool call of turn {number} is not a JSON object with name and arguments"
        )
    found = []
    for call in calls:
        function = call.get("function", call)
        function = function if isinstance(function, dict) else {}
        arguments = parse_literal(function.get("arguments", function.get("parameters", {})) or {})
        if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
            raise RowError(
                "tool call", f"a tool call of turn {number} lacks a name, or arguments that are a JSON object"
            )
        entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if call.get("id"):
            entry["id"] = call["id"]
        found.append(entry)
    return found


def _merge_tool_calls(messages: list[Message]) -> list[Message]:
    """Join a tool call with the assistant turn before it: one turn may say something and call several tools."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else {}
        only_calls = message["role"] == "assistant" and message.get("tool_calls") and not message["content"]
        if only_calls and last.get("role") == "assistant":
            merged[-1] = {**last, "tool_calls": [*last.get("tool_calls", ()), *message["tool_calls"]]}
        else:
            merged.append(message)
    return merged


def tools_of(tools: Any) -> tuple[dict[str, Any], ...]:
    """Return function schemas in OpenAI's form; a JSON string and bare functions are accepted."""
    tools = parse_literal(tools)
    tools = [tools] if isinstance(tools, dict) else tools
    if not tools:
        return ()
    if not isinstance(tools, list):
        raise RowError("tools", "tools is not a JSON list of function schemas")
    schemas = [parse_literal(tool) for tool in tools]
    for schema in schemas:
        function = schema.get("function", schema) if isinstance(schema, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("tools", "a function schema has no name")
    return tuple(s if "function" in s else {"type": "function", "function": s} for s in schemas)


def check_conversation(messages: Sequence[Message], *, has_media: bool = False) -> None:
    """Raise RowError where the order of roles or an empty turn makes a conversation useless for any task."""
    if not messages:
        raise RowError("empty conversation", "there is no turn")
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise RowError(
            "order", f"turn {roles.index('system', 1) + 1} is a system turn; only the first may be one"
        )
    if roles == ["system"]:
        raise RowError("empty conversation", "there is only a system turn")
    first = roles[1] if roles[0] == "system" else roles[0]
    if first != "user":
        raise RowError("order", f"the conversation begins with the {first}, not with the user")
    for number, message in enumerate(messages, start=1):
        role, previous = message["role"], roles[number - 2]
        if role == "tool" and (previous not in ("assistant", "tool") or number == 1):
            raise RowError("order", f"turn {number} is a tool result that follows no tool call")
        if message["content"].strip() or message.get("tool_calls"):
            continue
        if role == "assistant":
            raise RowError("empty answer", f"turn {number} is an assistant turn without text")
        if role == "user" and not has_media:
            raise RowError("empty question", f"turn {number} is a user turn without text")


def answer_only(messages: Iterable[Message]) -> str | None:
    """Return the text of a conversation that is one assistant turn and nothing else, which means pre-training."""
    messages = list(messages)
    if len(messages) == 1 and messages[0]["role"] == "assistant" and messages[0]["content"].strip():
        return str(messages[0]["content"])
    return None
