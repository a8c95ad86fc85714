"""The command line: help without torch, messages, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megaswift.cli import main as cli
from megaswift.cli.main import COMMANDS, main
from megaswift.config.field import declared
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError
from megaswift.launch.failure import read_failures

HEAVY = ("torch", "transformers", "datasets", "megatron", "numpy", "huggingface_hub")

TINY_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def test_half_a_set_of_rank_variables_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["sfft"]) == 2
    assert main(["sft", "--model", "m", "--dataset", "d"]) == 2
    told = capsys.readouterr().err
    assert "sfft is not a command" in told and "RANK or WORLD_SIZE is set but" in told


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a config.json and nothing else."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    return str(folder)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["sft", "--help"],
        ["pt", "--help"],
        ["rlhf", "--help"],
        ["models"],
        ["doctor", "--help"],
    ],
)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom megaswift.cli.main import main\n"
        f"code = main({words!r})\nheavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_preflight_loads_nothing_heavy(model: str) -> None:
    code = (
        "import sys\nfrom megaswift.cli.main import main\n"
        f"code = main(['sft', '--model', {model!r}, '--dataset', 'x', '--tp', '5'])\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\nsys.exit(f'loaded {{heavy}}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr == "error: tp=5 does not divide ffn_hidden_size=96 (tiny). Choose tp from 1, 2, 3, 4.\n"
    )


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--help"]) == 0
    out = capsys.readouterr().out
    for setting in declared(RunConfig).values():
        assert f"  --{setting.flag} " in out
    assert "default: 500" in out and "--learning_rate" in out and "full|lora" in out


def test_help_of_pre_training_shows_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pt", "--help"]) == 0
    assert "(default: all)" in " ".join(capsys.readouterr().out.split())  # lines are wrapped


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sff"], "error: sff is not a command. Did you mean sft?"),
        (["sft"], "error: model is not set."),
        (["sft", "--lerning_rate", "1"], "error: lerning_rate is not a flag."),
        (["sft", "--model", "/nowhere/at/all", "--dataset", "x"], "/nowhere/at/all"),
        (["models", "--all"], "error: megaswift models takes one model"),
    ],
)
def test_a_user_error_is_one_message_and_exit_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_an_error_of_ours_shows_its_traceback_and_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run", lambda argv: [][0])
    assert main([]) == 1
    assert "IndexError" in capsys.readouterr().err


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert main([]) == 130


def test_a_rank_of_torchrun_leaves_an_error_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(argv: list[str]) -> int:
        raise ConfigError("no.")

    file = tmp_path / "rank-3.json"
    monkeypatch.setattr(cli, "_run", fails)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert main([]) == 2
    assert capsys.readouterr().err == "[rank 3] error: no.\n"
    (failure,) = read_failures(tmp_path)
    assert failure.user_error and failure.message == "no." and failure.rank == 3
    assert json.loads(file.read_text())["message"]["message"] == "ConfigError: no."


def test_a_user_error_of_many_ranks_of_a_job_is_told_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(argv: list[str]) -> int:
        raise ConfigError("no.")

    monkeypatch.setattr(cli, "_run", fails)
    monkeypatch.setenv("MEGASWIFT_USER_ERROR", str(tmp_path / "user-error"))
    assert [main([]), main([])] == [2, 2]
    assert capsys.readouterr().err == "error: no.\n"
    assert (tmp_path / "user-error").read_text() == "no.\n"


def test_every_command_has_a_module() -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0


def test_models_tells_the_facts_of_one(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", model]) == 0
    out = capsys.readouterr().out
    assert "num_layers: 2" in out and "num_kv_heads: 2" in out and "template: none" in out


def test_models_lists_the_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "qwen3_moe" in capsys.readouterr().out


def test_doctor_finds_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "megatron-core" in capsys.readouterr().out
