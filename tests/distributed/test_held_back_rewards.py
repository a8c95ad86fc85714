"""Validations of GRPO: what held-back prompts are worth is what transformers' samples from the export are, the same under every
layout, and training does not know of it."""

import json
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megaswift.config.parse import parse_run
from megaswift.data.tokenizer import load_tokenizer
from megaswift.rollout.engine import Sampling
from megaswift.rollout.generate import chances, complete
from megaswift.training.held_back import HELD_BACK
from megaswift.training.rollout_feed import made_with
from tests.distributed.test_grpo_runs import LAYOUTS, LOSS_TOLERANCE, STEPS, TIMED, flags, folder
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed

PROMPTS, COMPLETIONS = 5, 2  # held back, and written for each: no number of ranks divides the prompts
EVERY = ("--eval_steps", "1", "--num_generations_eval", str(COMPLETIONS))
# name -> training, layout and further flags
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    **{f"grpo {layout}": ("grpo", layout, EVERY) for layout in ("one", "dp2", "tp2", "pp2", "cp2 packed")},
    "grpo one, silent": ("grpo", "one", ("--eval_strategy", "no")),
    "grpo one, few": ("grpo", "one", ("--eval_steps", "1", "--eval_iters", "1", "--num_generations_eval", "1")),
    "games one": ("games", "one", EVERY),
    "games dp2": ("games", "dp2", EVERY),
}  # fmt: skip


@cache
def held_back() -> Path:
    """Prompts of which training has none."""
    path, lines = folder() / "held_back.jsonl", (folder() / "prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:PROMPTS]]
    for number, row in enumerate(rows):
        row["messages"][0]["content"] += "?" * number
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(name: str) -> list[str]:
    training, layout, more = RUNS[name]
    return flags(training, layout, "--val_dataset", str(held_back()), *more, output=f"held back, {name}")


@cache
def trained(ranks: int) -> None:
    """Make every run of so many ranks."""
    names = [name for name, (_, layout, _) in RUNS.items() if LAYOUTS[layout][0] == ranks]
    run_distributed(train_all, ranks, [parse_run("rlhf", words_of(name)) for name in names])


def table(name: str, file: str) -> list[dict[str, Any]]:
    """Return the lines of a file of a run, without what a clock decides."""
    trained(LAYOUTS[RUNS[name][1]][0])
    lines = (folder() / f"held back, {name}" / file).read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def validations(name: str) -> list[dict[str, Any]]:
    return [line for line in table(name, "logging.jsonl") if "eval_reward" in line]


def written(name: str) -> list[dict[str, Any]]:
    """Return what was written for held-back prompts."""
    return [row for row in table(name, "completions.jsonl") if row.get("held_back")]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", [name for name, (_, layout, _) in RUNS.items() if LAYOUTS[layout][0] == 2])
def test_layout_is_worth_what_one_rank_is(name: str) -> None:
    one = f"{name.split()[0]} one"
    assert [row["completion"] for row in written(name)] == [row["completion"] for row in written(one)]
    assert len(written(name)) == STEPS * PROMPTS * COMPLETIONS
    assert len(validations(name)) == STEPS
    for found, wanted in zip(validations(name), validations(one), strict=True):
        assert found == pytest.approx(wanted, rel=LOSS_TOLERANCE)


def test_figures_are_those_of_what_transformers_samples_from_the_export() -> None:
    rows = [json.loads(line) for line in held_back().read_text().splitlines()]
    run = parse_run("rlhf", words_of("grpo one"))
    sampling = Sampling(
        temperature=run.rollout.temperature,
        top_p=run.rollout.top_p,
        top_k=run.rollout.top_k,
        max_tokens=10,
        stop_ids=(2, *range(20, 50)),
    )
    lines, seen = validations("grpo one"), []
    for line in lines:
        export = folder() / "held back, grpo one" / f"checkpoint-{line['step']}" / "hf"
        model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
        tokenizer = load_tokenizer(export)
        asked = [
            np.array(tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True).input_ids)
            for row in rows  # some have an answer already, which nobody reads
        ]
        keys = [
            (run.training.seed, place, number, *HELD_BACK)
            for place in range(PROMPTS)
            for number in range(COMPLETIONS)
        ]
        ids = complete(
            model,
            [asked[place] for _, place, *_ in keys],
            [chances(key, length=10) for key in keys],
            sampling,
            pad_id=0,
        )
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        own = [row for row in written("grpo one") if row["step"] == line["step"]]
        assert texts == [row["completion"] for row in own]
        near = [
            -abs(text.count("e") - rows[place]["goal"])
            for text, (_, place, *_) in zip(texts, keys, strict=True)
        ]
        brief = [-0.1 * len(text.split()) for text in texts]
        assert line["eval_rewards/near/mean"] == pytest.approx(fmean(near))
        assert line["eval_reward"] == pytest.approx(fmean(near) + 0.5 * fmean(brief))
        assert line["eval_completions/mean_length"] == pytest.approx(fmean(row["tokens"] for row in own))
        seen.append(texts)
    best = max(lines, key=lambda line: (line["eval_reward"], -line["step"]))["step"]
    assert (folder() / "held back, grpo one" / "best").read_text() == f"checkpoint-{best}\n"
    assert len(lines) == STEPS and seen[0] != seen[-1], "weights that moved write something else"


def test_training_does_not_know_of_it() -> None:
    assert made_with(parse_run("rlhf", words_of("grpo one"))) == made_with(
        parse_run("rlhf", words_of("grpo one, silent"))
    )
    found = [line for line in table("grpo one", "logging.jsonl") if "loss" in line]
    assert found == table("grpo one, silent", "logging.jsonl") and len(found) == STEPS
    learnt = [row for row in table("grpo one", "completions.jsonl") if "advantage" in row]
    assert learnt == table("grpo one, silent", "completions.jsonl")


def test_a_few_prompts_with_a_completion_each() -> None:
    """An iteration of the validation is as many prompts as a step has; one completion has no spread."""
    rows = written("grpo one, few")
    assert len(rows) == 2 * STEPS and len({row["source"] for row in rows}) == 2
    for line in validations("grpo one, few"):
        assert "eval_reward" in line and "eval_reward_std" not in line
