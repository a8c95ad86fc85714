"""`megaswift rehearse` as a user types it: processes, pipeline, data, checkpoint and export of a layout for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.tiny_run import make_tiny_run

pytestmark = [pytest.mark.slow, pytest.mark.ranks(2)]


def test_a_layout_for_gpus_is_rehearsed_on_processors(tmp_path: Path) -> None:
    model, rows = make_tiny_run(tmp_path)
    flags = f"--model {model} --dataset {rows} --max_length 64 --torch_dtype bfloat16 --tp 1 --output_dir out"
    done = subprocess.run(
        [sys.executable, "-m", "megaswift.cli.main", "rehearse", "sft", *flags.split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "dp=2" in done.stderr and "step 2/2" in done.stderr
    assert "rehearsed: 2 ranks trained, saved and exported" in done.stderr
    assert not (tmp_path / "out").exists()
