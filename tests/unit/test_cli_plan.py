"""`megaswift plan`: tables, JSON, the picture, and errors that say what would work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megaswift.cli.main import main
from tests.harness.planning import CONFIGS

LLAMA = str(CONFIGS / "llama-3.1-8b.json")
QWEN_MOE = str(CONFIGS / "qwen3-235b-a22b.json")
USUAL = ["--max_length", "4096", "--global_batch_size", "128"]


def run_plan(*words: str) -> int:
    """Run the command."""
    return main(["plan", *words])


def test_the_table_names_the_best_plan_and_why_others_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan("--model", QWEN_MOE, "--gpu", "H100-80G", "--num_gpus", "64", *USUAL) == 0
    out = capsys.readouterr().out
    for words in (
        "plans that fit, best first",
        "optimizer state",
        "pipeline bubble",
        "why the others lost",
        "tp = ",
        "% slower",
        "FlashAttention-3",
        "megaswift sft --model",
        "--expert_model_parallel_size",
    ):
        assert words in out


def test_json_holds_plans_reasons_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan("--model", LLAMA, "--gpu", "A100-80G", "--num_gpus", "16", "--json", *USUAL) == 0
    answer = json.loads(capsys.readouterr().out)
    best = answer["plans"][0]
    assert best["fits"] and best["memory_bytes"]["total"] <= answer["memory_limit_bytes"]
    assert best["step_time_s"]["total"] == pytest.approx(
        sum(value for name, value in best["step_time_s"].items() if name != "total")
    )
    assert best["flags"]["global_batch_size"] == "128"
    assert answer["machine"]["num_devices"] == 16
    assert {"axis", "value", "text"} == set(answer["others"][0])


def test_the_printed_flags_are_accepted_by_sft(capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(
        "--model", LLAMA, "--gpu", "H100", "--num_gpus", "8", "--context_parallel_size", "1", "--json", *USUAL
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["plans"][0]["refused"] is None


def test_given_axes_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    run_plan("--model", LLAMA, "--gpu", "H100", "--num_gpus", "8", "--tp", "2", "--pp", "2", "--json", *USUAL)
    answer = json.loads(capsys.readouterr().out)
    assert all(plan["candidate"]["layout"]["tp"] == 2 for plan in answer["plans"])
    assert all(plan["candidate"]["layout"]["pp"] == 2 for plan in answer["plans"])


def test_what_nobody_said_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan("--model", str(CONFIGS / "qwen3-0.6b.json"), "--gpu", "H100", "--num_gpus", "8") == 0
    out = capsys.readouterr().out
    assert "assumed: max_length=40960" in out and "assumed: global_batch_size=16" in out


def test_lora_on_one_card_and_a_processor_alone_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--max_length", "1024", "--global_batch_size", "8", "--json"]
    assert (
        run_plan("--model", LLAMA, "--gpu", "RTX4090", "--num_gpus", "1", "--train_type", "lora", *words) == 0
    )
    card = json.loads(capsys.readouterr().out)
    assert card["job"]["trained"] == "lora"
    small = str(CONFIGS / "qwen3-0.6b.json")
    assert run_plan("--model", small, "--gpu", "cpu", "--num_gpus", "1", *words) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["candidate"]["precision"] == "fp32"


def test_the_best_of_all_precisions_is_faster(capsys: pytest.CaptureFixture[str]) -> None:
    times = []
    for precision in ("bf16", "best"):
        run_plan(
            "--model", LLAMA, "--gpu", "B200", "--num_gpus", "8", "--precision", precision, "--json", *USUAL
        )
        answer = json.loads(capsys.readouterr().out)
        times.append(answer["plans"][0]["step_time_s"]["total"])
    assert times[1] < times[0]
    assert {plan["candidate"]["precision"] for plan in answer["plans"]} <= {"bf16", "fp8", "mxfp8"}
    assert answer["plans"][0]["refused"] is None  # nvfp4 would be faster, and no run has it


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_drawn(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture is optional: pip install matplotlib")
    path = tmp_path / f"plan{suffix}"
    words = ["--pipeline_model_parallel_size", "4", "--plot", str(path), "--json"]
    assert run_plan("--model", LLAMA, "--gpu", "A100-40G", "--num_gpus", "16", *words, *USUAL) == 0
    assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "H100"], "model is missing"),
        (["--model", "nowhere.json", "--gpu", "H100"], "nowhere.json cannot be read"),
        (["--model", LLAMA, "--gpu", "X100"], "gpu=X100 is not in the catalogue"),
        (["--model", LLAMA, "--gpu", "H100", "--num_gpus", "0"], "num_gpus=0 is too small"),
        (["--model", LLAMA, "--gpu", "H100", "--num_gpus", "12"], "not a multiple of 8"),
        (["--model", LLAMA, "--gpu", "A100", "--precision", "fp8", *USUAL], "fp8 is not one that A100-80G"),
        (
            ["--model", LLAMA, "--gpu", "H100", "--num_gpus", "8", "--tp", "3", *USUAL],
            "Choose tp from 1, 2, 4, 8",
        ),
        (["--model", LLAMA, "--gpu", "H100", "--max_length", "0"], "max_length=0 is not a length"),
        (["--model", LLAMA, "--gpu", "H100", "--precision", "int4"], "precision=int4"),
        (
            ["--model", LLAMA, "--gpu", "RTX4090", "--num_gpus", "1", *USUAL],
            "What would work: .*--train_type lora",
        ),
        (
            ["--model", str(CONFIGS / "llama-3.1-405b.json"), "--gpu", "H100", "--num_gpus", "8", *USUAL],
            "What would work: .*devices",
        ),
        (["--model", LLAMA, "--gpu", "H100", "--plot", "plan.gif", *USUAL], "plot=plan.gif is not a picture"),
    ],
)
def test_wrong_input_is_one_error_that_says_what_would_work(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_plan(*words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") == 1
    import re

    assert re.search(message, error)


def test_a_partition_without_slurm_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert run_plan("--model", LLAMA, "--partition", "gpu") == 2
    assert "sinfo is not found" in capsys.readouterr().err


def test_help_lists_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan("--help") == 0
    out = capsys.readouterr().out
    assert all(
        flag in out for flag in ("--gpu", "--num_gpus", "--partition", "--plot", "--json", "--precision")
    )


@pytest.mark.parametrize("words", [["--help"], ["--model", LLAMA, "--gpu", "H100", "--json", *USUAL]])
def test_planning_loads_neither_torch_nor_megatron(words: list[str]) -> None:
    program = (
        "import sys; from megaswift.cli.main import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'megatron', 'numpy', 'rich', 'matplotlib'} & set(sys.modules); "
        "assert code == 0 and not heavy, (code, heavy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
