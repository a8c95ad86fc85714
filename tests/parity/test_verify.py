"""`megaswift convert --verify`: what it says, and its exit code."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from megaswift.cli.main import main
from megaswift.converters.tables.catalogue import TABLES
from tests.harness.distributed import run_distributed
from tests.harness.planning import CONFIGS
from tests.harness.tiny import save_tiny


def verified(rank: int, world_size: int, model: Path, arguments: list[str], mistake: bool) -> tuple[int, str]:
    """Run the command in this rank's process; return its exit code and what it writes."""
    dist.destroy_process_group()  # the command makes a world of its own
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        if mistake:
            table = TABLES["llama"]
            rows = (replace(row, file=row.file.replace("{gate,up}", "{up,gate}")) for row in table.rows)
            patch.setitem(TABLES, "llama", replace(table, rows=tuple(rows)))
        with contextlib.redirect_stderr(said):
            code = main(["convert", "--model", str(model), "--verify", *arguments])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return code, said.getvalue()


@pytest.mark.parametrize("name", ["deepseek-v3", "gemma-4-26b-a4b-text", "gpt-oss-120b", "kimi-k2", "mimo-7b", "qwen3-next-80b-a3b"])
def test_a_published_config_passes(name: str) -> None:
    [(code, text)] = run_distributed(verified, 1, CONFIGS / f"{name}.json", [], False)
    assert code == 0, text
    assert "every gradient within 1e-04; torch_dist and back is bit-identical: pass\n" in text
    if name in (
        "kimi-k2",
        "mimo-7b",
    ):  # transformers has no class for them: it is said what they were compared with
        assert "against transformers' deepseek_v3" in text or "against transformers' qwen2" in text


def test_a_mistake_fails_and_is_named(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    assert run_distributed(verified, 1, folder, [], False)[0][0] == 0
    [(code, text)] = run_distributed(verified, 1, folder, [], True)
    assert code == 1
    assert "logits differ by" in text and "gradient of model.layers.0.mlp.gate_proj.weight differs by" in text
    assert text.endswith("the sides differ: fail\n")


def test_nothing_is_converted_after_a_failure(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    arguments = ["--to", "mcore", "--output_dir", str(tmp_path / "out")]
    assert run_distributed(verified, 1, folder, arguments, True)[0][0] == 1
    assert not (tmp_path / "out").exists()
    assert run_distributed(verified, 1, folder, arguments, False)[0][0] == 0
    assert (tmp_path / "out" / "conversion.json").is_file()


def test_a_folder_whose_weights_do_not_fit_is_refused_first(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    [(code, text)] = run_distributed(verified, 1, folder, [], False)
    assert code == 2 and "missing: model.layers.0.self_attn.q_proj.bias" in text
