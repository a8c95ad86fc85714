"""Full training of a part of the model: which weights move, their gradients, and what is written."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from megaswift.checkpoint.store import read_checkpoint
from megaswift.config.parse import parse_run
from megaswift.platforms.platform import select_platform
from megaswift.training.run import train_in_world
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import Case, prepared, steps

ALL: dict[str, Any] = {"freeze_parameters_ratio": 1.0}
# name -> (model, what is frozen, expression for the names of parameters of one rank that train)
CHOICES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "upper half": (
        "llama",
        {"freeze_parameters_ratio": 0.5},
        ("layers.2.", "layers.3.", "final_layernorm", "output_layer"),
    ),
    "mlp of a middle layer": (
        "llama",
        {**ALL, "trainable_parameters": ["model.layers.2.mlp"]},
        ("layers.2.mlp.",),
    ),
    "head": ("llama", {**ALL, "trainable_parameters": ["lm_head"]}, ("output_layer.",)),
    "last norm": ("llama", {**ALL, "trainable_parameters": ["model.norm"]}, ("final_layernorm.",)),
    "norms after branches": (
        "olmo2",
        {**ALL, "trainable_parameters_regex": r"layers\.1.*norm"},
        ("layers.1.*norm",),
    ),
    "tied ends": ("qwen2-tied", {**ALL, "trainable_parameters": ["lm_head"]}, ("word_embeddings.",)),
    "router": ("qwen3_moe", {**ALL, "trainable_parameters_regex": r"mlp\.gate\."}, ("mlp.router.",)),
    "Megatron's names": ("llama", {**ALL, "trainable_parameters_regex": "linear_qkv"}, ("linear_qkv.",)),
}
RECOMPUTATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]},
    "full": {"recompute_granularity": "full"},
}


def gradients(
    rank: int, world_size: int, folder: Path, cases: list[Case]
) -> list[tuple[dict[str, torch.Tensor], set[str]]]:
    """Return the gradients of the first step, and the names of the parameters that it moves, of every case."""
    found = []
    for case in cases:
        torch.manual_seed(1)
        with prepared(folder, case) as trained:
            chunk = trained.engine.chunks[0].module
            before = {name: weight.detach().clone() for name, weight in chunk.named_parameters()}
            steps(trained, 0, 1)
            grads = {
                name: weight.main_grad.clone()
                for name, weight in chunk.named_parameters()
                if weight.requires_grad
            }
            found.append(
                (
                    grads,
                    {
                        name
                        for name, weight in chunk.named_parameters()
                        if not torch.equal(weight, before[name])
                    },
                )
            )
    return found


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_chosen_moves_with_the_gradients_of_full_training_however_much_is_recomputed(
    tmp_path: Path, name: str
) -> None:
    model, freeze, patterns = CHOICES[name]
    alone = {"optimizer": {"clip_grad": 0.0}, "parallel": {"use_distributed_optimizer": False}}
    cases = [
        Case(
            name=f"{frozen} {recomputed}",
            settings={**alone, "freeze": frozen, "training": {"global_batch_size": 2, **recomputed}},
        )
        for recomputed in RECOMPUTATIONS.values()
        for frozen in ({}, freeze)
    ]
    (found,) = run_distributed(gradients, 1, save_tiny(model, tmp_path), cases)
    for (everything, _), (chosen, moved) in zip(found[::2], found[1::2], strict=True):
        assert moved == {
            weight for weight in everything if any(re.search(pattern, weight) for pattern in patterns)
        }
        assert chosen.keys() == moved
        for weight, gradient in chosen.items():
            scale = float(everything[weight].abs().max())
            # The same products; a frozen matrix is multiplied by other code, which may round otherwise.
            assert scale > 0 and float((gradient - everything[weight]).abs().max()) <= 1e-5 * scale, weight


def run(rank: int, world_size: int, words: list[str]) -> Path:
    summary = train_in_world(parse_run("sft", words), select_platform("cpu"))
    assert summary.checkpoint is not None
    return summary.checkpoint


@pytest.mark.ranks(2)
def test_a_run_writes_what_is_frozen_as_it_was_and_goes_on_from_what_trained(tmp_path: Path) -> None:
    model, rows = make_tiny_run(tmp_path)
    words = [
        "--model", str(model), "--dataset", str(rows), "--global_batch_size", "4", "--learning_rate", "1e-3", "--save_steps", "2",
        "--report_to", "none", "--lr_decay_style", "constant", "--torch_dtype", "bfloat16", "--freeze_parameters_ratio", "1",
        "--trainable_parameters", "model.layers.3.", "model.norm", "--pipeline_model_parallel_size", "2",
    ]  # fmt: skip
    words += ["--output_dir", str(tmp_path / "output"), "--train_iters"]
    source = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    seen = source
    for last in ("2", "4"):
        folder = Path(run_distributed(run, 2, [*words, last])[0])
        written = load_file(folder / "hf" / "model.safetensors")
        assert source.keys() == written.keys()
        for name, tensor in written.items():
            trains = name.startswith(("model.layers.3.", "model.norm"))
            assert torch.equal(tensor, seen[name]) != trains, name
        seen = written
    stored = FileSystemReader(folder / "megatron").read_metadata().state_dict_metadata
    assert not any("layers.0." in name or "layers.2." in name or "embedding" in name for name in stored)
    assert any("decoder.layers.3.mlp" in name for name in stored)
    identity = read_checkpoint(folder).manifest.identity  # what --resume compares
    assert identity["freeze_parameters_ratio"] == 1.0
    assert identity["trainable_parameters"] == ["model.layers.3.", "model.norm"]
    export = ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "exported")]
    done = subprocess.run(
        [sys.executable, "-m", "megaswift.cli.main", "export", *export],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == seen.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, seen[name]), name
