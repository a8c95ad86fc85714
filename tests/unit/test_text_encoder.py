"""Texts tokenised in pieces: the ids and the places are those of the whole text."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megaswift.data.tokenizer import TextEncoder, token_ids, tokens_of_span
from tests.unit.small_tokenizers import sentencepiece_like, small_tokenizer

# One token begins with another; what is between tokens begins and ends with blanks, letters of several bytes, or nothing.
SPECIAL = ("<|im|>", "<|im|>x", "</s>")
FRAGMENTS = [
    *SPECIAL,
    "<think>",
    " ",
    "\n",
    "  ",
    "the",
    " answer",
    "\u00e9\u6f22",
    "e\u0301",
    "x\u0301\u1dc2",  # NFC changes the order of two and three bytes, and not the length
    "\u1112\u1161\u11ab",
    "<|im|",
    "x",
    "1 2",
]


def changed(**more: object) -> PreTrainedTokenizerFast:
    """Return the small tokenizer with other steps of its backend."""
    backend = Tokenizer.from_str(small_tokenizer(special=SPECIAL).backend_tokenizer.to_str())
    for name, step in more.items():
        setattr(backend, name, step)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def with_token(**takes: bool) -> PreTrainedTokenizerFast:
    """Return the small tokenizer with one more token."""
    tokenizer = changed()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("answer", normalized=False, **takes)])
    return tokenizer


IN_PIECES = {
    "byte level": lambda: small_tokenizer(special=SPECIAL),
    "prefix space": lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "nfc": lambda: changed(normalizer=normalizers.NFC()),
    "lower": lambda: changed(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
}
WHOLE = {
    "metaspace": lambda: sentencepiece_like("metaspace", None, special=SPECIAL),
    "prepend": lambda: sentencepiece_like("prepend", None, special=SPECIAL),
    "takes blanks": lambda: with_token(lstrip=True),
    "whole words": lambda: with_token(single_word=True),
}
ENCODERS = {name: TextEncoder(make()) for name, make in {**IN_PIECES, **WHOLE}.items()}


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=60, deadline=None)
@given(drawn=st.data())
def test_ids_and_places_are_those_of_the_whole_text(name: str, drawn: st.DataObject) -> None:
    encoder = ENCODERS[name]
    texts = drawn.draw(
        st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join), min_size=1, max_size=3)
    )
    spans = [
        [tuple(sorted(span)) for span in drawn.draw(st.lists(st.tuples(edge, edge), max_size=3))]
        for edge in (st.integers(0, len(text)) for text in texts)
    ]
    whole = encoder._backend.encode_batch(texts, add_special_tokens=False)
    for (ids, places), of_text, encoding in zip(encoder.locate(texts, spans), spans, whole, strict=True):
        np.testing.assert_array_equal(ids, token_ids(encoding))
        assert ids.dtype == np.int32
        assert places == [tokens_of_span(encoding, start, end) for start, end in of_text]


def test_only_texts_whose_pieces_are_independent_are_cut() -> None:
    assert [name for name, encoder in ENCODERS.items() if encoder._cut is not None] == list(IN_PIECES)


@pytest.mark.parametrize(
    ("name", "text", "ends"),
    [
        ("byte level", "the \u00e9", 6),
        ("nfc", "the \u00e9", 6),
        ("nfc", "the e\u0301", None),
        ("nfc", "x\u0301\u1dc2", None),
        ("lower", "the", None),
        ("prefix space", "the", None),
    ],
)
def test_places_are_counted_in_bytes_where_tokens_are_bytes_of_the_text(
    name: str, text: str, ends: int | None
) -> None:
    encoder = ENCODERS[name]
    found = encoder._ends(text, encoder.encode([text])[0])
    assert (found if found is None else found[-1]) == ends


def test_a_piece_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder(small_tokenizer(special=SPECIAL))
    before = encoder.encode(["<|im|>the answer</s>"])[0]
    asked: list[str] = []
    nothing = SimpleNamespace(
        encode_batch=lambda texts, **_: asked.extend(texts) or [],
        encode_batch_fast=lambda texts, **_: asked.extend(texts) or [],
    )
    monkeypatch.setattr(encoder, "_backend", nothing)
    np.testing.assert_array_equal(encoder.encode(["<|im|>the answer</s>"])[0], before)
    assert not asked
