"""Whole runs of `megaswift rlhf --rlhf_type gkd` on completions: who writes them follows from the seed, what is written and learnt is
the same under every layout, and stopping changes nothing."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megaswift.config.parse import parse_run
from megaswift.data.tokenizer import load_tokenizer
from megaswift.kernels.linear_divergence.reference import generalised_jsd
from megaswift.rollout.engine import Sampling
from megaswift.rollout.generate import chances, complete
from megaswift.training.distillation_feed import Writer, writer_of
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import temporary_folder

# float32 sums in another order, a few Adam steps apart.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
STEPS, BATCH, LONGEST, SEED = 4, 4, 8, 12
STOPS = (2, *range(20, 50))
CALM = ("--adam_eps", "1e-3")  # gradients that are 0 but for rounding move nothing
# what is trained -> flags
TRAININGS: dict[str, tuple[str, ...]] = {
    "mixed": (
        "--lmbda", "0.5", "--seq_kd", "true", "--sft_alpha", "0.4", "--temperature", "0.7", "--top_k", "40",
        "--global_batch_size", str(BATCH), "--micro_batch_size", "2", *CALM,
    ),
    # One pack holds all completions of a step: of two micro batches one is empty.
    "own": (
        "--lmbda", "0.5", "--beta", "1", "--tuner_type", "lora", "--lora_dropout", "0", "--packing", "true", "--max_length", "400",
        "--global_batch_size", "2", "--micro_batch_size", "1", *CALM,
    ),
    # Rows without answers.
    "asked": (
        "--lmbda", "1", "--max_length", "40", "--global_batch_size", str(BATCH),
        "--micro_batch_size", "2", *CALM,
    ),
}  # fmt: skip
# layout -> (ranks, flags)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "dp2": (2, ()),
    "tp2": (2, ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true")),
    "pp2": (2, ("--pipeline_model_parallel_size", "2")),
    "cp2": (2, ("--context_parallel_size", "2", "--cp_comm_type", "p2p")),
    "tp2 pp2": (4, ("--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2")),
    "packed": (1, ("--packing", "true")),
}
OTHERS = [
    ("mixed", "tp2"),
    ("mixed", "pp2"),
    ("mixed", "tp2 pp2"),
    ("own", "cp2"),
    ("own", "dp2"),
    ("own", "tp2 pp2"),
    ("asked", "packed"),
]
TIMED = ("step_time_s", "tokens_per_s", "model_tflops_per_s", "memory_gib")


@cache
def folder() -> Path:
    """A student that often stops early, a teacher, and conversations."""
    folder = temporary_folder()
    model, _ = make_tiny_run(folder, rows=10)
    make_tiny_run(folder / "teacher", rows=1, name="llama-tied")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    prompts = [{"messages": row["messages"][:1]} for row in rows]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(STOPS)}))
    return folder


def flags(training: str, layout: str) -> list[str]:
    dataset = "prompts.jsonl" if training == "asked" else "rows.jsonl"
    return [
        "--rlhf_type", "gkd", "--model", str(folder() / "model"), "--teacher_model", str(folder() / "teacher" / "model"),
        "--dataset", str(folder() / dataset), "--output_dir", str(folder() / f"{training} {layout}"), "--seed", str(SEED),
        "--train_iters", str(STEPS), "--learning_rate", "1e-2",
        "--lr_decay_style", "constant", "--save_steps", "1", "--logging_steps", "1", "--report_to", "none",
        "--max_completion_length", str(LONGEST), "--log_completions", "true", *TRAININGS[training], *LAYOUTS[layout][1],
    ]  # fmt: skip


@cache
def trained(ranks: int) -> None:
    """Make every run of so many ranks."""
    every = [*((training, "one") for training in TRAININGS), *OTHERS]
    cases = [(training, layout) for training, layout in every if LAYOUTS[layout][0] == ranks]
    run_distributed(train_all, ranks, [parse_run("rlhf", flags(*case)) for case in cases])


def table(training: str, layout: str, name: str) -> list[dict[str, Any]]:
    """Return the lines of a file of a run."""
    trained(LAYOUTS[layout][0])
    return [json.loads(line) for line in (folder() / f"{training} {layout}" / name).read_text().splitlines()]


def figures(training: str, layout: str) -> list[dict[str, Any]]:
    lines = table(training, layout, "logging.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def test_writers_follow_from_the_seed_and_have_their_share() -> None:
    def writers(seed: int, **chosen: Any) -> list[Writer]:
        return [writer_of(seed=seed, consumed=16 * step, **chosen) for step in range(1000)]

    found = writers(1, lmbda=0.3, seq_kd=False)
    assert found == writers(1, lmbda=0.3, seq_kd=False) != writers(2, lmbda=0.3, seq_kd=False)
    assert abs(found.count(Writer.STUDENT) / 1000 - 0.3) < 0.05  # three standard deviations: 0.043
    assert set(found) == {Writer.STUDENT, Writer.ROWS}
    assert set(writers(1, lmbda=1, seq_kd=False)) == {Writer.STUDENT}
    assert set(writers(1, lmbda=0, seq_kd=True)) == {Writer.TEACHER}


@pytest.mark.slow
@pytest.mark.ranks(4)
@pytest.mark.parametrize(("training", "layout"), OTHERS)
def test_layout_writes_and_learns_like_one_rank(training: str, layout: str) -> None:
    assert table(training, layout, "completions.jsonl") == table(training, "one", "completions.jsonl")
    for line, one in zip(figures(training, layout), figures(training, "one"), strict=True):
        for name, value in one.items():
            tolerance = NORM_TOLERANCE if name == "grad_norm" else LOSS_TOLERANCE
            assert line[name] == pytest.approx(value, rel=tolerance), name


@pytest.mark.slow
@pytest.mark.parametrize("training", ["mixed", "own"])
def test_every_writer_has_its_turn_and_the_student_learns(training: str) -> None:
    rows, lines = table(training, "one", "completions.jsonl"), figures(training, "one")
    other = "teacher" if training == "mixed" else "rows"
    for number, line in enumerate(lines):
        own = [row for row in rows if row["step"] == line["step"]]
        writers = {row["writer"] for row in own} or {"rows"}
        assert writers == {"student" if line["on_policy"] else other}
        if own:
            assert line["loss_tokens"] == sum(row["tokens"] for row in own)
            assert all(row["tokens"] <= LONGEST and row["prompt"][-1]["role"] == "user" for row in own)
            assert training == "own" or len(own) == BATCH, number
    assert {line["on_policy"] for line in lines} == {0.0, 1.0}, "choose another seed"
    assert len({row["tokens"] for row in rows}) > 2


@pytest.mark.slow
def test_prompts_alone_are_enough_where_every_step_is_on_completions() -> None:
    rows, lines = table("asked", "one", "completions.jsonl"), figures("asked", "one")
    assert len(rows) == STEPS * BATCH and {row["writer"] for row in rows} == {"student"}
    assert len({row["source"] for row in rows}) == 10, "every row is asked for"
    assert [line["loss_tokens"] for line in lines] == [
        sum(row["tokens"] for row in rows if row["step"] == line["step"]) for line in lines
    ]
    assert lines[-1]["loss"] < lines[0]["loss"]


def opened(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.slow
def test_completions_and_losses_are_those_of_the_exported_student_and_of_the_teacher() -> None:
    """Of every step after the first, by transformers from the export of the step before."""
    rows, run = table("mixed", "one", "completions.jsonl"), parse_run("rlhf", flags("mixed", "one"))
    tokenizer, teacher = load_tokenizer(folder() / "model"), opened(folder() / "teacher" / "model")
    chosen = run.rollout
    sampling = Sampling(temperature=chosen.temperature, top_p=1, top_k=40, max_tokens=LONGEST, stop_ids=STOPS)
    for line in figures("mixed", "one")[1:]:
        step = int(line["step"])
        own = [row for row in rows if row["step"] == step]
        student = opened(folder() / "mixed one" / f"checkpoint-{step - 1}" / "hf")
        prompts = [
            np.array(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True).input_ids)
            for row in own
        ]
        keys = [
            (SEED, ((step - 1) * BATCH + place) // 10, int(row["source"].rpartition(":")[2]) - 1)
            for place, row in enumerate(own)
        ]
        writer = student if line["on_policy"] else teacher
        draws = [chances(key, length=LONGEST) for key in keys]
        ids = complete(writer, prompts, draws, sampling, pad_id=0)
        assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [row["completion"] for row in own]
        losses = []
        for prompt, answer in zip(prompts, ids, strict=True):
            document = torch.tensor([*prompt.tolist(), *answer])[None]
            with torch.no_grad():
                logits = [
                    model(document).logits[0, len(prompt) - 1 : -1].double() for model in (student, teacher)
                ]
            losses.append(generalised_jsd(*logits, beta=0.5))
            if not line["on_policy"]:
                losses[-1] += 0.4 * cross_entropy(logits[0], torch.tensor(answer), reduction="none")
        assert line["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=LOSS_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("training", ["mixed", "own"])
def test_resumed_run_repeats_every_figure_and_completion(training: str) -> None:
    before = figures(training, "one"), table(training, "one", "completions.jsonl")
    for later in range(2, STEPS + 1):
        (folder() / f"{training} one" / f"checkpoint-{later}" / "manifest.json").unlink()
    run_distributed(train_all, 1, [parse_run("rlhf", flags(training, "one"))])
    assert (figures(training, "one"), table(training, "one", "completions.jsonl")) == before


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_run_that_goes_on_under_another_layout_has_the_same_writers_and_completions() -> None:
    expected = figures("mixed", "one"), table("mixed", "one", "completions.jsonl")
    figures("mixed", "pp2")
    output = folder() / "mixed pp2"
    for later in range(2, STEPS + 1):
        (output / f"checkpoint-{later}" / "manifest.json").unlink()
    words = flags("mixed", "tp2")
    words[words.index("--output_dir") + 1] = str(output)
    run_distributed(train_all, 2, [parse_run("rlhf", words)])
    assert table("mixed", "pp2", "completions.jsonl") == expected[1]
    for line, one in zip(figures("mixed", "pp2"), expected[0], strict=True):
        assert line["loss"] == pytest.approx(one["loss"], rel=LOSS_TOLERANCE)
        assert line["on_policy"] == one["on_policy"]
