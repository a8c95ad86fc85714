"""The tokenizer files of a model folder with more special tokens, and a folder of links in which they stand."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.errors import ConfigError
from megaswift.metadata.files import read_json

TOKENIZER_FILE = "tokenizer.json"
# Those that transformers 4 and 5 read; the later ones are read by both.
_LISTS = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True, kw_only=True)
class MoreTokens:
    """What a tokenizer becomes with more special tokens."""

    texts: Mapping[
        str, str
    ]  # name -> text of every file that changes; none where all of them are special already
    added: tuple[str, ...]
    num_ids: int  # one more than the largest id


def with_new_tokens(folder: Path, tokens: Sequence[str]) -> MoreTokens:
    """Return a folder's tokenizer with `tokens` as special ones; they get the ids that transformers' add_special_tokens gives.

    Files keep their format: nothing is loaded and saved again by another version. Raises ConfigError.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ConfigError(
            f"new_special_tokens needs {TOKENIZER_FILE}, and {folder} has none. Write one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    from tokenizers import AddedToken, Tokenizer  # only runs with new tokens pay for it

    backend = Tokenizer.from_file(str(path))
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    added = tuple(token for token in dict.fromkeys(tokens) if token not in special)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return MoreTokens(
        texts=_texts(folder, json.loads(backend.to_str())["added_tokens"], added) if added else {},
        added=added,
        num_ids=1 + max(backend.get_vocab().values()),
    )


def _texts(folder: Path, entries: Sequence[Mapping[str, Any]], added: Collection[str]) -> dict[str, str]:
    """Return the tokenizer's files with what tokenizer.json says of all added tokens, the old ones among them."""
    new = {
        str(one["id"]): {k: v for k, v in one.items() if k != "id"}
        for one in entries
        if one["content"] in added
    }
    files = {TOKENIZER_FILE: read_json(folder / TOKENIZER_FILE) | {"added_tokens": entries}}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            files[name] = read_json(folder / name)
    config = files.setdefault("tokenizer_config.json", {})
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= new
    listed = [name for name in _LISTS if isinstance(config.get(name), list)] or ["additional_special_tokens"]
    for name in listed:
        config[name] = [*(config.get(name) or []), *added]
    old = files.get("special_tokens_map.json", {})
    if isinstance(old.get("additional_special_tokens"), list):
        old["additional_special_tokens"] += added
    if "added_tokens.json" in files:
        files["added_tokens.json"] |= {one["content"]: int(number) for number, one in new.items()}
    return {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in files.items()}


def link_folder(folder: Path, view: Path, texts: Mapping[str, str], *, without: Collection[str] = ()) -> None:
    """Fill `view` with links to what lies in `folder`, but for files `without` and those whose texts are given. Raises OSError."""
    view.mkdir(parents=True)
    for path in folder.absolute().iterdir():
        if path.name not in texts and path.name not in without:
            (view / path.name).symlink_to(path)
    for name, text in texts.items():
        (view / name).write_text(text, encoding="utf-8")
