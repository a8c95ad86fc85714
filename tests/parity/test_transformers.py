"""Logits, loss and every gradient of a loaded model against transformers, for every family and on packed documents."""

import json
from pathlib import Path

import pytest

from megaswift.mcore.process_groups import initialise
from megaswift.metadata.read import get_model_meta
from megaswift.parallel.layout import Layout
from megaswift.parity.compare import LOSS_LIMIT, differences, gradient_differences
from megaswift.parity.documents import Outcome
from megaswift.parity.ours import megatron_outcome
from megaswift.parity.reference import transformers_outcome
from tests.harness.distributed import run_distributed
from tests.harness.tiny import MODELS, save_tiny


def megatron_side(rank: int, world_size: int, folder: Path, gradients: Path, layout: Layout) -> Outcome:
    initialise(layout, seed=1, timeout_min=2)
    return megatron_outcome(get_model_meta(folder), folder, gradients, layout=layout, rank=rank)


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    assert compare(name, tmp_path) == []


@pytest.mark.parametrize(("name", "model_type"), [("deepseek_v3", "kimi_k2"), ("qwen2", "mimo")])
def test_model_types_of_remote_code_equal_the_class_that_they_repeat(
    name: str, model_type: str, tmp_path: Path
) -> None:
    assert compare(name, tmp_path, model_type=model_type) == []


def compare(name: str, tmp_path: Path, *, model_type: str | None = None) -> list[str]:
    """Compare both sides; ours reads the model as one of `model_type` if that is given."""
    folder = save_tiny(name, tmp_path / "model")
    theirs = transformers_outcome(folder, tmp_path / "theirs")
    if model_type is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    [ours] = run_distributed(megatron_side, 1, folder, tmp_path / "ours", Layout())
    return differences(ours, theirs)


@pytest.mark.ranks(2)
def test_latent_attention_cut_over_tp_has_the_same_gradients(tmp_path: Path) -> None:
    """Without sequence parallelism the key part that all heads share gets its gradient from all ranks at once."""
    folder = save_tiny("deepseek_v3", tmp_path / "model", first_k_dense_replace=4)
    theirs = transformers_outcome(folder, tmp_path / "theirs")
    layout = Layout(world=2, tp=2)
    results = run_distributed(megatron_side, 2, folder, tmp_path / "ours", layout)
    assert [one.loss for one in results] == pytest.approx([theirs.loss] * 2, rel=LOSS_LIMIT)
    assert gradient_differences(results[0], theirs) == []
