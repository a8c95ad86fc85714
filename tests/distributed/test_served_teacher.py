"""Whole runs of `megaswift rlhf --rlhf_type gkd` with teachers behind HTTP: they learn what a teacher in memory teaches, under every
layout, each document is asked about once, and nobody waits for ever where nobody answers."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megaswift.config.parse import parse_run
from megaswift.errors import UserError
from megaswift.platforms.platform import select_platform
from megaswift.training.run import train_in_world
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import free_port, run_distributed
from tests.harness.served_teacher import TeacherServer, served
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import temporary_folder

# float32 sums in another order, four Adam steps apart; log-probabilities of about -6 that were rounded once more.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
STEPS, ROWS, TOP_K = 4, 12, 9
TEACHERS = {"first": "llama-tied", "second": "qwen3"}
TIMED = ("step_time_s", "tokens_per_s", "model_tflops_per_s", "memory_gib")
# what is trained -> flags
TRAININGS: dict[str, tuple[str, ...]] = {
    "rows": ("--lmbda", "0", "--sft_alpha", "0.4", "--beta", "0.3", "--split_dataset_ratio", "0.34", "--padding_free", "false"),
    # Greedy, so that both teachers write the same.
    "written": ("--lmbda", "0.5", "--seq_kd", "true", "--top_k", "1", "--max_completion_length", "8", "--log_completions", "true"),
    # Completions alone, each prompt by the teacher of its set.
    "asked": ("--lmbda", "1", "--max_completion_length", "8", "--max_length", "64"),
    "nobody": ("--lmbda", "0"),
    "tagged": ("--lmbda", "0.5", "--max_completion_length", "8", "--teacher_tag_key", "whose"),
}  # fmt: skip
# layout -> (ranks, flags)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2": (2, ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true")),
    "pp2": (2, ("--pipeline_model_parallel_size", "2")),
    "cp2": (2, ("--context_parallel_size", "2", "--cp_comm_type", "p2p")),
    "dp2 packed": (2, ("--packing", "true")),
}
OTHERS = [
    ("rows", "tp2"),
    ("rows", "pp2"),
    ("rows", "cp2"),
    ("written", "tp2"),
    ("tagged", "cp2"),
    ("tagged", "pp2"),
    ("asked", "dp2 packed"),
]


@cache
def folder() -> Path:
    """A student, two teachers, and rows which say whose they are: in a column, and by their files."""
    folder = temporary_folder()
    _, data = make_tiny_run(folder, rows=ROWS)
    for name, model in TEACHERS.items():
        make_tiny_run(folder / name, rows=1, name=model)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    tagged = [{**row, "whose": "second" if number % 3 else "first"} for number, row in enumerate(rows)]
    for file, own in (
        ("rows", tagged),
        *((name, [row for row in tagged if row["whose"] == name]) for name in TEACHERS),
    ):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


@contextmanager
def teachers() -> Iterator[list[TeacherServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(served(folder() / name / "model")) for name in TEACHERS]


def flags(training: str, layout: str, teacher: tuple[str, ...]) -> list[str]:
    files = [str(folder() / f"{name}.jsonl") for name in (TEACHERS if training == "asked" else ("rows",))]
    return [
        "--rlhf_type", "gkd", "--model", str(folder() / "model"), "--dataset", *files, "--output_dir",
        str(folder() / f"{training} {layout} {teacher[0]}"), "--gkd_logits_topk", str(TOP_K), "--train_iters", str(STEPS),
        "--global_batch_size", "4", "--micro_batch_size", "2", "--learning_rate", "1e-2", "--adam_eps", "1e-3", "--seed", "12",
        "--lr_decay_style", "constant", "--save_steps", str(STEPS), "--save_safetensors", "false", "--logging_steps", "1",
        "--report_to", "none", *TRAININGS[training], *LAYOUTS[layout][1], *teacher,
    ]  # fmt: skip


def figures(training: str, layout: str, where: str) -> list[dict[str, Any]]:
    file = folder() / f"{training} {layout} {where}" / "logging.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


IN_MEMORY, BEHIND_HTTP = "--teacher_model", "--teacher_model_server"


@cache
def trained(ranks: int) -> dict[tuple[str, str], list[list[list[int]]]]:
    """Make every run of so many ranks; return which documents each teacher was asked about in each."""
    in_memory = (IN_MEMORY, str(folder() / "first" / "model"))
    if ranks == 1:
        cases = [("rows", "one"), ("written", "one")]
        run_distributed(train_all, 1, [parse_run("rlhf", flags(*case, in_memory)) for case in cases])
    asked = {}
    for training, layout in [*((training, "one") for training in TRAININGS if training != "nobody"), *OTHERS]:
        if LAYOUTS[layout][0] != ranks:
            continue
        with teachers() as found:
            url: str = found[0].url
            if training in ("tagged", "asked"):
                url = json.dumps(
                    [
                        {
                            "url": one.url,
                            "tags": [tag if training == "tagged" else str(folder() / f"{tag}.jsonl")],
                        }
                        for one, tag in zip(found, TEACHERS, strict=True)
                    ]
                )
            run = parse_run("rlhf", flags(training, layout, (BEHIND_HTTP, url)))
            run_distributed(train_all, ranks, [run])
            asked[training, layout] = [one.documents for one in found]
    return asked


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            tolerance = NORM_TOLERANCE if name == "grad_norm" else LOSS_TOLERANCE
            assert line[name] == pytest.approx(value, rel=tolerance), name


@pytest.mark.slow
@pytest.mark.parametrize("training", ["rows", "written"])
def test_a_teacher_behind_http_teaches_what_it_teaches_in_memory(training: str) -> None:
    """Losses, gradients' norms, validations, and what it writes itself."""
    trained(1)
    expected = figures(training, "one", IN_MEMORY)
    same(figures(training, "one", BEHIND_HTTP), expected)
    assert training != "rows" or (
        expected[-1]["eval_loss"] and expected[-2]["loss"] < 0.9 * expected[0]["loss"]
    )
    assert training != "written" or {line["on_policy"] for line in expected} == {0.0, 1.0}, (
        "choose another seed"
    )
    if training == "written":
        mine, theirs = (
            (folder() / f"written one {where}" / "completions.jsonl").read_text()
            for where in (BEHIND_HTTP, IN_MEMORY)
        )
        assert mine == theirs and '"teacher"' in mine and '"student"' in mine


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize(("training", "layout"), OTHERS)
def test_layout_learns_like_one_rank_and_asks_about_each_document_once(training: str, layout: str) -> None:
    asked, one = trained(2)[training, layout], trained(1)[training, "one"]
    same(figures(training, layout, BEHIND_HTTP), figures(training, "one", BEHIND_HTTP))
    assert [sorted(documents) for documents in asked] == [sorted(documents) for documents in one]


@pytest.mark.slow
@pytest.mark.parametrize("training", ["tagged", "asked"])
def test_several_teachers_share_out_the_rows_and_the_completions_of_their_prompts(training: str) -> None:
    first, second = trained(1)[training, "one"]
    assert len(first) + len(second) == 4 * STEPS and 0 < len(first) < len(second)
    assert not {tuple(ids[:6]) for ids in first} & {tuple(ids[:6]) for ids in second}
    own = {line["on_policy"] for line in figures(training, "one", BEHIND_HTTP)}
    assert own == ({0.0, 1.0} if training == "tagged" else {1.0})


def complaint(rank: int, world_size: int, words: list[str]) -> str:
    """Return what a run ends with on this rank."""
    try:
        train_in_world(parse_run("rlhf", words), select_platform("cpu"))
    except UserError as error:
        return str(error)
    except SystemExit as error:
        return f"exit code {error.code}"
    return "nothing"


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_where_nobody_answers_all_ranks_end_and_one_says_why() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    words = [*flags("nobody", "tp2", (BEHIND_HTTP, url)), "--vllm_server_timeout", "1"]
    first, second = run_distributed(complaint, 2, words)
    assert first.startswith(f"no vLLM server answers at {url} after vllm_server_timeout=1 s")
    assert second == "exit code 2"


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_where_a_teacher_leaves_all_ranks_end_and_one_says_why() -> None:
    with served(
        folder() / "first" / "model", patience=7
    ) as server:  # each rank's first look, then one step and a part
        found = run_distributed(complaint, 2, flags("nobody", "cp2", (BEHIND_HTTP, server.url)))
    assert len(server.documents) == 5
    assert sorted(one.startswith("exit code 2") for one in found) == [False, True]
    assert any(
        re.search(r"refuses /v1/completions: 500 .*EngineCore died.*Its own log says more", one)
        for one in found
    )
