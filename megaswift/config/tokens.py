"""The words of --new_special_tokens: tokens, and files of them."""

from collections.abc import Sequence
from pathlib import Path

from megaswift.errors import ConfigError


def tokens_of(words: Sequence[str]) -> list[str]:
    """Return the tokens that are meant, in their order; a word that ends in .txt is a file. Raises ConfigError."""
    tokens: list[str] = []
    for word in words:
        if not word.strip():
            raise ConfigError("new_special_tokens has an empty token. Leave it out.")
        tokens += _read(Path(word).expanduser()) if word.endswith(".txt") else [word]
    return list(dict.fromkeys(tokens))


def _read(path: Path) -> list[str]:
    """Return the words of a file, which blanks and ends of lines part."""
    try:
        found = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"new_special_tokens={path} cannot be read: {error}. Give a text file of tokens, separated by blanks."
        ) from None
    if not found:
        raise ConfigError(
            f"new_special_tokens={path} holds no tokens. Write some into it, separated by blanks."
        )
    return found
