"""Every Triton kernel compiles for A100, H100 and B200, and none spills registers."""

import json
import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest

import megaswift.kernels


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.harness.compile_kernels", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.stdout.startswith("["), done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_no_kernel_spills_on_any_architecture(rows: list[dict[str, Any]]) -> None:
    assert {row["architecture"] for row in rows} == {80, 90, 100}
    assert [row for row in rows if row["spill_bytes"] or row["stack_bytes"]] == []
    assert all(0 < row["registers"] <= 255 for row in rows)
    assert all(
        row["shared_bytes"] <= 48 * 1024 for row in rows
    )  # what a block may use without asking for more


@pytest.mark.slow
def test_every_kernel_is_in_the_table(rows: list[dict[str, Any]]) -> None:
    kernels = set()
    for package in pkgutil.iter_modules(megaswift.kernels.__path__, "megaswift.kernels."):
        if package.ispkg and any(
            module.name == "kernel" for module in pkgutil.iter_modules(import_module(package.name).__path__)
        ):
            names = vars(import_module(f"{package.name}.kernel"))
            kernels |= {name for name in names if name.endswith("_kernel")}
    assert kernels and kernels == {row["kernel"] for row in rows}
