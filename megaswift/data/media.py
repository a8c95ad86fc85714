"""Images, videos and audios of a row: collected from columns and content blocks, matched with the tags in the text."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaswift.data.sample import Message, RowError

TAGS = {"images": "<image>", "videos": "<video>", "audios": "<audio>"}
REMOTE_PREFIXES = ("http://", "https://", "data:", "file://", "s3://", "oss://")
BLOCK_KINDS = {  # type of a content block -> (list it goes to, keys that may hold the medium)
    "image": ("images", ("image", "url", "path", "base64", "source")),
    "image_url": ("images", ("image_url",)),
    "input_image": ("images", ("image_url",)),
    "video": ("videos", ("video", "url", "path")),
    "video_url": ("videos", ("video_url",)),
    "audio": ("audios", ("audio", "url", "path")),
    "audio_url": ("audios", ("audio_url",)),
    "input_audio": ("audios", ("input_audio",)),
}


@dataclass(kw_only=True)
class MediaList:
    """The media of one conversation, in the order of their tags."""

    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    audios: list[Any] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.images or self.videos or self.audios)


def media_of_block(block: dict[str, Any], media: MediaList) -> str | None:
    """Add the medium of a content block to `media` and return its tag; None when the block is not a medium.

    Sources: OpenAI {"type": "image_url", "image_url": {"url"}}, Anthropic {"type": "image", "source": {...}}, and
    transformers' {"type": "image", "image" | "url" | "path" | "base64"}.
    """
    known = BLOCK_KINDS.get(str(block.get("type")))
    if known is None:
        return None
    name, keys = known
    value = next((block[key] for key in keys if block.get(key) is not None), None)
    if value is not None:  # a bare {"type": "image"} is a tag for a column's medium
        getattr(media, name).append(_unwrap(value))
    return TAGS[name]


def _unwrap(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value.get("data") and ("media_type" in value or "format" in value):
        return f"data:{value.get('media_type', value.get('format'))};base64,{value['data']}"
    return next((value[key] for key in ("bytes", "url", "path", "data") if value.get(key)), value)


def add_column(media: MediaList, name: str, value: Any) -> None:
    """Add a column (one medium or a list; a video may be a list of frames) to `media`."""
    if value is None or value == "":
        return
    values = value if isinstance(value, list) else [value]
    getattr(media, name).extend(_unwrap(item) for item in values)


def match_tags(messages: list[Message], media: MediaList, folder: Path) -> list[Message]:
    """Return messages whose tags and media agree in number; media without any tag are put before the first question.

    Relative paths are looked up beside the data file, then in the working directory.
    Raises RowError for a number that does not match and for a local file that is missing.
    """
    for name, tag in TAGS.items():
        items = getattr(media, name)
        tags = sum(message["content"].count(tag) for message in messages)
        if items and not tags:
            first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
            if first is None:
                raise RowError("media", f"{len(items)} {name} and no user turn to put them in")
            messages = list(messages)
            messages[first] = {**messages[first], "content": tag * len(items) + messages[first]["content"]}
        elif items and tags != len(items):
            raise RowError("media", f"{len(items)} {name} for {tags} {tag} tags")
        setattr(media, name, [_locate(item, name, folder) for item in items])
    return messages


def _locate(item: Any, name: str, folder: Path) -> Any:
    if isinstance(item, list):  # frames of a video
        return [_locate(frame, name, folder) for frame in item]
    if not isinstance(item, str) or item.startswith(REMOTE_PREFIXES):
        return item
    if len(item) > 1024:  # longer than any path: bare base64
        return item
    for candidate in (folder / item, Path(item)):
        with suppress(OSError):  # no file system takes so long a name
            if candidate.is_file():
                return str(candidate)
    raise RowError("media", f"{name[:-1]} {item:.200} is neither in {folder} nor in the working directory")
