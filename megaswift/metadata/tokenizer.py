"""Facts of the tokenizer's files: the chat template and the special tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.errors import ModelError
from megaswift.metadata.files import read_json_if_there


@dataclass(frozen=True, kw_only=True)
class TokenizerMeta:
    """What ModelMeta takes from the tokenizer."""

    template: str | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None


def read_tokenizer(folder: Path) -> TokenizerMeta:
    """Return the chat template and the special tokens of a folder; None for whatever the files do not say."""
    config = read_json_if_there(folder / "tokenizer_config.json")
    special = read_json_if_there(folder / "special_tokens_map.json")
    return TokenizerMeta(
        template=_template(folder, config),
        bos_token=_token(config, special, "bos_token"),
        eos_token=_token(config, special, "eos_token"),
        pad_token=_token(config, special, "pad_token"),
    )


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the default chat template; a file of its own wins over tokenizer_config.json, as in transformers."""
    for path in (folder / "chat_template.jinja", folder / "additional_chat_templates" / "default.jinja"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    try:
        named = {entry["name"]: entry["template"] for entry in template}
    except (TypeError, KeyError):
        raise ModelError(
            f"chat_template in {folder / 'tokenizer_config.json'} is neither text nor a list of name and template."
        ) from None
    return named.get("default")


def _token(config: dict[str, Any], special: dict[str, Any], name: str) -> str | None:
    """Return a special token, which the files write as text or as a dictionary with `content`."""
    value = config[name] if name in config else special.get(name)
    return value.get("content") if isinstance(value, dict) else value
