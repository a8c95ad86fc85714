"""Routing replay in whole runs of GRPO: what is kept is what transformers chooses, and every layout learns from it as one rank does."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megaswift.config.parse import parse_run
from megaswift.rollout.rollout import Rollout
from tests.distributed.test_grpo_runs import CALM, CP2, LOSS_TOLERANCE, NORM_TOLERANCE, PACKED, TIMED
from tests.distributed.test_grpo_runs import folder as prompts_folder
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import temporary_folder

STEPS = 3  # of the same generation: its halves, and the first half again
TP2 = ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true")
PP2 = ("--pipeline_model_parallel_size", "2")
VPP2 = (*PP2, "--virtual_pipeline_model_parallel_size", "2")
EP2 = ("--expert_model_parallel_size", "2")
RECOMPUTED = ("--recompute_granularity", "full")
EXPERTS_RECOMPUTED = ("--recompute_granularity", "selective", "--recompute_modules", "moe")
# run -> (ranks, flags)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "packed": (1, PACKED),
    "recomputed": (1, RECOMPUTED),
    "tp2 ep2": (2, (*TP2, *EP2)),
    "cp2": (2, CP2),
    "cp2 packed": (2, (*CP2, *PACKED)),
    "dp2 ep2": (2, EP2),
    "pp2 recomputed": (2, (*PP2, *RECOMPUTED)),
    "vpp2 packed recomputed": (2, (*VPP2, *PACKED, *EXPERTS_RECOMPUTED)),
}
# Megatron's router, and one of models/router.py whose first layer has no experts.
MODELS = ("qwen3_moe", "ernie4_5_moe")
MODES: dict[str, tuple[str, ...]] = {
    "disabled": (),
    "R2": ("--router_replay_mode", "R2"),
    "R3": ("--router_replay_mode", "R3"),
    "talks": ("--router_replay_mode", "R3", "--multi_turn_scheduler", "{folder}/plugin.py:again", "--max_turns", "2"),
}  # fmt: skip
RUNS = [
    *(("qwen3_moe", "R2", layout) for layout in LAYOUTS if layout != "cp2"),
    *(("ernie4_5_moe", "R2", layout) for layout in ("one", "pp2 recomputed", "tp2 ep2")),
    *((model, mode, "one") for model in MODELS for mode in ("disabled", "R3")),
    *(("qwen3_moe", "talks", layout) for layout in ("one", "cp2")),
]


@cache
def model_folder(model: str) -> Path:
    """Return a model that often stops early, with the tokenizer of the prompts."""
    words = json.loads((prompts_folder() / "model" / "config.json").read_text())
    folder = save_tiny(
        model, temporary_folder(), vocab_size=words["vocab_size"], eos_token_id=words["eos_token_id"]
    )
    for file in (prompts_folder() / "model").iterdir():
        if file.name.startswith(("tokenizer", "special", "generation", "chat")):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def run_of(model: str, mode: str, layout: str) -> Any:
    return parse_run("rlhf", [
        "--rlhf_type", "grpo", "--model", str(model_folder(model)), "--dataset", str(prompts_folder() / "prompts.jsonl"),
        "--output_dir", str(output(model, mode, layout)), "--train_iters", str(STEPS), "--global_batch_size", "8",
        "--num_generations", "4", "--micro_batch_size", "2", "--max_completion_length", "10", "--learning_rate", "1e-2",
        "--lr_decay_style", "constant", "--save_steps", "1", "--logging_steps", "1", "--report_to", "none",
        "--external_plugins", str(prompts_folder() / "plugin.py"), "--reward_funcs", "near", "brief",
        "--generation_batch_size", "16", "--num_iterations", "2", *CALM, *LAYOUTS[layout][1],
        *(word.format(folder=prompts_folder()) for word in MODES[mode]),
    ])  # fmt: skip


def output(model: str, mode: str, layout: str) -> Path:
    return prompts_folder() / f"{model} {mode} {layout}"


@cache
def trained(ranks: int) -> None:
    """Make every run of so many ranks."""
    runs = [run_of(*run) for run in RUNS if LAYOUTS[run[2]][0] == ranks]
    run_distributed(train_all, ranks, runs)


def figures(model: str, mode: str, layout: str) -> list[dict[str, Any]]:
    trained(LAYOUTS[layout][0])
    lines = (output(model, mode, layout) / "logging.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED} for line in lines]


def kept(model: str, mode: str, layout: str) -> Rollout:
    """Return the completions of a run with what is known of them."""
    trained(LAYOUTS[layout][0])
    found = Rollout.load(output(model, mode, layout) / "checkpoint-1" / "rollout")
    assert found is not None
    return found


@torch.no_grad()
def chosen_by_transformers(folder: Path, rollout: Rollout) -> np.ndarray:
    """Return the experts of every token, each layer's in ascending order [T, L, K]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = [module for name, module in model.named_modules() if name.endswith(".experts")]
    seen: list[list[torch.Tensor]] = [[] for _ in blocks]
    for block, calls in zip(blocks, seen, strict=True):
        block.register_forward_pre_hook(lambda module, inputs, calls=calls: calls.append(inputs[1]))
    for first, last in zip(rollout.starts, rollout.starts[1:], strict=False):
        model(torch.from_numpy(rollout.input_ids[first:last])[None].long())
    return torch.stack([torch.cat(calls) for calls in seen], 1).sort(-1).values.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_experts_that_are_kept_are_those_of_the_model_that_wrote(model: str) -> None:
    rollout = kept(model, "R2", "one")
    assert rollout.experts is not None and rollout.experts.dtype == np.uint8
    expected = chosen_by_transformers(model_folder(model), rollout)
    assert np.array_equal(np.sort(rollout.experts, -1), expected)
    later = chosen_by_transformers(output(model, "R2", "one") / "checkpoint-1" / "hf", rollout)
    assert (later != expected).any(), "a step changes nothing, and replaying neither"


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize(("model", "mode", "layout"), [run for run in RUNS if run[2] != "one"])
def test_layout_replays_like_one_rank(model: str, mode: str, layout: str) -> None:
    found, expected = kept(model, mode, layout), kept(model, mode, "one")
    assert np.array_equal(found.input_ids, expected.input_ids)
    assert found.experts is not None and expected.experts is not None
    assert np.array_equal(found.experts, expected.experts)
    for line, one in zip(figures(model, mode, layout), figures(model, mode, "one"), strict=True):
        for name, value in one.items():
            tolerance = NORM_TOLERANCE if name == "grad_norm" else LOSS_TOLERANCE
            assert line[name] == pytest.approx(value, rel=tolerance, abs=LOSS_TOLERANCE), name


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_replay_changes_what_is_learnt_once_the_model_has_changed(model: str) -> None:
    """In the first step the routers choose what they chose before; later they would not."""
    with_replay, without = figures(model, "R2", "one"), figures(model, "disabled", "one")
    assert with_replay[0] == without[0]
    for line, other in zip(with_replay[1:], without[1:], strict=True):
        assert abs(line["loss"] - other["loss"]) > 100 * LOSS_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_an_engine_that_chooses_as_the_trainer_does_is_replayed_alike(model: str) -> None:
    """But for the last token of each completion, which the engine never read."""
    told, found = kept(model, "R3", "one"), kept(model, "R2", "one")
    assert told.experts is not None and found.experts is not None
    is_read = np.ones(len(told.input_ids), bool)
    is_read[told.starts[1:] - 1] = False
    assert np.array_equal(np.sort(told.experts, -1)[is_read], np.sort(found.experts, -1)[is_read])
    assert (told.experts[~is_read] == np.arange(told.experts.shape[2])).all()
    for line, other in zip(figures(model, "R3", "one"), figures(model, "R2", "one"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=NORM_TOLERANCE)


@pytest.mark.slow
def test_conversations_are_replayed_from_their_first_word() -> None:
    rollout = kept("qwen3_moe", "talks", "one")
    assert rollout.experts is not None and rollout.own is not None
    behind = [rollout.own[first + prompt : last] for first, prompt, last in zip(
        rollout.starts, rollout.prompt_lengths, rollout.starts[1:], strict=False
    )]  # fmt: skip
    assert any(not own.all() for own in behind), "some were answered"
    is_read = np.ones(len(rollout.input_ids), bool)
    is_read[rollout.starts[1:] - 1] = False
    expected = chosen_by_transformers(model_folder("qwen3_moe"), rollout)
    assert np.array_equal(np.sort(rollout.experts, -1)[is_read], expected[is_read])


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize(("layout", "step"), [("one", 1), ("one", 2), ("cp2 packed", 1)])
def test_resumed_run_replays_the_same_experts(layout: str, step: int) -> None:
    before = figures("qwen3_moe", "R2", layout)
    for later in range(step + 1, STEPS + 1):
        (output("qwen3_moe", "R2", layout) / f"checkpoint-{later}" / "manifest.json").unlink()
    run_distributed(train_all, LAYOUTS[layout][0], [run_of("qwen3_moe", "R2", layout)])
    assert figures("qwen3_moe", "R2", layout) == before


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("disabled", "R2"), ("R2", "disabled")])
def test_completions_are_written_anew_where_the_mode_changes(before: str, after: str) -> None:
    """Those in the checkpoint have no experts, or some that nobody replays."""
    figures("qwen3_moe", before, "one")
    changed = output("qwen3_moe", f"{before} then", "one")
    shutil.copytree(output("qwen3_moe", before, "one"), changed)
    for later in range(2, STEPS + 1):
        (changed / f"checkpoint-{later}" / "manifest.json").unlink()
    run = run_of("qwen3_moe", after, "one")
    run = replace(run, checkpoint=replace(run.checkpoint, output_dir=str(changed)))
    run_distributed(train_all, 1, [run])
    found = Rollout.load(changed / f"checkpoint-{STEPS}" / "rollout")
    assert found is not None and (found.experts is None) == (after == "disabled")
