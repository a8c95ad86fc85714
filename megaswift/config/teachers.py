"""Teachers behind HTTP: --teacher_model_server names one, or several that share the rows out by tags (ms-swift 4.6)."""

import json
from dataclasses import dataclass
from typing import Any

from megaswift.config.preference import PreferenceConfig
from megaswift.errors import ConfigError

BY_SET = "dataset"  # --teacher_tag_key: a row's tag is the --dataset that it comes from, not a column
FORM = 'http://host:port, or [{"url": "http://host:port", "tags": ["a", "b"]}, ...]'


@dataclass(frozen=True, kw_only=True)
class TeacherServer:
    """One teacher."""

    url: str
    tags: tuple[str, ...] = ()  # of the rows that it teaches; none: all rows


def teacher_servers(chosen: PreferenceConfig) -> list[TeacherServer]:
    """Return the teachers behind HTTP, if there are; raises ConfigError where their text is none of FORM."""
    text = (chosen.teacher_model_server or "").strip()
    if not text.startswith("["):
        return [TeacherServer(url=_url(text))] if text else []
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"teacher_model_server={text} is not JSON: {error}. Write {FORM}.") from None
    found = [_server(entry, text) for entry in entries]
    tags = [tag for server in found for tag in server.tags]
    if not found or (len(found) > 1 and not all(server.tags for server in found)):
        raise ConfigError(
            f"teacher_model_server={text}: each of several teachers has tags of its own. Write {FORM}."
        )
    if len(set(tags)) < len(tags):
        twice = next(tag for tag in tags if tags.count(tag) > 1)
        raise ConfigError(
            f"teacher_model_server={text} gives the tag {twice!r} twice. A row has one teacher: leave one out."
        )
    return found


def shares_rows_out(chosen: PreferenceConfig) -> bool:
    """Whether a row's tag decides who teaches it."""
    return len(teacher_servers(chosen)) > 1


def teachers_by_tag(chosen: PreferenceConfig) -> dict[str, int]:
    """Return the number of the teacher whose rows a tag marks."""
    name = tag_of_set if chosen.teacher_tag_key == BY_SET else str
    return {name(tag): number for number, server in enumerate(teacher_servers(chosen)) for tag in server.tags}


def tag_of_set(argument: str) -> str:
    """Return a --dataset argument as tags name it: without how many rows are drawn, and from which hub."""
    whole = argument.removeprefix("HF::").removeprefix("MS::")
    name, mark, number = whole.rpartition("#")
    return name if mark and number.isdigit() else whole


def _server(entry: Any, text: str) -> TeacherServer:
    known = isinstance(entry, dict) and isinstance(entry.get("url"), str) and entry.keys() <= {"url", "tags"}
    if not known or not isinstance(entry.get("tags", []), list):
        raise ConfigError(f"teacher_model_server={text} holds {json.dumps(entry)}. Write {FORM}.")
    return TeacherServer(url=_url(entry["url"]), tags=tuple(str(tag) for tag in entry.get("tags", [])))


def _url(text: str) -> str:
    """Return an address without what clients of OpenAI's API write behind it."""
    if not text.startswith(("http://", "https://")):
        raise ConfigError(f"teacher_model_server={text} is not an address. Write {FORM}.")
    return text.rstrip("/").removesuffix("/v1")
