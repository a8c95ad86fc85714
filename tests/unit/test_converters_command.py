"""`megaswift convert`: both ways, without torch, and with one clear error for what cannot be done."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megaswift.cli.main import main
from tests.harness.conversions import saved, tensors_of


def test_conversion_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys; from megaswift.cli.main import main; assert main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    for source, to in ((saved("mixtral"), "mcore"), (tmp_path / "mcore", "hf")):
        argv = ["convert", "--model", str(source), "--to", to, "--output_dir", str(tmp_path / to)]
        subprocess.run([sys.executable, "-c", code, *argv], check=True)


def test_command_line_converts_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "convert",
                "--model",
                str(saved("qwen3_moe")),
                "--to",
                "mcore",
                "--output_dir",
                "mcore",
                "--tp",
                "2",
                "--ep",
                "2",
            ]
        )
        == 0
    )
    assert (
        main(["convert", "--model", "mcore", "--to", "hf", "--output_dir", "hf", "--max_shard_size", "50KB"])
        == 0
    )
    before, after = tensors_of(saved("qwen3_moe")), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_dry_run_needs_a_config_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = saved("qwen3_moe") / "config.json"
    assert main(["convert", "--model", str(config), "--dry_run", "--tp", "2", "--pp", "2", "--ep", "4"]) == 0
    assert "tp=2 pp=2 ep=4" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--to", "mcore"], "model is missing"),
        (["--model", "{model}"], "to and output_dir are needed"),
        (["--model", "{model}", "--to", "mcore", "--output_dir", "out", "--spam", "1"], "spam is not a flag"),
        (["--model", "{model}", "--to", "mcore", "--output_dir", "{model}"], "is read from"),
        (["--model", "{model}/config.json", "--to", "mcore", "--output_dir", "out"], "is a file"),
        (["--model", ".", "--to", "hf", "--output_dir", "out"], "hf_model"),
        (["--model", "{model}", "--to", "hf", "--output_dir", "out"], "no torch_dist checkpoint"),
        (["--model", "{model}", "--dry_run", "--tp", "7", "--etp", "7"], "etp=7 does not cut"),
        (["--model", "{model}", "--dry_run", "--ep", "3"], "ep=3 does not divide num_experts=4"),
        (
            ["--model", "{model}", "--to", "mcore", "--output_dir", "out", "--max_shard_size", "big"],
            "max_shard_size=big",
        ),
    ],
)
def test_bad_requests_are_user_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *(word.format(model=saved("qwen3_moe")) for word in argv)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_gap_in_the_files_stops_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved("mixtral"), folder)
    from safetensors.torch import save_file

    tensors = tensors_of(folder)
    tensors.pop("model.layers.2.block_sparse_moe.experts.3.w2.weight")
    save_file(tensors, folder / "model.safetensors")
    assert main(["convert", "--model", str(folder), "--dry_run"]) == 2
    assert "missing: model.layers.2.block_sparse_moe.experts.3.w2.weight" in capsys.readouterr().err
