"""Whole runs of `megaswift rlhf --rlhf_type grpo` with a teacher: what it has a say in is what transformers makes of both models, the
same under every layout and wherever the teacher is, and alone it is learnt."""

import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megaswift.config.parse import parse_run
from megaswift.data.tokenizer import load_tokenizer
from megaswift.rollout.engine import Sampling
from megaswift.rollout.generate import chances, complete
from tests.distributed.test_grpo_runs import (
    CALM,
    LAYOUTS,
    LOSS_TOLERANCE,
    NORM_TOLERANCE,
    SEED,
    TIMED,
    folder,
)
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed
from tests.harness.served_teacher import served
from tests.harness.tiny_run import make_tiny_run

STEPS, GROUP = 3, 4
REWARDED = ("--reward_funcs", "near", "brief", "--external_plugins", "{folder}/plugin.py")
# what is trained -> flags
TRAININGS: dict[str, tuple[str, ...]] = {
    # Completions are used twice: the second time the model is another than the one that wrote them.
    "beside": (*REWARDED, "--num_iterations", "2", "--teacher_kl_coef", "0.5", "--offload_teacher_model", "true", *CALM),
    # No rewards, and so no groups; adapters learn, and nothing is compared with the model without them.
    "alone": ("--beta", "0", "--temperature", "1", "--tuner_type", "lora", "--lora_dropout", "0", *CALM),
}  # fmt: skip
IN_MEMORY = ("--teacher_model", "{folder}/teacher/model")
OTHERS = [
    ("beside", "tp2"),
    ("beside", "pp2"),
    ("beside", "cp2 packed"),
    ("alone", "dp2 packed"),
    ("alone", "vpp2"),
    ("alone", "dp2 aside"),
]


def flags(training: str, output: str, *more: str, teacher: tuple[str, ...] = IN_MEMORY) -> list[str]:
    if not (folder() / "teacher").is_dir():
        make_tiny_run(folder() / "teacher", rows=1, name="qwen3")
    words = (*TRAININGS[training], *teacher, *more)
    return [
        "--rlhf_type", "grpo", "--model", str(folder() / "model"), "--dataset", str(folder() / "prompts.jsonl"),
        "--output_dir", str(folder() / output), "--train_iters", str(STEPS), "--global_batch_size", "8", "--num_generations",
        "1" if training == "alone" else str(GROUP), "--micro_batch_size", "2", "--max_completion_length", "10", "--learning_rate", "1e-2", "--lr_decay_style",
        "constant", "--save_steps", "1", "--logging_steps", "1", "--report_to", "none", "--log_completions", "true",
        *(word.format(folder=folder()) for word in words),
    ]  # fmt: skip


@cache
def trained(ranks: int) -> None:
    """Make every run of so many ranks."""
    cases = [("beside", "one"), ("alone", "one")] if ranks == 1 else OTHERS
    runs = [
        parse_run("rlhf", flags(training, f"{training} {layout}", *LAYOUTS[layout][1]))
        for training, layout in cases
    ]
    run_distributed(train_all, ranks, runs)


def lines(output: str, name: str = "logging.jsonl") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder() / output / name).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in found]


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for line, one in zip(found, expected, strict=True):
        assert line.keys() == one.keys()
        for name, value in one.items():
            tolerance = NORM_TOLERANCE if name == "grad_norm" else LOSS_TOLERANCE
            assert line[name] == pytest.approx(value, rel=tolerance, abs=LOSS_TOLERANCE), name


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize(("training", "layout"), OTHERS)
def test_layout_learns_from_a_teacher_like_one_rank(training: str, layout: str) -> None:
    trained(1), trained(2)
    same(lines(f"{training} {layout}"), lines(f"{training} one"))
    found, expected = (lines(f"{training} {one}", "completions.jsonl") for one in (layout, "one"))
    assert [row["completion"] for row in found] == [row["completion"] for row in expected]


@cache
def judged(training: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the log-probabilities of the tokens of each of the first completions by transformers: the model's, and the teacher's."""
    run, tokenizer = parse_run("rlhf", flags(training, "")).rollout, load_tokenizer(folder() / "model")
    rows = lines(f"{training} one", "completions.jsonl")[:8]
    prompts = [
        np.array(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True).input_ids)
        for row in rows
    ]
    draws = [chances((SEED, *divmod(place, run.num_generations)), length=10) for place in range(8)]
    sampling = Sampling(
        temperature=run.temperature, top_p=1, top_k=-1, max_tokens=10, stop_ids=(2, *range(20, 50))
    )
    mine, theirs = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (folder() / "model", folder() / "teacher" / "model")
    )
    ids = complete(mine, prompts, draws, sampling, pad_id=0)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [row["completion"] for row in rows]

    def logps(model: Any, prompt: np.ndarray, answer: Any) -> torch.Tensor:
        with torch.no_grad():
            logits_SV = model(torch.tensor([[*prompt.tolist(), *answer]])).logits[0, len(prompt) - 1 : -1]
        logps_SV = (logits_SV.double() / run.temperature).log_softmax(-1)
        return logps_SV.gather(1, torch.tensor(answer)[:, None])[:, 0]

    pairs = list(zip(prompts, ids, strict=True))
    return [logps(mine, *pair) for pair in pairs], [logps(theirs, *pair) for pair in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
def test_the_first_step_says_what_both_models_make_of_the_completions(training: str) -> None:
    trained(1)
    first, rows = lines(f"{training} one")[0], lines(f"{training} one", "completions.jsonl")[:8]
    leads = [theirs - own for own, theirs in zip(*judged(training), strict=True)]
    every = torch.cat(leads)
    assert first["teacher_kl"] == pytest.approx((every.exp() - every - 1).mean().item(), rel=LOSS_TOLERANCE)
    share = 0.5 if training == "beside" else 1.0
    expected = -statistics.mean(
        row["advantage"] + share * lead.mean().item() for row, lead in zip(rows, leads, strict=True)
    )
    assert first["loss"] == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert ("reward" in first) is any(row["advantage"] for row in rows) is (training == "beside")


@pytest.mark.slow
def test_a_teacher_behind_http_says_the_same_and_reads_each_completion_once() -> None:
    trained(1)
    flags("alone", "")  # makes the teacher
    with served(folder() / "teacher" / "model", max_model_len=513) as server:
        words = flags("alone", "alone served", teacher=("--teacher_model_server", server.url))
        run_distributed(train_all, 1, [parse_run("rlhf", words)])
    same(lines("alone served"), lines("alone one"))
    assert len(server.documents) == 8 * STEPS


@pytest.mark.slow
def test_stopping_amid_the_uses_of_a_generation_changes_nothing() -> None:
    trained(1)
    for steps in (1, STEPS):
        words = flags("beside", "beside stopped")
        words[words.index("--train_iters") + 1] = str(steps)
        run_distributed(train_all, 1, [parse_run("rlhf", words)])
    assert lines("beside stopped") == lines("beside one")


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_a_teacher_of_distributions_may_be_called_in(tmp_path: Path) -> None:
    """It writes, is asked about its states, and lends its output layer, tied to its embedding: the same as if it stayed."""
    flags("alone", "")
    make_tiny_run(tmp_path / "tied", rows=1, name="llama-tied")
    runs = []
    for output, more in (("stays", ()), ("called in", ("--offload_teacher_model", "true"))):
        for layout in ("one", "pp2"):
            words = [
                "--rlhf_type", "gkd", "--model", str(folder() / "model"), "--dataset", str(folder() / "rows.jsonl"),
                "--output_dir", str(folder() / f"{output} {layout}"), "--teacher_model", str(tmp_path / "tied" / "model"),
                "--train_iters", "4", "--global_batch_size", "4", "--micro_batch_size", "2", "--lmbda", "0.5", "--seq_kd", "true",
                "--max_completion_length", "8", "--learning_rate", "1e-2", "--lr_decay_style", "constant", "--save_steps", "4",
                "--seed", "12", "--logging_steps", "1", "--report_to", "none", *LAYOUTS[layout][1], *more,
            ]  # fmt: skip
            runs.append((layout, parse_run("rlhf", words)))
    for layout in ("one", "pp2"):
        run_distributed(train_all, LAYOUTS[layout][0], [run for name, run in runs if name == layout])
        found = lines(f"called in {layout}")
        assert found == lines(f"stays {layout}") and {line["on_policy"] for line in found} == {0.0, 1.0}


@pytest.mark.slow
def test_completions_that_were_rewarded_otherwise_are_written_anew() -> None:
    """Step 2 would use those of step 1 again, whose rewards are not those of the resumed run."""
    for steps, rewards in ((1, ["near", "brief"]), (2, ["near"])):
        words = flags("beside", "beside changed")
        words[words.index("--train_iters") + 1] = str(steps)
        begin = words.index("--reward_funcs") + 1
        words[begin : begin + 2] = rewards
        run_distributed(train_all, 1, [parse_run("rlhf", words)])
    rows = lines("beside changed", "completions.jsonl")
    assert [(row["step"], len(row["rewards"])) for row in rows] == [(1, 2)] * 8 + [(2, 1)] * 8
