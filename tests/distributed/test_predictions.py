"""Whole runs that answer held-back rows: what is written is what transformers writes from the export, its scores are the same under
every layout, and training does not know of it."""

import json
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megaswift.config.parse import parse_run
from megaswift.data.tokenizer import load_tokenizer
from megaswift.rollout.nlg import nlg_scores
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import temporary_folder

TOLERANCE = 1e-5  # float32 sums in another order, a few Adam steps apart
STEPS, EVERY, LONGEST = 24, 12, 8
HELD_BACK = 7  # rows, which no number of ranks divides
SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
TIMED = ("step_time_s", "tokens_per_s", "model_tflops_per_s", "memory_gib")
# what is trained -> flags
TRAININGS: dict[str, tuple[str, ...]] = {
    # Gradients that are 0 but for rounding move nothing.
    "full": ("--learning_rate", "1e-2", "--adam_eps", "1e-3"),
    # Dropout draws from the state that nothing else may touch.
    "lora": ("--learning_rate", "1e-2", "--tuner_type", "lora", "--lora_dropout", "0.2", "--packing", "true"),
}  # fmt: skip
# layout -> (ranks, flags)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "dp2": (2, ()),
    "tp2": (2, ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true")),
    "pp2": (2, ("--pipeline_model_parallel_size", "2")),
    "cp2": (2, ("--context_parallel_size", "2", "--cp_comm_type", "p2p")),
}
# name -> training, layout and further flags
PREDICT = ("--predict_with_generate", "true", "--max_new_tokens", str(LONGEST), "--log_completions", "true")
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    **{f"full {layout}": ("full", layout, PREDICT) for layout in LAYOUTS},
    "lora one": ("lora", "one", PREDICT),
    "lora tp2": ("lora", "tp2", PREDICT),
    "lora one, silent": ("lora", "one", ()),
    "lora tp2, silent": ("lora", "tp2", ()),
    "full one, silent": ("full", "one", ()),
    "full one, few": ("full", "one", (*PREDICT, "--eval_iters", "1")),
}


@cache
def folder() -> Path:
    folder = temporary_folder()
    _, rows = make_tiny_run(folder, rows=16 + HELD_BACK)
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:16]))
    no_room = {"messages": [{"role": "user", "content": "yes " * 40}, {"role": "assistant", "content": "no"}]}
    (folder / "held_back.jsonl").write_text("".join([*lines[16:19], json.dumps(no_room) + "\n", *lines[19:]]))
    return folder


def flags(name: str) -> list[str]:
    training, layout, more = RUNS[name]
    return [
        "--model", str(folder() / "model"), "--dataset", str(folder() / "rows.jsonl"), "--torch_dtype", "float32",
        "--val_dataset", str(folder() / "held_back.jsonl"), "--output_dir", str(folder() / name), "--max_length", "48",
        "--global_batch_size", "4", "--micro_batch_size", "1" if training == "lora" else "2", "--train_iters", str(STEPS),
        "--lr_decay_style", "constant", "--save_steps", str(EVERY), "--logging_steps", "1", "--report_to", "none",
        *TRAININGS[training], *LAYOUTS[layout][1], *more,
    ]  # fmt: skip


def train(names: list[str], ranks: int) -> None:
    run_distributed(train_all, ranks, [parse_run("sft", flags(name)) for name in names])


@cache
def trained(ranks: int) -> None:
    """Make every run of so many ranks."""
    train([name for name, (_, layout, _) in RUNS.items() if LAYOUTS[layout][0] == ranks], ranks)


def table(name: str, file: str = "logging.jsonl") -> list[dict[str, Any]]:
    """Return the lines of a file of a run, without what a clock decides."""
    trained(LAYOUTS[RUNS[name][1]][0])
    lines = [json.loads(line) for line in (folder() / name / file).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def validations(name: str) -> list[dict[str, Any]]:
    return [line for line in table(name) if "eval_loss" in line]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", [*(f"full {layout}" for layout in LAYOUTS if layout != "one"), "lora tp2"])
def test_layout_writes_and_scores_like_one_rank(name: str) -> None:
    one = f"{name.split()[0]} one"
    if name != "lora tp2":  # its dropout is of other numbers
        assert table(name, "completions.jsonl") == table(one, "completions.jsonl")
        for found, wanted in zip(validations(name), validations(one), strict=True):
            assert found == pytest.approx(wanted, rel=TOLERANCE)
    assert all(f"eval_{score}" in line for line in validations(name) for score in SCORES)


def test_figures_are_those_of_the_answers_that_transformers_writes_from_the_export() -> None:
    rows = [json.loads(line)["messages"] for line in (folder() / "held_back.jsonl").read_text().splitlines()]
    asked = [row for row in rows if len(row[0]["content"].split()) < 40]
    written, lines = table("full one", "completions.jsonl"), validations("full one")
    assert len(asked) == HELD_BACK < len(rows) and [line["step"] for line in lines] == [EVERY, STEPS]
    assert lines[0] != lines[1] and lines[1]["eval_rouge-1"] > 0
    for line in lines:
        export = folder() / "full one" / f"checkpoint-{line['step']}" / "hf"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(export).eval(), load_tokenizer(export)
        own, scores = [one for one in written if one["step"] == line["step"]], []
        for (question, answer), one in zip(asked, own, strict=True):
            ids = tokenizer.apply_chat_template(
                [question], add_generation_prompt=True, return_tensors="pt"
            ).input_ids
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=LONGEST,
            )
            text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert (one["completion"], one["answer"]) == (text, answer["content"])
            scores.append(nlg_scores(text, answer["content"]))
            assert one["scores"] == scores[-1]
        known = [one for one in scores if one is not None]
        assert {name: line[f"eval_{name}"] for name in SCORES} == pytest.approx(
            {name: 100 * fmean(one[name] for one in known) for name in SCORES}, rel=1e-12
        )


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["full one", "lora one", "lora tp2"])
def test_training_is_alike_to_the_bit_without_answers(name: str) -> None:
    new = {f"eval_{score}" for score in SCORES}
    lines = [{key: value for key, value in line.items() if key not in new} for line in table(name)]
    assert lines == table(f"{name}, silent")
    assert {"eval_loss", "eval_token_acc", *new} <= validations(name)[0].keys()


def test_fewer_batches_have_fewer_answers() -> None:
    few = table("full one, few", "completions.jsonl")
    assert few == [
        one
        for step in (EVERY, STEPS)
        for one in [row for row in table("full one", "completions.jsonl") if row["step"] == step][:4]
    ]


def test_a_run_that_is_stopped_goes_on_as_if_nothing_had_been() -> None:
    figures, written = table("lora one"), table("lora one", "completions.jsonl")
    last = folder() / "lora one" / f"checkpoint-{STEPS}"
    (last / "manifest.json").unlink()  # as if the run had been killed before
    train(["lora one"], 1)
    assert (table("lora one"), table("lora one", "completions.jsonl")) == (figures, written)
