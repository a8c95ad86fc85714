"""Whole runs of `megaswift rlhf`: what is logged is what transformers and PEFT compute from the export; stopping changes nothing."""

import gc
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megaswift.config.parse import parse_run
from megaswift.data.encode import EncodedSet
from megaswift.data.load import load_data
from megaswift.data.tokenizer import load_tokenizer
from megaswift.mcore import process_groups
from megaswift.platforms.platform import select_platform
from megaswift.tasks.catalogue import form_of
from megaswift.training.run import train_in_world
from tests.harness.distributed import run_distributed
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import temporary_folder

TOLERANCE = 1e-5  # float32 on both sides, sums of about ten log-probabilities
STEPS = 4
TP2 = ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true")
LORA = ("--tuner_type", "lora", "--lora_dropout", "0")
# run -> (ranks, flags)
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dpo": (2, ("--rlhf_type", "dpo", "--packing", "true", "--max_length", "64", *TP2)),
    "dpo precomputed": (1, ("--rlhf_type", "dpo", "--precompute_ref_log_probs", "true")),
    "dpo copied": (1, ("--rlhf_type", "dpo")),
    "dpo lora": (1, ("--rlhf_type", "dpo", *LORA)),
    "kto precomputed": (1, ("--rlhf_type", "kto", "--precompute_ref_log_probs", "true", *LORA)),
    "kto lora": (1, ("--rlhf_type", "kto", *LORA)),
    "rm": (2, ("--rlhf_type", "rm", *TP2)),
}


@cache
def folder() -> Path:
    """A model, and rows that are pairs or judged answers."""
    folder = temporary_folder()
    _, rows = make_tiny_run(folder, rows=24)
    with (folder / "judged.jsonl").open("w") as judged, (folder / "pairs.jsonl").open("w") as pairs:
        for number, line in enumerate(rows.read_text().splitlines()):
            row = json.loads(line)
            judged.write(json.dumps({**row, "label": number % 3 != 0}) + "\n")
            pairs.write(json.dumps({**row, "rejected_response": "no " * (1 + number % 4)}) + "\n")
    return folder


def flags(name: str, output: str) -> list[str]:
    rows = "judged" if "kto" in name else "pairs"
    return [
        "--model", str(folder() / "model"), "--dataset", str(folder() / f"{rows}.jsonl"), "--split_dataset_ratio", "0.25",
        "--output_dir", str(folder() / output), "--train_iters", str(STEPS), "--global_batch_size", "4", "--learning_rate", "1e-2",
        "--lr_decay_style", "constant", "--save_steps", "2", "--save_total_limit", "2", "--logging_steps", "1", "--report_to", "none",
        *RUNS[name][1],
    ]  # fmt: skip


def train_all(rank: int, world_size: int, runs: list[list[str]]) -> None:
    for words in runs:
        train_in_world(parse_run("rlhf", words), select_platform("cpu"))
        for found in gc.get_objects():  # see prepared() in tests/harness/training.py
            if isinstance(found, DistributedDataParallel):
                vars(found).clear()
        process_groups.destroy()


def lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder() / output / "logging.jsonl").read_text().splitlines()]


@cache
def trained(ranks: int) -> None:
    """Make every run of so many ranks."""
    names = [name for name, (world, _) in RUNS.items() if world == ranks]
    run_distributed(train_all, ranks, [flags(name, name) for name in names])


def output_of(name: str) -> Path:
    trained(RUNS[name][0])
    return folder() / name


def validation_set(name: str) -> EncodedSet:
    run = parse_run("rlhf", flags(name, name))
    data = load_data(run.data, load_tokenizer(folder() / "model"), max_length=None, form=form_of(run))
    assert data.val is not None
    return data.val


def documents(encoded: EncodedSet) -> list[tuple[torch.Tensor, torch.Tensor]]:
    spans = [
        slice(int(start), int(end)) for start, end in zip(encoded.starts, encoded.starts[1:], strict=False)
    ]
    return [
        (
            torch.tensor(np.array(encoded.input_ids[span]))[None].long(),
            torch.tensor(np.array(encoded.loss_weights[span] > 0)),
        )
        for span in spans
    ]


@torch.no_grad()
def logps(model: Any, encoded: EncodedSet) -> list[float]:
    """Return log p(answer | prompt) of each entry, as transformers computes it."""
    found = []
    for ids_1S, is_answer_S in documents(encoded):
        log_p = model(ids_1S).logits[0, :-1].double().log_softmax(-1)
        each = log_p.gather(1, ids_1S[0, 1:, None])[:, 0]
        found.append(float(each[is_answer_S[1:]].sum()))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def opened(name: str) -> tuple[Any, Any]:
    """Return the exported policy and the model it started from."""
    base = AutoModelForCausalLM.from_pretrained(folder() / "model", dtype=torch.float32).eval()
    start = AutoModelForCausalLM.from_pretrained(folder() / "model", dtype=torch.float32).eval()
    newest = output_of(name) / f"checkpoint-{STEPS}"
    if (newest / "adapter").exists():
        return PeftModel.from_pretrained(base, str(newest / "adapter")).eval(), start
    return AutoModelForCausalLM.from_pretrained(newest / "hf", dtype=torch.float32).eval(), start


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["dpo", "dpo lora"])
def test_logged_rewards_are_those_of_the_exported_model(name: str) -> None:
    policy, start = opened(name)
    encoded = validation_set(name)
    now, before = logps(policy, encoded), logps(start, encoded)
    rewards = [0.1 * (a - b) for a, b in zip(now, before, strict=True)]
    line = lines(name)[-1]
    assert line["eval_logps/chosen"] == pytest.approx(mean(now[0::2]), rel=TOLERANCE)
    assert line["eval_rewards/chosen"] == pytest.approx(mean(rewards[0::2]), abs=TOLERANCE)
    assert line["eval_rewards/rejected"] == pytest.approx(mean(rewards[1::2]), abs=TOLERANCE)
    won = [float(a > b) for a, b in zip(rewards[0::2], rewards[1::2], strict=True)]
    assert line["eval_rewards/accuracies"] == pytest.approx(mean(won))
    losses = [float(np.logaddexp(0, b - a)) for a, b in zip(rewards[0::2], rewards[1::2], strict=True)]
    assert line["eval_loss"] == pytest.approx(mean(losses), rel=TOLERANCE)
    assert abs(mean(rewards[0::2])) > 1e-3, "the model must have moved"


@pytest.mark.slow
def test_logged_kto_rewards_are_those_of_the_exported_adapter() -> None:
    policy, start = opened("kto lora")
    encoded = validation_set("kto lora")
    rewards = [0.1 * (a - b) for a, b in zip(logps(policy, encoded), logps(start, encoded), strict=True)]
    good = [reward for reward, label in zip(rewards, encoded.targets, strict=True) if label]
    poor = [reward for reward, label in zip(rewards, encoded.targets, strict=True) if not label]
    line = lines("kto lora")[-1]
    assert good and poor
    assert line["eval_rewards/chosen"] == pytest.approx(mean(good), abs=TOLERANCE)
    assert line["eval_rewards/rejected"] == pytest.approx(mean(poor), abs=TOLERANCE)
    assert line["eval_rewards/margins"] == pytest.approx(mean(good) - mean(poor), abs=TOLERANCE)
    assert line["eval_kl"] >= 0


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_exported_reward_model_gives_the_logged_rewards() -> None:
    newest = output_of("rm") / f"checkpoint-{STEPS}" / "hf"
    model = AutoModelForSequenceClassification.from_pretrained(newest, dtype=torch.float32).eval()
    with torch.no_grad():
        rewards = [float(model(ids_1S).logits) for ids_1S, _ in documents(validation_set("rm"))]
    line = lines("rm")[-1]
    assert line["eval_rewards/chosen"] == pytest.approx(mean(rewards[0::2]), abs=TOLERANCE)
    assert line["eval_rewards/rejected"] == pytest.approx(mean(rewards[1::2]), abs=TOLERANCE)
    assert lines("rm")[-2]["loss"] < lines("rm")[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("computed", "at_hand"), [("dpo precomputed", "dpo copied"), ("kto precomputed", "kto lora")]
)
def test_references_computed_once_train_as_those_at_hand(computed: str, at_hand: str) -> None:
    trained(1)
    assert list((output_of(computed) / "reference_logps").glob("*.npy"))
    for found, expected in zip(lines(computed), lines(at_hand), strict=True):
        shared = [
            name
            for name in expected
            if name.startswith(("loss", "grad_norm", "rewards", "logps", "kl", "eval_"))
        ]
        assert {name: found[name] for name in shared} == pytest.approx(
            {name: expected[name] for name in shared}, abs=TOLERANCE
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo copied", "kto precomputed"])
def test_resumed_run_repeats_every_figure(name: str) -> None:
    before = lines(name) if output_of(name) else []
    (output_of(name) / f"checkpoint-{STEPS}" / "manifest.json").unlink()
    run_distributed(train_all, 1, [flags(name, name)])
    after = lines(name)
    timed = ("step_time_s", "tokens_per_s", "model_tflops_per_s", "memory_gib")
    assert [{k: v for k, v in line.items() if k not in timed} for line in after] == [
        {k: v for k, v in line.items() if k not in timed} for line in before
    ]
