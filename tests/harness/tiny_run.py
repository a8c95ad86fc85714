"""A whole fine-tuning run in miniature: a random model with a tokenizer, and conversations; for tests of the command line."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.harness.tiny import save_tiny
from tests.unit.small_tokenizers import small_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "the capital of France is Paris and that of Italy is Rome yes no First Second answer".split()


def make_tiny_run(
    folder: Path, *, rows: int = 40, name: str = "llama", **overrides: Any
) -> tuple[Path, Path]:
    """Write a model, with what `overrides` of its config, and a file of rows below `folder` and return both paths."""
    tokenizer = small_tokenizer(CHAT_TEMPLATE, special=["<|user|>", "<|assistant|>"])
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **overrides}
    model = save_tiny(name, folder / "model", **words)
    tokenizer.save_pretrained(model)
    data = folder / "rows.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for row in range(rows):
            question = " ".join(WORDS[(row * 7 + word) % len(WORDS)] for word in range(3 + row % 5))
            answer = " ".join(WORDS[(row * 3 + word) % len(WORDS)] for word in range(2 + row % 7))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return model, data


def save_tiny_scorer(model: Path, output: Path) -> None:
    """Write a sequence classifier with one label over `model`, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    scorer = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, pad_token_id=tokenizer.eos_token_id
    )
    scorer.save_pretrained(output)
    tokenizer.save_pretrained(output)
