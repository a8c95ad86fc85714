"""Models with more special tokens: their ids, their rows, their folder, and what is refused."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaswift.config.model import ModelConfig
from megaswift.config.parse import parse_run
from megaswift.config.rules import check_request
from megaswift.converters.lora_targets import whole_tensors
from megaswift.converters.new_tokens import (
    model_with_new_tokens,
    read_with_new_tokens,
    rows_that_do_not_train,
    view_of,
)
from megaswift.data.first_rows import template_of
from megaswift.errors import ConfigError
from megaswift.launch.preflight import check_run
from megaswift.metadata.new_tokens import with_new_tokens
from megaswift.metadata.read import get_model_meta
from tests.harness.tiny import save_tiny
from tests.harness.tiny_run import CHAT_TEMPLATE
from tests.unit.small_tokenizers import sentencepiece_like, small_tokenizer

NEW = [
    "<|place|>",
    "<think>",
    "capital",
    "<|place|>",
]  # <think> is an added token that is not special, capital a word
TEXTS = ["the<|place|>is Paris", "<think>the capital capitals</think>", "<|place|><|place|> and</s>"]
TOKENS = torch.tensor([[5, 17, 99, 3, 42, 130, 1]])


def make_model(folder: Path, *, name: str = "llama", dtype: str = "float32", spare: int = 0) -> Path:
    """Write a model whose vocabulary has `spare` rows more than its tokenizer ids, and the tokenizer."""
    tokenizer = small_tokenizer(CHAT_TEMPLATE, special=["<|user|>"])
    save_tiny(name, folder, vocab_size=len(tokenizer) + spare, dtype=getattr(torch, dtype))
    tokenizer.save_pretrained(folder)
    return folder


def grown(folder: Path, home: Path, tokens: list[str]) -> Path:
    return model_with_new_tokens(get_model_meta(folder), tokens, home, with_weights=True)


@pytest.mark.parametrize("style", ["transformers 5", "transformers 4", "metaspace"])
def test_new_tokens_have_the_ids_that_transformers_gives_them(tmp_path: Path, style: str) -> None:
    model = save_tiny("llama", tmp_path / "model", vocab_size=1000)
    tokenizer = (
        sentencepiece_like("metaspace", "x")
        if style == "metaspace"
        else small_tokenizer("x", special=["<|user|>"])
    )
    tokenizer.save_pretrained(model)
    if style == "transformers 4":
        entries = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
        config = json.loads((model / "tokenizer_config.json").read_text())
        config |= {
            "added_tokens_decoder": {str(one.pop("id")): one for one in entries},
            "additional_special_tokens": ["<|user|>"],
        }
        (model / "tokenizer_config.json").write_text(json.dumps(config))
        (model / "special_tokens_map.json").write_text(
            json.dumps({"additional_special_tokens": ["<|user|>"]})
        )
    theirs = AutoTokenizer.from_pretrained(model)
    before = len(theirs)
    theirs.add_special_tokens({"additional_special_tokens": NEW}, replace_extra_special_tokens=False)
    folder = grown(model, tmp_path, NEW)
    ours = AutoTokenizer.from_pretrained(folder)
    assert len(ours) == len(theirs) > before
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == theirs.decode(
            theirs(text).input_ids, skip_special_tokens=True
        )
    assert [len(ours(token, add_special_tokens=False).input_ids) for token in NEW] == [1] * 4
    assert get_model_meta(folder).vocab_size == 1000, "there were rows for them"
    assert (folder / "model.safetensors").is_symlink()
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_grown_model_is_the_old_one_for_old_tokens(tmp_path: Path, name: str, dtype: str) -> None:
    model = make_model(tmp_path / "model", name=name, dtype=dtype)
    folder = grown(model, tmp_path / "home", NEW)
    before, after = (load_file(one / "model.safetensors") for one in (model, folder))
    rows = get_model_meta(model).vocab_size
    assert before.keys() == after.keys()
    for tensor, old in before.items():
        new = after[tensor]
        assert torch.equal(new[: len(old)], old) and new.dtype == old.dtype, tensor
        if len(old) == rows:
            assert len(new) == rows + 2
            mean = old.double().mean(0).to(old.dtype)
            assert torch.equal(new[rows:], mean.expand(2, -1)), tensor
        else:
            assert new.shape == old.shape
    opened = [AutoModelForCausalLM.from_pretrained(one).eval() for one in (model, folder)]
    assert opened[1].config.vocab_size == rows + 2 == len(AutoTokenizer.from_pretrained(folder))
    with torch.no_grad():
        logits = [one(TOKENS).logits[..., :rows] for one in opened]
    # A longer product may be cut into other blocks.
    assert torch.allclose(*logits, rtol=0, atol=1e-6 if dtype == "float32" else 0.02)


def test_only_files_that_grow_are_written_and_the_folder_is_found_again(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    opened.save_pretrained(model, max_shard_size="100KB")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    folder = grown(model, tmp_path, NEW)
    long = {index["weight_map"][name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    assert long == {path.name for path in folder.glob("*.safetensors") if not path.is_symlink()}
    assert len(set(index["weight_map"].values())) > len(long)
    written = json.loads((folder / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == index["weight_map"]
    sizes = [
        sum(t.nbytes for path in one.glob("*.safetensors") for t in load_file(path).values())
        for one in (model, folder)
    ]
    assert [one["metadata"]["total_size"] for one in (index, written)] == sizes
    stamps = {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()}
    assert grown(model, tmp_path, NEW) == folder
    assert {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()} == stamps
    assert grown(model, tmp_path, [*NEW, "<b>"]) != folder
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".incomplete")]


def test_tokens_that_are_special_already_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(tmp_path / "model")
    with caplog.at_level(logging.INFO, logger="megaswift"):
        assert grown(model, tmp_path / "home", ["<|user|>", "</s>"]) == model
    assert "<|user|>, </s> is a special token of the model already" in caplog.text
    assert not (tmp_path / "home").exists()


def test_random_weights_need_no_rows(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    folder = read_with_new_tokens(
        ModelConfig(model=str(model), random_init=True, new_special_tokens=["<a>"]), tmp_path / "home"
    )
    assert get_model_meta(folder).vocab_size == get_model_meta(model).vocab_size + 1


def test_rows_are_tokenised_with_the_new_tokens_before_a_run_as_in_it(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    run = parse_run("sft", ["--model", str(model), "--new_special_tokens", *NEW])
    looked_at = template_of(run)[0].tokenizer
    trained = AutoTokenizer.from_pretrained(grown(model, tmp_path, run.model.new_special_tokens))
    assert looked_at.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()
    assert looked_at.special_tokens_map == trained.special_tokens_map
    assert looked_at(TEXTS).input_ids == trained(TEXTS).input_ids


def test_words_and_files_are_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("<b> <c>\n<d>\n\n")
    words = ["--new_special_tokens", "<a>", str(tmp_path / "tokens.txt"), "<b>"]
    assert parse_run("sft", words).model.new_special_tokens == ["<a>", "<b>", "<c>", "<d>"]
    assert parse_run("sft", []).model.new_special_tokens == []


@pytest.mark.parametrize(
    ("tokens", "others", "message"),
    [
        ([""], "", "has an empty token"),
        (["there_is_none.txt"], "", "new_special_tokens=there_is_none.txt cannot be read"),
        (["<a>"], "--mcore_model d", "does not reach the weights of mcore_model=d"),
    ],
)
def test_words_that_are_no_tokens_are_refused(tokens: list[str], others: str, message: str) -> None:
    words = ["--model", "m", "--dataset", "rows.jsonl", *others.split()]
    with pytest.raises(ConfigError) as refused:
        check_request(parse_run("sft", [*words, "--new_special_tokens", *tokens]))
    assert message in str(refused.value)


def test_servers_with_other_rows_are_refused() -> None:
    words = "--rlhf_type grpo --model m --dataset d --reward_funcs format --use_vllm true --vllm_mode server".split()
    with pytest.raises(ConfigError, match="does not reach the weights of vllm_mode=server"):
        check_request(parse_run("rlhf", [*words, "--new_special_tokens", "<a>"]))


def test_vocabularies_that_cannot_grow_are_refused_unless_they_have_rows(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", spare=1)
    weights = load_file(model / "model.safetensors")
    rows = len(weights["model.embed_tokens.weight"])
    save_file(
        {**weights, "model.layers.4.shared_head.head.weight": torch.zeros(rows, 4)},
        model / "model.safetensors",
    )
    with pytest.raises(
        ConfigError, match=r"cannot grow: model\.layers\.4\.shared_head\.head\.weight may have rows"
    ):
        view_of(get_model_meta(model), ["<a>", "<b>"], with_weights=True)
    assert view_of(get_model_meta(model), ["<a>"], with_weights=True).grows == ()
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"cannot grow: its weights are quantised \(fp8\)"):
        view_of(get_model_meta(model), ["<a>", "<b>"], with_weights=True)


def test_embeddings_of_layers_cannot_grow(tmp_path: Path) -> None:
    model = save_tiny("gemma4_text-small", tmp_path)
    small_tokenizer("x").save_pretrained(model)
    run = parse_run("sft", ["--model", str(model), "--dataset", "rows.jsonl", "--new_special_tokens", "<a>"])
    with pytest.raises(ConfigError, match="its layers have embeddings of tokens of their own"):
        check_run(run, world_size=1, platform_name="cpu")  # before ranks start, or a job waits


@pytest.mark.parametrize(
    ("name", "flags", "still"),
    [
        ("llama", "--tuner_type lora", "embed_tokens lm_head"),
        ("llama", "--tuner_type lora --modules_to_save embed_tokens", "lm_head"),
        ("llama", "--tuner_type lora --modules_to_save embed_tokens lm_head", None),
        ("llama-tied", "--tuner_type lora", "embed_tokens"),
        ("llama-tied", "--tuner_type lora --modules_to_save lm_head", None),
        ("llama", "--tuner_type full", None),
    ],
)
def test_rows_that_adapters_leave_alone_are_named(
    tmp_path: Path, name: str, flags: str, still: str | None
) -> None:
    meta = get_model_meta(save_tiny(name, tmp_path))
    run = parse_run("sft", [*flags.split(), "--new_special_tokens", "<a>"])
    notes = rows_that_do_not_train(run, meta, whole_tensors(meta, run.tuner))
    assert len(notes) == (still is not None)
    assert all(f"--modules_to_save {still} trains them" in note for note in notes)
    run = parse_run("sft", flags.split())
    assert rows_that_do_not_train(run, meta, whole_tensors(meta, run.tuner)) == []


def test_a_tokenizer_without_its_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs tokenizer\.json"):
        with_new_tokens(tmp_path, ["<a>"])
