"""The model gathered from its shards is the file it was read from, bit for bit, whatever the layout."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megaswift.converters.gather import stream_model
from megaswift.metadata.read import get_model_meta
from megaswift.rollout.generate import generating_model
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, prepared, temporary_folder

# model, parallel settings; tp=2 pads the vocabulary of all, and the heads of one
ONE = [("llama", {}), ("gpt_oss", {}), ("granitemoe", {}), ("gemma4_text", {})]
TWO = [
    ("llama", {"tp": 2}),
    ("llama", {"pp": 2, "vpp": 2}),
    ("llama-odd-heads", {"tp": 2}),
    ("llama-tied", {"pp": 2}),
    ("qwen3_moe", {"ep": 2}),
    ("gpt_oss", {"ep": 2}),
]


@cache
def folder(model: str) -> Path:
    return save_tiny(model, temporary_folder())


def differences(
    rank: int, world_size: int, cases: list[tuple[Path, dict[str, Any]]]
) -> list[list[str] | None]:
    """Return the tensors that differ from the file, for every case; None on a rank that keeps none."""
    found: list[list[str] | None] = []
    for model, parallel in cases:
        with prepared(model, Case(name="gather", settings={"parallel": parallel})) as trained:
            spread = "ep" in parallel
            group = dist.group.WORLD if spread else parallel_state.get_model_parallel_group()
            keep = spread or rank == 0
            stream = stream_model(
                [chunk.module for chunk in trained.engine.chunks], trained.meta, trained.layout, rank,
                group=group, dtype=torch.float32, keep=keep,
            )  # fmt: skip
            tensors = dict(stream)
            expected = load_file(model / "model.safetensors") if keep else {}
            assert tensors.keys() == expected.keys()
            faults = [name for name, value in expected.items() if not torch.equal(value, tensors[name])]
            found.append(faults if keep else None)
    return found


@pytest.mark.parametrize("cases", [ONE, TWO], ids=["one rank", "two ranks"])
def test_gathered_tensors_are_those_of_the_file(cases: list[tuple[str, dict[str, Any]]]) -> None:
    folders = [(folder(model), parallel) for model, parallel in cases]
    world = 1 if cases is ONE else 2
    for rank, found in enumerate(run_distributed(differences, world, folders)):
        for (model, parallel), faults in zip(cases, found, strict=True):
            assert not faults, f"{model} {parallel}"
            assert (faults is None) == (rank > 0 and "ep" not in parallel)


def with_trained_norms(rank: int, world_size: int, model: Path) -> dict[str, torch.Tensor]:
    """Return the gathered tensors of a model whose adapters (DoRA) have made every row half as long again."""
    settings = {"parallel": {"tp": 2}, "tuner": {"tuner_type": "lora", "use_dora": True}}
    with prepared(model, Case(name="gather", settings=settings)) as trained:
        chunks = [chunk.module for chunk in trained.engine.chunks]
        for name, weight in chunks[0].named_parameters():
            if "lora_magnitude" in name:
                weight.data.mul_(1.5)
        group = parallel_state.get_model_parallel_group()
        return dict(
            stream_model(
                chunks, trained.meta, trained.layout, rank, group=group, dtype=torch.float32, keep=rank == 0
            )
        )


def test_gathered_rows_have_the_norms_that_were_trained() -> None:
    found, nothing = run_distributed(with_trained_norms, 2, folder("llama"))
    assert not nothing
    for name, weight in load_file(folder("llama") / "model.safetensors").items():
        longer = 1.5 if "_proj" in name else 1.0
        torch.testing.assert_close(found[name], longer * weight, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss", "llama-tied"])
def test_transformers_opens_the_tensors_as_it_opens_the_file(model: str) -> None:
    tensors = load_file(folder(model) / "model.safetensors")
    found = generating_model(get_model_meta(folder(model)), tensors).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(folder(model), dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
