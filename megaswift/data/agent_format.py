"""How a chat template writes tools and calls, told by its text, so that a format which is asked for by name can be checked."""

from megaswift.errors import DataError

# ms-swift's name of a format (4.6.0.dev0, agent_template/) -> what its templates hold, and what those of others hold
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hermes": (("<tools>", "<tool_call>", "<tool_response>"), ("<function=", "<arg_key>")),  # Qwen2.5, Qwen3
    "qwen3_coder": (("<tools>", "<function=", "<parameter="), ()),
    "qwen3_5": (("<tools>", "<function=", "<parameter="), ()),
    "glm4_5": (("<tools>", "<arg_key>", "<arg_value>"), ()),
}


def check_agent_format(name: str, chat_template: str | dict[str, str] | None, *, model: str) -> None:
    """Raise DataError unless the template writes tools in the format `name`; tools are written by no other."""
    texts = chat_template.values() if isinstance(chat_template, dict) else [chat_template or ""]
    marks, others = FORMATS[name]
    if any(all(mark in text for mark in marks) and not any(one in text for one in others) for text in texts):
        return
    raise DataError(
        f"agent_template={name}: the chat template of {model} does not write tools so, and it is what writes them. Leave "
        "--agent_template out, or put the format into chat_template of the tokenizer's files."
    )
