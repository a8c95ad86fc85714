"""Pickles that name classes without importing them: what torch reads as its own objects, written without torch.

Opcodes of protocol 4 (Lib/pickletools.py). Of the same value always the same bytes.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by its name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What a function, or a class, returns."""

    function: Global
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """An object made without its __init__ and given its state."""

    cls: Global
    state: Any = None


class Entries(list[tuple[Any, Any]]):
    """The (key, value) pairs of a dict, whose keys need no hash here."""


def dumps(value: Any) -> bytes:
    """Return the pickle of None, bools, ints, strings, tuples, lists, dicts and the records above, nested."""
    writer = _Writer()
    writer.put(value)
    return bytes(writer.out) + b"."


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x04")
        self._memo: dict[Global, int] = {}

    def put(self, value: Any) -> None:
        """Append one value."""
        match value:
            case None:
                self.out += b"N"
            case bool():
                self.out += b"\x88" if value else b"\x89"
            case int():
                self.out += b"\x8a\x08" + struct.pack("<q", value)
            case str():
                self._text(value)
            case tuple():
                self._many(b"(", value, b"t")
            case dict() | Entries():
                pairs = value.items() if isinstance(value, dict) else value
                self._many(b"}(", [half for pair in pairs for half in pair], b"u")
            case list():
                self._many(b"](", value, b"e")
            case Global():
                self._global(value)
            case Call():
                self._global(value.function)
                self._many(b"(", value.arguments, b"tR")
            case Instance():
                self._global(value.cls)
                self.out += b")\x81"
                if value.state is not None:
                    self.put(value.state)
                    self.out += b"b"
            case _:
                raise AssertionError(f"{value!r} cannot be written")

    def _many(self, before: bytes, values: Sequence[Any], after: bytes) -> None:
        self.out += before
        for value in values:
            self.put(value)
        self.out += after

    def _text(self, text: str) -> None:
        raw = text.encode()
        self.out += b"X" + struct.pack("<I", len(raw)) + raw

    def _global(self, name: Global) -> None:
        if name in self._memo:
            self.out += b"j" + struct.pack("<I", self._memo[name])
            return
        self._text(name.module)
        self._text(name.name)
        self.out += b"\x93\x94"
        self._memo[name] = len(self._memo)
