"""Muon under every layout against one rank, and its first step against the paper, weight by weight of the file."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megaswift.converters.export import export_hf
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, Curve, curves, export_gradients, prepared, steps, temporary_folder

STEPS = 6
LR, DECAY = 0.1, 0.1  # of the first step
# what is trained -> (model, tuner)
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {}),
    "tied": ("qwen2-tied", {}),
    "experts": ("qwen2_moe", {}),
    "hybrid": ("qwen3_5_text", {}),
    "values are keys": ("gemma4_text", {}),
    "latent": ("deepseek_v2", {}),
    "lora": ("llama", {"tuner_type": "lora", "lora_dropout": 0.0}),
    "lora of experts": ("qwen2_moe", {"tuner_type": "lora", "lora_dropout": 0.0}),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}),
    "tp4": (4, {"tp": 4}),  # two ranks for a key/value head
    "pp2": (2, {"pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
    "cp2": (2, {"cp": 2, "cp_comm_type": "a2a"}),
    "ep2": (2, {"ep": 2}),
    "tp2 etp2": (2, {"tp": 2, "etp": 2}),
    "tp2 etp1": (2, {"tp": 2}),
    "tp2 ep2": (2, {"tp": 2, "ep": 2}),
    "tp2 ep2 dp2": (4, {"tp": 2, "ep": 2}),
    "tp2 dp2": (4, {"tp": 2}),
}
RUNS = {
    "dense": ["dp2", "tp2 sp", "tp4", "pp2 vpp2", "cp2", "tp2 dp2"],
    "tied": ["pp2"],
    "experts": ["ep2", "tp2 etp2", "tp2 etp1", "tp2 ep2 dp2"],
    "hybrid": ["tp2"],
    "values are keys": ["tp2"],
    "latent": ["tp2", "ep2"],
    "lora": ["tp2 sp"],
    "lora of experts": ["tp2 etp2", "ep2"],
}


def case_of(training: str, layout: str, *, name: str = "muon", **muon: Any) -> Case:
    return Case(
        name=layout,
        settings={
            "optimizer": {"optimizer": name},
            "muon": muon,
            "tuner": TRAININGS[training][1],
            "parallel": LAYOUTS[layout][1],
            "training": {"global_batch_size": 8, "train_iters": STEPS},
        },
    )


@cache
def folder_of(training: str) -> Path:
    return save_tiny(TRAININGS[training][0], temporary_folder())


@cache
def curve_of(training: str, layout: str, **settings: Any) -> Curve:
    case = case_of(training, layout, **settings)
    return run_distributed(curves, LAYOUTS[layout][0], folder_of(training), [case])[0][layout]


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("training", "layout"), [(training, layout) for training, layouts in RUNS.items() for layout in layouts]
)
def test_layout_trains_like_one_rank(training: str, layout: str) -> None:
    expected = curve_of(training, "one")
    found = curve_of(training, layout)
    assert len(found) == len(expected) == STEPS
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)  # float32 sums in another order
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("training", "layout"), [("dense", "dp2"), ("experts", "tp2 ep2 dp2")])
def test_matrices_that_are_shared_out_make_the_same_steps(training: str, layout: str) -> None:
    assert curve_of(training, layout, name="dist_muon") == curve_of(training, layout)


@pytest.mark.ranks(2)
def test_parts_of_a_matrix_make_other_steps_than_the_whole() -> None:
    whole, parts = curve_of("dense", "tp2 sp"), curve_of("dense", "tp2 sp", muon_tp_mode="blockwise")
    assert parts[0] == whole[0]
    assert parts[-1][0] != pytest.approx(whole[-1][0], rel=1e-4)


def momenta(rank: int, world_size: int, folder: Path, case: Case) -> tuple[int, int]:
    """Return the elements of this rank's momenta, and of the matrices that they are of."""
    with prepared(folder, case) as trained:
        steps(trained, 0, 1)
        (part,) = trained.engine.optimizer.chained_optimizers
        kept = [part.optimizer.state[matrix].get("momentum_buffer") for matrix in part.optimizer.matrices]
        elements = [0 if one is None else one.numel() for one in kept]
        return sum(elements), sum(matrix.numel() for matrix in part.optimizer.matrices)


@pytest.mark.ranks(2)
def test_momenta_are_with_one_rank_each() -> None:
    found = run_distributed(momenta, 2, folder_of("dense"), case_of("dense", "dp2", name="dist_muon"))
    (first, matrices), (second, _) = found
    assert first + second == matrices
    assert abs(first - second) < 0.1 * matrices


def one_step(rank: int, world_size: int, folder: Path, case: Case, output: Path) -> None:
    """Write the model as it is after one step."""
    with prepared(folder, case) as trained:
        steps(trained, 0, 1)
        chunks = [chunk.module for chunk in trained.engine.chunks]
        export_hf(chunks, trained.meta, trained.layout, rank, output, dtype="float32")


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Jordan et al. 2024."""
    x = x / x.norm().clamp_min(1e-7)  # an expert may have seen no token
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def is_of_muon(name: str, gradient: torch.Tensor) -> bool:
    return ".layers." in name and gradient.dim() == 2


@pytest.mark.parametrize("training", ["dense", "experts"])
def test_the_first_step_of_every_weight_of_the_file_is_that_of_the_papers(
    tmp_path: Path, training: str
) -> None:
    model = folder_of(training)
    plain = case_of(training, "one", muon_coefficient_type="simple")
    optimizer = {"optimizer": "muon", "lr": LR, "weight_decay": DECAY, "clip_grad": 0.0}
    muon = Case(name="muon", settings={**plain.settings, "optimizer": optimizer})
    adamw = Case(name="gradients", settings={"training": plain.settings["training"]})
    run_distributed(export_gradients, 1, model, [adamw], tmp_path)
    run_distributed(one_step, 1, model, muon, tmp_path / "after")
    before, gradients, after = (
        {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
        for folder in (model, tmp_path / "gradients", tmp_path / "after")
    )
    stepped = 0
    for name, gradient in gradients.items():
        decay = 1 - LR * DECAY if gradient.dim() == 2 else 1.0
        moved = (after[name] - decay * before[name]) / -LR
        if not is_of_muon(name, gradient):
            # AdamW's first step is the sign of the gradient.
            torch.testing.assert_close(moved, gradient / (gradient.abs() + 1e-8), rtol=0, atol=1e-4)
            continue
        if "gate_proj" in name or "up_proj" in name:  # one matrix, as Megatron has them
            pair = name.replace("up_proj", "gate_proj"), name.replace("gate_proj", "up_proj")
            whole = orthogonal(torch.cat([gradients[one] for one in pair]))
            rows, cols = whole.shape
            expected = whole.chunk(2)[pair.index(name)]
        else:
            (rows, cols), expected = gradient.shape, orthogonal(gradient)
        scale = max(rows, cols) ** 0.5
        # Directions that a gradient has only by rounding, 1e-7, grow 3.4^5 times in the iteration.
        assert float((moved - scale * expected).abs().max()) < 1e-3 * scale, name
        assert gradient.any() or ".experts." in name, name
        stepped += 1
    assert stepped == {"dense": 4 * 7, "experts": 4 * (4 + 3 * 4 + 3 + 2)}[training]
