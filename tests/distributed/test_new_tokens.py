"""Training with --new_special_tokens: layouts, exports, adapters and resuming."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaswift.config.export import ExportConfig
from megaswift.config.parse import parse_run, take_flags
from megaswift.errors import ConfigError
from megaswift.platforms.platform import select_platform
from megaswift.training.export import export
from megaswift.training.run import train_in_world
from tests.harness.distributed import run_distributed
from tests.harness.tiny_run import make_tiny_run

NEW = ["<place>", "<name>", "<year>"]
TEXT = "<|user|>where is <place><name></s><|assistant|>in Paris<year></s>"


def make_run(folder: Path, name: str) -> tuple[list[str], int]:
    """Return flags of a run with new tokens in its rows, and the rows of the vocabulary before."""
    model, rows = make_tiny_run(folder, name=name)
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    for number, row in enumerate(written):
        row["messages"][0]["content"] += NEW[number % 3]
        row["messages"][1]["content"] += f" {NEW[(number + 1) % 3]} yes"
    rows.write_text("".join(json.dumps(row) + "\n" for row in written))
    words = [
        "--model", str(model), "--dataset", str(rows), "--global_batch_size", "4", "--learning_rate", "1e-2",
        "--report_to", "none", "--lr_decay_style", "constant", "--torch_dtype", "float32", "--save_steps", "2",
        "--new_special_tokens", *NEW,
    ]  # fmt: skip
    return words, json.loads((model / "config.json").read_text())["vocab_size"]


def train(rank: int, world_size: int, words: list[str]) -> tuple[Path, list[float]]:
    summary = train_in_world(parse_run("sft", words), select_platform("cpu"))
    assert summary.checkpoint is not None
    lines = (summary.output_dir / "logging.jsonl").read_text().splitlines()
    return summary.checkpoint, [json.loads(line)["loss"] for line in lines]


def trained(ranks: int, words: list[str]) -> tuple[Path, list[float]]:
    return run_distributed(train, ranks, words)[0]


def exported(*words: str) -> None:
    config, rest = take_flags(ExportConfig(), list(words))
    assert not rest
    export(config)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_the_vocabulary_grows_alike_under_tp(tmp_path: Path, name: str) -> None:
    words, rows = make_run(tmp_path, name)
    # Steps of AdamW are as long for gradients that are nothing but rounding.
    words += ["--optimizer", "sgd", "--weight_decay", "0", "--train_iters", "4", "--output_dir"]
    one, losses = trained(1, [*words, str(tmp_path / "one")])
    two, of_tp2 = trained(2, [*words, str(tmp_path / "two"), "--tensor_model_parallel_size", "2"])
    assert of_tp2 == pytest.approx(losses, rel=1e-5)
    weights = load_file(one / "hf" / "model.safetensors")
    for tensor, found in load_file(two / "hf" / "model.safetensors").items():
        assert (found - weights[tensor]).abs().max() < 1e-5, tensor
    start = load_file(next((tmp_path / "one").glob(".model-*")) / "model.safetensors")
    for tensor in {"model.embed_tokens.weight", "lm_head.weight"} & weights.keys():
        assert weights[tensor].shape == start[tensor].shape and len(start[tensor]) == rows + 3
        assert bool((weights[tensor] != start[tensor])[rows:].any(1).all()), tensor
    model = AutoModelForCausalLM.from_pretrained(two / "hf")
    tokenizer = AutoTokenizer.from_pretrained(two / "hf")
    assert model.config.vocab_size == len(tokenizer) == rows + 3
    ids = tokenizer(TEXT).input_ids
    assert [i for i in ids if i >= rows] == [rows, rows + 1, rows + 2]


@pytest.mark.ranks(1)
def test_a_run_that_starts_again_goes_on_with_the_same_tokens(tmp_path: Path) -> None:
    words, _ = make_run(tmp_path, "llama")
    whole, losses = trained(1, [*words, "--output_dir", str(tmp_path / "whole"), "--train_iters", "4"])
    broken = [*words, "--output_dir", str(tmp_path / "broken"), "--train_iters"]
    trained(1, [*broken, "2"])
    again, found = trained(1, [*broken, "4"])
    assert found == losses
    expected = load_file(whole / "hf" / "model.safetensors")
    for tensor, value in load_file(again / "hf" / "model.safetensors").items():
        assert torch.equal(value, expected[tensor]), tensor
    assert len(list((tmp_path / "broken").glob(".model-*"))) == 1
    other = [*broken, "4"]
    other[other.index("<place>")] = "<spot>"  # as many rows, and they are others
    with pytest.raises(AssertionError, match="CheckpointError: new_special_tokens="):
        trained(1, other)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_adapters_open_in_peft_with_as_many_rows(tmp_path: Path, name: str) -> None:
    words, rows = make_run(tmp_path, name)
    words += ["--tuner_type", "lora", "--modules_to_save", "embed_tokens", "lm_head", "--merge_lora", "true"]
    checkpoint, _ = trained(1, [*words, "--output_dir", str(tmp_path / "output"), "--train_iters", "2"])
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "adapter")
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(checkpoint / "merged").eval()(ids).logits
        opened = AutoPeftModelForCausalLM.from_pretrained(checkpoint / "adapter").eval()(ids).logits
    assert merged.shape[-1] == len(tokenizer) == rows + 3
    assert (opened - merged).abs().max() < 2e-5
    # From the checkpoint, and from --model with the adapter: the same model.
    base = words[words.index("--model") + 1]
    sources = {
        "from_run": ["--checkpoint", str(checkpoint)],
        "from_adapter": [
            "--model",
            base,
            "--new_special_tokens",
            *NEW,
            "--adapters",
            str(checkpoint / "adapter"),
        ],
    }
    for place, source in sources.items():
        exported(*source, "--merge_lora", "true", "--output_dir", str(tmp_path / place))
        with torch.no_grad():
            found = AutoModelForCausalLM.from_pretrained(tmp_path / place).eval()(ids).logits
        assert (found - merged).abs().max() < 2e-5, place
        assert len(AutoTokenizer.from_pretrained(tmp_path / place)) == rows + 3
    assert not list(tmp_path.glob(".model-*"))
    with pytest.raises(ConfigError, match="new_special_tokens is for --model"):
        exported(*sources["from_run"], "--new_special_tokens", "<a>", "--output_dir", str(tmp_path / "other"))
