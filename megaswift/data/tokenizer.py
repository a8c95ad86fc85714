"""A model folder's tokenizer, and the fast path into it that keeps exact character offsets."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megaswift.errors import DataError


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers tokenizer of a model folder. Raises DataError."""
    import transformers  # 2 s; only commands that tokenise pay it

    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"The tokenizer in {folder} cannot be read: {error}. Bring tokenizer.json and tokenizer_config.json."
        ) from error


def pad_id_of(tokenizer: Any) -> int:
    """Return the id that fills rows: the tokenizer's pad token, or its eos where it has none."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in ids if token is not None), 0)


class TextEncoder:
    """Text to token ids through the tokenizer's Rust backend, many texts at once.

    ByteLevel post-processors trim blanks off the offsets by default, which loses the place of blank tokens; a copy of
    the backend with trim_offsets=False gives the same ids and whole offsets.
    """

    def __init__(self, tokenizer: Any) -> None:
        import tokenizers  # loaded with transformers; named here so that reading rows does not load it

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"{type(tokenizer).__name__} has no fast backend, so the assistant's tokens cannot be located. "
                "Bring a tokenizer.json (transformers writes one with save_pretrained where it can convert)."
            )
        spec = json.loads(backend.to_str())
        _keep_blanks(spec.get("post_processor"))
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._backend.no_truncation()
        self._backend.no_padding()
        adds_bos = tokenizer.bos_token_id is not None and self._backend.encode("a").ids[:1] == [
            tokenizer.bos_token_id
        ]
        self.bos: list[int] = (
            [tokenizer.bos_token_id] if adds_bos else []
        )  # what the tokenizer begins a text with
        # What the tokenizer ends a text with: nothing for most, a token to read the embedding from for some.
        self.end = self._backend.encode("a").ids[
            len(self.bos) + len(self._backend.encode("a", add_special_tokens=False).ids) :
        ]
        self.eos: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Return a tokenizers.Encoding for each text; special tokens are only those that the text spells."""
        encodings: list[Any] = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return encodings

    def encode_without_offsets(self, texts: Sequence[str]) -> list[Any]:
        """Return the same ids a fifth faster; the places of characters are not in these Encodings."""
        encodings: list[Any] = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return encodings


def _keep_blanks(processor: dict[str, Any] | None) -> None:
    if processor is None:
        return
    if "trim_offsets" in processor:
        processor["trim_offsets"] = False
    for inner in processor.get("processors", ()):
        _keep_blanks(inner)


def token_ids(encoding: Any) -> np.ndarray:
    """Return the ids of an encoding, int32 [tokens]."""
    return np.array(encoding.ids, dtype=np.int32)


def tokens_of_span(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """Return the tokens [first, last) that hold at least one of the characters start to end."""
    first = next((token for i in range(start, end) if (token := encoding.char_to_token(i)) is not None), None)
    if first is None:
        return 0, 0
    last = next(
        token for i in range(end - 1, start - 1, -1) if (token := encoding.char_to_token(i)) is not None
    )
    total = len(encoding)
    while (
        last + 1 < total and encoding.token_to_chars(last + 1)[0] < end
    ):  # a character spread over several tokens
        last += 1
    return first, last + 1
