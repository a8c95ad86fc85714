"""A model folder's tokenizer, and the fast path into it that keeps exact character offsets."""

import json
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megaswift.errors import ConfigError, DataError


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


def token_of(tokenizer: Any, word: str, *, setting: str) -> int:
    """Return the id of a token as the vocabulary spells it. Raises ConfigError, which names the setting."""
    found = tokenizer.get_vocab().get(word)
    if found is None:
        raise ConfigError(
            f"{setting}={word!r} is no token of this model. Give one as the vocabulary in tokenizer.json spells it."
        )
    return int(found)


CharSpan = tuple[int, int] | tuple[int, int, float]  # characters from, to; what follows is not looked at
SEEN_PIECES, SEEN_CHARACTERS = 1 << 16, 256  # remembered pieces, and the longest of them
# Words whose tokens the backend remembers, some 100 bytes each. It takes 10,000 by itself and then learns no new ones (tokenizers 0.23,
# utils/cache.rs): what code or several languages spell beside them is merged anew each time.
SEEN_WORDS = 1 << 17
TAKES_MORE = ("lstrip", "rstrip", "single_word")
# Normalizers and pre-tokenizers that do the same to a piece wherever it stands in a text.
PIECEWISE = {
    "Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "ByteLevel", "Split", "Digits", "Punctuation", "Whitespace",
    "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts",
}  # fmt: skip


class TextEncoder:
    """Text to token ids through the tokenizer's Rust backend, many texts at once.

    The backend cuts a text at the tokens that it spells, and tokenises the pieces one by one; done here, the same piece
    (a system message, the head of a turn) is tokenised once.

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
        _remember_words(self._backend.model)
        self._cut = _cut_at_tokens(spec)
        self._token_bytes = _token_bytes(self._backend, spec)
        self._seen: dict[str, np.ndarray] = {}
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

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32 [tokens]; special tokens are only those that the text spells."""
        return [ids for ids, _ in self.locate(texts, [()] * len(texts))]

    def locate(
        self, texts: Sequence[str], spans: Sequence[Sequence[CharSpan]]
    ) -> list[tuple[np.ndarray, list[tuple[int, int]]]]:
        """Return the ids of each text, and the tokens [first, last) that hold at least one character of each of its spans."""
        rows = [self._pieces(text, of_text) for text, of_text in zip(texts, spans, strict=True)]
        wanted = dict.fromkeys(one for row in rows for one in row.texts)
        # Where a span begins or ends inside a piece: counted in bytes, or else by offsets, which cost time.
        cut = dict.fromkeys(row.texts[i] for row in rows for i in row.cut)
        places: dict[str, Any] = self._encodings(cut) if self._token_bytes is None else {}
        ids = {text: token_ids(encoding) for text, encoding in places.items()}
        new = [one for one in wanted if one not in ids and one not in self._seen]
        encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
        ids |= {text: token_ids(encoding) for text, encoding in zip(new, encodings, strict=True)}
        ids |= {one: self._seen[one] for one in wanted if one not in ids}
        if self._token_bytes is not None:
            places = {one: self._ends(one, ids[one]) for one in cut}
            places |= self._encodings([one for one in cut if places[one] is None])
        located = [
            _assembled(row, of_text, [ids[one] for one in row.texts], places)
            for row, of_text in zip(rows, spans, strict=True)
        ]
        if len(self._seen) < SEEN_PIECES:
            self._seen |= {text: ids[text] for text in new if len(text) <= SEEN_CHARACTERS}
        return located

    def _encodings(self, pieces: Collection[str]) -> dict[str, Any]:
        """Return pieces with what the tokenizer says of them, offsets too."""
        encodings = self._backend.encode_batch(list(pieces), add_special_tokens=False)
        return dict(zip(pieces, encodings, strict=True))

    def _ends(self, piece: str, ids: np.ndarray) -> np.ndarray | None:
        """Return after how many bytes of a piece each of its tokens ends; None where they do not tell."""
        if self._token_bytes is None or not unicodedata.is_normalized("NFC", piece):
            return None
        ends = np.cumsum(self._token_bytes[ids])
        return ends if len(ends) and ends[-1] == len(piece.encode()) else None

    def _pieces(self, text: str, spans: Sequence[CharSpan]) -> "_Pieces":
        texts = [piece for piece in self._cut.split(text) if piece] if self._cut else [text]
        starts = [0, *accumulate(map(len, texts))]
        edges = {edge for span in spans for edge in span[:2]}.difference(starts)
        return _Pieces(texts, starts, {bisect_right(starts, edge) - 1 for edge in edges})


def _remember_words(model: Any) -> None:
    """Let BPE and Unigram models remember more words; the ids are the same."""
    resize = getattr(model, "_resize_cache", None)  # tokenizers 0.21 and later
    if resize is not None:
        resize(SEEN_WORDS)


class _Pieces(NamedTuple):
    """A text as the tokens that it spells and what is between them."""

    texts: list[str]
    starts: list[int]  # characters; one more, the length of the text
    cut: set[int]  # the pieces inside which a span begins or ends


def _assembled(
    pieces: _Pieces,
    spans: Sequence[CharSpan],
    ids: Sequence[np.ndarray],
    places: Mapping[str, Any],
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return the ids of a text, and the tokens of its spans; `places` has the ends or the encodings of pieces that are cut."""
    firsts = [0, *accumulate(map(len, ids))]
    located = []
    for start, end, *_ in spans:
        found = []
        for i in range(bisect_right(pieces.starts, start) - 1, bisect_left(pieces.starts, end)):
            at, after = pieces.starts[i : i + 2]
            first, last = 0, firsts[i + 1] - firsts[i]
            if i in pieces.cut:
                first, last = _tokens_inside(
                    pieces.texts[i], places[pieces.texts[i]], max(start, at) - at, min(end, after) - at
                )
            if first < last:
                found += [firsts[i] + first, firsts[i] + last]
        located.append((found[0], found[-1]) if found else (0, 0))
    return np.concatenate(ids) if ids else np.empty(0, np.int32), located


def _tokens_inside(piece: str, places: Any, start: int, end: int) -> tuple[int, int]:
    """Return the tokens [first, last) of a piece that hold at least one byte of the characters start to end."""
    if not isinstance(places, np.ndarray):
        return tokens_of_span(places, start, end)
    if start == end:
        return 0, 0
    begin, stop = len(piece[:start].encode()), len(piece[:end].encode())
    return int(np.searchsorted(places, begin, "right")), int(np.searchsorted(places, stop)) + 1


def _token_bytes(backend: Any, spec: Mapping[str, Any]) -> np.ndarray | None:
    """Return how many bytes of a text each token stands for, int32 [vocabulary]; None where tokens do not say.

    ByteLevel writes each byte as one character (tokenizers 0.22, pre_tokenizers/byte_level.rs). A text that NFC leaves as it
    is keeps its bytes.
    """
    normalizes = {*_types(spec["normalizer"])} - {"NFC", "Sequence"}
    if normalizes or "ByteLevel" not in _types(spec["pre_tokenizer"]):
        return None
    of_token = {token: len(word) for word, token in backend.get_vocab(with_added_tokens=False).items()}
    of_token |= {token["id"]: len(token["content"].encode()) for token in spec["added_tokens"]}
    num_bytes = np.zeros(1 + max(of_token), np.int32)
    num_bytes[[*of_token]] = [*of_token.values()]
    return num_bytes


def _cut_at_tokens(spec: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return what splits a text into the tokens that the backend looks for first and what is between them.

    None where pieces alone might give other ids: a token that takes blanks or whole words only, or a first piece that is
    treated otherwise than the rest (tokenizers 0.22, tokenizer/added_vocabulary.rs and pre_tokenizers/metaspace.rs).
    """
    tokens = [token for token in spec["added_tokens"] if not token["normalized"]]
    steps = {*_types(spec["normalizer"]), *_types(spec["pre_tokenizer"])}
    if not tokens or not steps <= PIECEWISE or any(token[key] for token in tokens for key in TAKES_MORE):
        return None
    longest_first = sorted((token["content"] for token in tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _types(step: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the types of a step and of the steps that it is made of."""
    if step is not None:
        yield step["type"]
        for inner in (*step.get("normalizers", ()), *step.get("pretokenizers", ())):
            yield from _types(inner)


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
