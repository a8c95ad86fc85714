"""Adapters that are gathered for an engine are those of the PEFT folder, bit for bit, under every layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file

from megaswift.config.tuner import TunerConfig
from megaswift.converters.adapters import load_peft, save_peft
from megaswift.converters.peft_folder import read_adapter
from megaswift.metadata.read import get_model_meta
from megaswift.parallel.layout import Layout
from megaswift.training.sender import Sender
from tests.harness.adapters import DENSE, LAYOUTS, RUN, build, make_peft, randomise
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny

LORA = TunerConfig(tuner_type="lora", lora_rank=3, lora_alpha=5)
TUNERS = {
    "lora": LORA,
    "pissa": TunerConfig(tuner_type="lora", lora_rank=3, lora_alpha=5, init_weights="pissa"),  # twice the rank
    "some": TunerConfig(tuner_type="lora", lora_rank=3, lora_alpha=5, target_regex=r"model\.layers\.[13]\.mlp\..*"),
}  # fmt: skip


def gathered(
    rank: int, world_size: int, folder: Path, output: Path, layout: Layout, tuner: TunerConfig, peft: Path | None
) -> tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Save adapters, and return what is gathered of them and of the model beside them."""
    meta = get_model_meta(folder)
    adapter = None if peft is None else read_adapter(peft, meta)
    if adapter is not None:
        tuner = adapter.adopt(tuner, meta)
    chunks = build(rank, folder, layout, tuner, None if adapter is None else adapter.ranks(meta))
    if adapter is None:
        randomise(chunks, folder, layout, rank, tuner)
    else:
        load_peft(chunks, meta, layout, rank, adapter)
    save_peft(chunks, meta, layout, rank, output, tuner=tuner, dtype="float32")
    run = replace(RUN, tuner=tuner)
    sender = Sender(
        run, meta, layout, chunks, holders=parallel_state.get_model_parallel_group(), keeps=rank == world_size - 1, adapts=True
    )  # fmt: skip
    (nothing, base), (text, tensors) = ((name, dict(weights)) for name, weights in sender.parcels())
    assert nothing is None
    ((again, weights),) = sender.parcels()  # the base is sent once
    assert again == text and dict(weights).keys() == tensors.keys()
    return str(text), tensors, base


def check(folder: Path, output: Path, found: list[Any]) -> None:
    text, tensors, base = found[-1]
    expected = load_file(output / "adapter_model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in expected.items())
    assert (output / "adapter_config.json").read_text() == text
    model = load_file(folder / "model.safetensors")
    assert base.keys() == model.keys()
    assert all(torch.equal(value, base[name]) for name, value in model.items()), "nothing is merged"
    assert all(not tensors and not base for _, tensors, base in found[:-1])


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", ["one", "tp2", "tp2_pp2"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_gathered_adapters_are_those_of_the_folder(tmp_path: Path, tuner: str, layout: str) -> None:
    folder, output = save_tiny("llama-tied", tmp_path / "model"), tmp_path / "adapter"
    world = LAYOUTS[layout].world
    check(folder, output, run_distributed(gathered, world, folder, output, LAYOUTS[layout], TUNERS[tuner], None))


@pytest.mark.ranks(2)
def test_pairs_that_were_stacked_for_one_module_part_again(tmp_path: Path) -> None:
    folder, output = save_tiny("llama-odd-heads", tmp_path / "model"), tmp_path / "adapter"
    make_peft(folder, tmp_path / "peft", r=3, lora_alpha=5, target_modules=DENSE)
    check(folder, output, run_distributed(gathered, 2, folder, output, LAYOUTS["tp2"], LORA, tmp_path / "peft"))
