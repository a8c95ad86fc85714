"""Shrunken models of rehearsals: of the same family, and with a layout that every axis still divides."""

import json
from pathlib import Path

import pytest

from megaswift.config.parse import parse
from megaswift.config.rules import resolve
from megaswift.launch.rehearsal import ROWS, rehearsal_of, shrink
from megaswift.metadata.read import meta_from_config
from megaswift.parallel.layout import Layout
from tests.harness.planning import CONFIGS, MODELS
from tests.harness.tiny import save_tiny


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_shrinks_to_one_that_takes_the_same_layout(name: str) -> None:
    content = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    config = content.get("config", content)
    before = meta_from_config(config)
    experts = "--ep 2" if before.moe is not None else ""
    layout = Layout(world=4, tp=2, pp=2, ep=2 if experts else 1, sequence_parallel=before.moe is not None)
    after = meta_from_config(shrink(config, layout))
    assert after.model_type == before.model_type and after.num_heads == before.num_heads
    assert (after.moe is None) == (before.moe is None)
    assert after.hidden_size <= 1024 and after.num_layers % 2 == 0 and after.num_layers <= 8
    if after.moe is not None and before.moe is not None:
        assert after.moe.num_experts == before.moe.num_experts
        assert set(after.moe.layer_is_moe) == set(before.moe.layer_is_moe)
    words = f"--model m --dataset rows.jsonl --tp 2 --pp 2 {experts} --torch_dtype bfloat16".split()
    rehearsed = rehearsal_of(parse("sft", words).config, layout, model="small", output_dir="out")
    assert rehearsed.data.dataset == ["rows.jsonl#64"] and rehearsed.checkpoint.resume == "never"
    resolved = resolve(rehearsed, after, 4, "cpu")
    assert (resolved.layout.tp, resolved.layout.pp, resolved.layout.dp) == (2, 2, 1)


def test_late_layers_of_a_small_model_take_keys_of_earlier_ones_too(tmp_path: Path) -> None:
    config = json.loads((save_tiny("gemma4_text-small", tmp_path) / "config.json").read_text())
    deeper = {
        **config,
        "num_hidden_layers": 35,
        "num_kv_shared_layers": 20,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
    }
    deeper["layer_types"] *= 7
    after = meta_from_config(shrink(deeper, Layout()))
    assert after.num_layers < 35


def test_uneven_stages_keep_all_layers() -> None:
    config = json.loads((CONFIGS / "llama-3.1-8b.json").read_text(encoding="utf-8"))
    layout = Layout(world=2, pp=2, pp_first=20, pp_last=12)
    assert shrink(config.get("config", config), layout)["num_hidden_layers"] == 32


def test_what_is_chosen_of_a_model_is_there_in_a_small_one() -> None:
    words = ["--model", "m", "--dataset", "r.jsonl", "--lisa_activated_layers", "4"]
    drawn = rehearsal_of(parse("sft", words).config, Layout(), model="m", output_dir="o").lisa
    assert (drawn.lisa_activated_layers, drawn.lisa_step_interval) == (1, 1)
    words = [*words[:4], "--tuner_type", "lora", "--lora_rank", "64", "--init_weights"]
    for start, rank in (("lora-ga", 8), ("pissa", 8), ("true", 64)):
        run = parse("sft", [*words, start]).config
        assert rehearsal_of(run, Layout(), model="m", output_dir="o").tuner.lora_rank == rank


def test_a_stream_and_a_small_share_are_rehearsed_on_the_few_rows() -> None:
    words = "--model m --dataset d.jsonl --streaming true --train_iters 9 --val_dataset v.jsonl".split()
    rehearsed = rehearsal_of(parse("sft", words).config, Layout(), model="m", output_dir="o")
    assert not rehearsed.data.streaming
    words = "--model m --dataset d.jsonl --split_dataset_ratio 0.001".split()
    rehearsed = rehearsal_of(parse("sft", words).config, Layout(), model="m", output_dir="o")
    assert rehearsed.data.split_dataset_ratio * ROWS == 1
