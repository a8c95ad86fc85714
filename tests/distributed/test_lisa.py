"""LISA: which weights move, against AdamW of plain torch, under every layout, and the memory that it needs."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from megaswift.checkpoint.resume import check_identity
from megaswift.checkpoint.store import read_checkpoint
from megaswift.config.lisa import LisaConfig
from megaswift.config.parse import parse_run
from megaswift.converters.export import export_hf
from megaswift.errors import CheckpointError
from megaswift.metadata.read import get_model_meta
from megaswift.platforms.platform import select_platform
from megaswift.training.lisa import drawn_layers
from megaswift.training.run import train_in_world
from megaswift.training.setup import identity_of
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import Case, Curve, curves, prepared, steps, temporary_folder

STEPS, INTERVAL = 8, 3
LISA = {"lisa_activated_layers": 2, "lisa_step_interval": INTERVAL}
# Adam follows the sign of a gradient that is zero but for rounding, unless eps is above it.
ADAM = {"lr": 1e-2, "adam_eps": 1e-3}


def case_of(name: str, parallel: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Case:
    settings: dict[str, dict[str, Any]] = {
        "lisa": LISA,
        "optimizer": ADAM,
        "training": {"global_batch_size": 4, "train_iters": STEPS},
        "parallel": parallel or {},
    }
    return Case(name=name, settings={**settings, **sections})


def layer_of(name: str) -> int | None:
    """Return the layer of a parameter of one rank, or of a tensor of the file."""
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def moves(rank: int, world_size: int, folder: Path, case: Case) -> list[dict[str, bool]]:
    """Return whether each step moved each weight, by any bit."""
    found = []
    with prepared(folder, case) as trained:
        chunk = trained.engine.chunks[0].module
        for step in range(STEPS):
            before = {name: weight.detach().clone() for name, weight in chunk.named_parameters()}
            steps(trained, step, step + 1)
            found.append(
                {name: not torch.equal(weight, before[name]) for name, weight in chunk.named_parameters()}
            )
    return found


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_drawn_moves_and_nothing_else_by_any_bit(tmp_path: Path, dtype: str) -> None:
    folder, case = save_tiny("llama", tmp_path), case_of("moves", model={"torch_dtype": dtype})
    alone, *ranks = run_distributed(moves, 2, folder, case)
    run = case.run_config(folder)
    for step, moved in enumerate(alone):
        drawn = drawn_layers(run, 4, updates=step)
        for name, did in moved.items():
            layer = layer_of(name)
            if did or "norm" not in name:  # eight bits may not show the step of a norm
                assert did == (layer is None or layer in drawn), (step, name)
    assert all(rank == alone for rank in ranks)


def trained_weights(
    rank: int, world_size: int, folder: Path, case: Case, output: Path
) -> tuple[Curve, list[list[Any]]]:
    """Write the trained model; return its curve and the documents of every step: ids, labels, weights."""
    with prepared(folder, case) as trained:
        curve = steps(trained, 0, STEPS)
        documents = [
            [
                tuple(
                    rows[0, : batch.lengths[0]] for rows in (batch.input_ids, batch.labels, batch.loss_mask)
                )
                for batch in trained.feed.batch(step * trained.feed.items_per_step)
            ]
            for step in range(STEPS)
        ]
        chunks = [chunk.module for chunk in trained.engine.chunks]
        export_hf(chunks, trained.meta, trained.layout, rank, output, dtype="float32")
    return curve, documents


@pytest.mark.parametrize("model", ["llama", "qwen2-tied"])
def test_losses_and_weights_are_those_of_plain_adamw_on_the_drawn_layers(tmp_path: Path, model: str) -> None:
    """Its moments of a layer begin at zero with each draw; those of what always trains go on."""
    folder, decay = save_tiny(model, tmp_path / "model"), 0.1
    schedule = {"lr_decay_style": "linear", "lr_warmup_iters": 2, "weight_decay": decay}
    case = case_of("ours", optimizer={**ADAM, **schedule})
    ((curve, documents),) = run_distributed(trained_weights, 1, folder, case, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    settings = {"betas": (0.9, 0.95), "eps": ADAM["adam_eps"]}

    def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
        matrices = [one for one in parameters if one.ndim == 2]
        others = [one for one in parameters if one.ndim == 1]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, **settings)

    layers = list(theirs.model.layers)
    of_layers = {one for layer in layers for one in layer.parameters()}
    always = adamw([one for one in theirs.parameters() if one not in of_layers])
    for step, rows in enumerate(documents):
        if step % INTERVAL == 0:
            drawn = drawn_layers(case.run_config(folder), len(layers), updates=step)
            for number, layer in enumerate(layers):
                layer.requires_grad_(number in drawn)
            sometimes = adamw([one for number in drawn for one in layers[number].parameters()])
        losses = [
            F.cross_entropy(theirs(ids[None]).logits[0], labels, reduction="none") @ weights
            for ids, labels, weights in rows
        ]
        loss = sum(losses) / sum(weights.sum() for _, _, weights in rows)
        theirs.zero_grad()
        loss.backward()
        trains = [one for one in theirs.parameters() if one.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trains, 1.0)
        # The schedule of config/optimizer.py: up in two steps, then down to zero.
        rate = ADAM["lr"] * (step / 2 if step <= 2 else 1 - (step - 2) / (STEPS - 2))
        for optimizer in (always, sometimes):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        assert curve[step][0] == pytest.approx(float(loss), rel=1e-5), step
        assert curve[step][1] == pytest.approx(float(norm), rel=1e-4), step
    found = load_file(tmp_path / "ours" / "model.safetensors")
    start = load_file(folder / "model.safetensors")
    assert curve[-1][0] < 0.9 * curve[0][0]
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(found[name], weight.detach(), rtol=0, atol=1e-5)
    assert not torch.equal(found["model.norm.weight"], start["model.norm.weight"])


# name -> (model, ranks, parallel settings, layers drawn)
LAYOUTS: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "dp2": ("llama", 2, {"use_distributed_optimizer": False}, 2),
    "dp2 distopt": ("llama", 2, {}, 2),
    "dp2 distopt overlap": ("llama", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, 2),
    "tp2": ("llama", 2, {"tp": 2}, 2),
    "tp2 sp": ("llama", 2, {"tp": 2, "sequence_parallel": True}, 2),
    "cp2": ("llama", 2, {"cp": 2}, 2),
    "pp2": ("llama", 2, {"pp": 2}, 2),
    "pp2 vpp2": ("llama", 2, {"pp": 2, "vpp": 2}, 2),
    "pp2, one layer": ("llama", 2, {"pp": 2}, 1),
    "pp4, one layer": ("llama", 4, {"pp": 4}, 1),  # stages where nothing trains
    "dp2 pp2, tied ends": ("qwen2-tied", 4, {"pp": 2}, 1),
    "ep2": ("qwen2_moe", 2, {"ep": 2}, 2),
    "ep2 pp2": ("qwen2_moe", 4, {"ep": 2, "pp": 2}, 1),
}
PACKED = {"packing": True, "packing_length": 64}


@cache
def folder_of(model: str) -> Path:
    return save_tiny(model, temporary_folder())


@cache
def curves_of(ranks: int) -> list[dict[str, Curve]]:
    """Run all layouts of so many ranks; one rank runs every model and number of layers."""
    found: list[dict[str, Curve]] = [{} for _ in range(ranks)]
    for model in ("llama", "qwen2-tied", "qwen2_moe"):
        cases = [
            case_of(
                f"{model} {layers}" if ranks == 1 else name,
                {} if ranks == 1 else parallel,
                lisa={**LISA, "lisa_activated_layers": layers},
                data=PACKED,
            )
            for name, (one, world, parallel, layers) in LAYOUTS.items()
            if one == model and ranks in (1, world)
        ]
        for rank, seen in enumerate(run_distributed(curves, ranks, folder_of(model), cases)):
            found[rank] |= seen
    return found


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_like_one_rank(layout: str) -> None:
    model, ranks, _, layers = LAYOUTS[layout]
    expected = curves_of(1)[0][f"{model} {layers}"]
    assert expected[-1][0] < 0.95 * expected[0][0], "the run must learn, or equal curves would say little"
    for rank, seen in enumerate(curves_of(ranks)):
        assert len(seen[layout]) == STEPS
        for (loss, norm), (one_loss, one_norm) in zip(seen[layout], expected, strict=True):
            assert loss == pytest.approx(one_loss, rel=1e-5), f"rank {rank}"
            assert norm == pytest.approx(one_norm, rel=1e-4), f"rank {rank}"


def bytes_of(chunks: list[Any], optimizer: Any) -> tuple[int, dict[str, StorageWeakRef]]:
    """Return the bytes of gradients and optimizer state, and their memory and that of gathered weights."""
    buffers = [one for chunk in chunks for one in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    tensors = {f"gradients {number}": one.grad_data for number, one in enumerate(buffers)}
    for part, one in enumerate(optimizer.chained_optimizers):
        masters = (x for group in one.optimizer.param_groups for x in group["params"])
        for number, main in enumerate(masters):
            tensors |= {
                f"{name} {part} {number}": value
                for name, value in one.optimizer.state[main].items()
                if value.ndim
            }
            tensors[f"master {part} {number}"] = main
    total = sum(one.nbytes for one in tensors.values())
    weights = {
        f"weights {number}": one.param_data
        for number, one in enumerate(buffers)
        if one.param_data is not None
    }
    return total, {name: StorageWeakRef(one.untyped_storage()) for name, one in (tensors | weights).items()}


def memory(
    rank: int, world_size: int, folder: Path, cases: list[Case]
) -> dict[str, tuple[list[int], set[str]]]:
    """Return the bytes in each interval, and what of the first interval's memory is not free after the next draw."""
    found = {}
    for case in cases:
        with prepared(folder, case) as trained:
            sizes, kept = [], set()
            engine = trained.engine
            # As training/run.py holds them, whatever is rebuilt.
            wrapped, optimizer = engine.chunks, engine.optimizer
            steps(trained, 0, 1)
            size, before = bytes_of(wrapped, optimizer)
            sizes.append(size)
            for interval in range(1, 3):
                steps(trained, 1 + INTERVAL * (interval - 1), 1 + INTERVAL * interval)
                sizes.append(bytes_of(engine.chunks, engine.optimizer)[0])
            if case.run_config(folder).lisa.lisa_activated_layers:
                kept = {name for name, one in before.items() if not one.expired()}
            assert optimizer is not None and wrapped
            found[case.name] = sizes, kept
    return found


@pytest.mark.ranks(2)
@pytest.mark.parametrize("parallel", [{}, {"use_distributed_optimizer": False}])
def test_gradients_and_state_are_those_of_the_drawn_layers_and_older_ones_are_freed(
    tmp_path: Path, parallel: dict[str, Any]
) -> None:
    folder = save_tiny("llama", tmp_path)
    model = {"torch_dtype": "bfloat16"}
    one = {**LISA, "lisa_activated_layers": 1}
    cases = [
        case_of("full", parallel, model=model, lisa={}),
        case_of("lisa", parallel, model=model, lisa=one),
        case_of("lisa overlap", {"overlap_grad_reduce": True, **parallel}, model=model, lisa=one),
    ]
    weights = load_file(folder / "model.safetensors")
    elements = sum(one.numel() for name, one in weights.items() if layer_of(name) in (0, None))
    for found in run_distributed(memory, 2, folder, cases):
        for name in ("lisa", "lisa overlap"):
            sizes, kept = found[name]
            assert not kept
            shards = 2 if not parallel else 1
            expected = elements * (4 + 12 / shards)
            assert sizes == pytest.approx([expected] * 3, rel=0.01)  # buffers and shards of them are padded
            assert max(sizes) < 0.5 * found["full"][0][0]


TIMED = ("step_time_s", "tokens_per_s", "model_tflops_per_s", "memory_gib")


def run(rank: int, world_size: int, words: list[str]) -> Path:
    summary = train_in_world(parse_run("sft", words), select_platform("cpu"))
    assert summary.checkpoint is not None
    return summary.checkpoint


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_a_run_that_stops_anywhere_goes_on_bit_for_bit_and_is_exported(tmp_path: Path) -> None:
    model, rows = make_tiny_run(tmp_path)
    words = [
        "--model", str(model), "--dataset", str(rows), "--global_batch_size", "4", "--learning_rate", "1e-3", "--save_steps", "1",
        "--report_to", "none", "--logging_steps", "1", "--torch_dtype", "bfloat16", "--train_iters", "6",
        "--lisa_activated_layers", "1", "--lisa_step_interval", "2", "--output_dir", str(tmp_path / "output"),
    ]  # fmt: skip

    def seen() -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        lines = (tmp_path / "output" / "logging.jsonl").read_text().splitlines()
        figures = [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]
        return figures, load_file(tmp_path / "output" / "checkpoint-6" / "hf" / "model.safetensors")

    run_distributed(run, 2, words)
    lines, weights = seen()
    for last in (3, 2):  # in an interval, and where one begins
        for step in range(last + 1, 7):
            (tmp_path / "output" / f"checkpoint-{step}" / "manifest.json").unlink()
        run_distributed(run, 2, words)
        again, found = seen()
        assert again == lines
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    folder = tmp_path / "output" / "checkpoint-3"
    asked = parse_run("sft", words)
    for name, other in (
        ("seed", replace(asked, training=replace(asked.training, seed=1))),
        ("lisa_step_interval", replace(asked, lisa=replace(asked.lisa, lisa_step_interval=3))),
        ("lisa_activated_layers", replace(asked, lisa=LisaConfig())),
    ):
        with pytest.raises(CheckpointError, match=f"^{name}=. but .* was trained with {name}="):
            check_identity(read_checkpoint(folder), identity_of(other, get_model_meta(model)))
    export = ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "exported")]
    done = subprocess.run(
        [sys.executable, "-m", "megaswift.cli.main", "export", *export],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for name, tensor in load_file(folder / "hf" / "model.safetensors").items():
        assert torch.equal(exported[name], tensor), name
