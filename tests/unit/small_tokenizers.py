"""Small tokenizers built in memory: byte-level BPE with the special tokens that a test needs."""

import json
from collections.abc import Iterable
from functools import lru_cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the capital of France is Paris, and that of Italy is Rome",
    "the system tells the user and the assistant what to answer",
    "First answer. Second answer. Third answer. yes no 1 2 3 4 5",
    "def add(a, b):\n    return a + b\n\n  two spaces  three   spaces",
]


@lru_cache
def _bpe(vocab_size: int, adds_bos: str | None) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if adds_bos:
        tokenizer.add_special_tokens([AddedToken(adds_bos, special=True, normalized=False)])
        bos = (adds_bos, tokenizer.token_to_id(adds_bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{adds_bos} $A", special_tokens=[bos]
        )
    return tokenizer.to_str()


def small_tokenizer(
    chat_template: str | None = None,
    *,
    special: Iterable[str] = (),
    added: Iterable[str] = ("<think>", "</think>", "<tool_call>", "</tool_call>"),
    bos: str | None = None,
    eos: str | None = "</s>",
    adds_bos: bool = False,
    vocab_size: int = 400,
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with these special tokens and this chat template."""
    backend = Tokenizer.from_str(_bpe(vocab_size, bos if adds_bos else None))
    tokens = [token for token in dict.fromkeys([*special, bos, eos]) if token]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


def user(content: str, **more: object) -> dict[str, object]:
    """Return a user turn."""
    return {"role": "user", "content": content, **more}


def assistant(content: str, **more: object) -> dict[str, object]:
    """Return an assistant turn."""
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, object]:
    """Return a system turn."""
    return {"role": "system", "content": content}


def call(name: str, **arguments: object) -> dict[str, object]:
    """Return a tool call in OpenAI's form."""
    return {
        "type": "function",
        "id": "call12345",
        "function": {"name": name, "arguments": json.loads(json.dumps(arguments))},
    }


def sentencepiece_like(
    style: str, chat_template: str, *, special: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words begin with a blank mark: "metaspace" (Gemma, newer Llama) or "prepend" (Llama 2)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    mark = "\u2581"
    alphabet = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.?!:[]/<>|", mark, "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *special]
    if style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark, prepend_scheme="first")
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(mark), normalizers.Replace(" ", mark)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=tokens, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.chat_template = chat_template
    return found
