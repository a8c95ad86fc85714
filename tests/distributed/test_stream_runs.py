"""Whole runs on rows that are read while training: a checkpoint of two ranks is gone on from by one."""

import gc
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallel

from megaswift.config.parse import parse_run
from megaswift.data import windows
from megaswift.mcore import process_groups
from megaswift.platforms.platform import select_platform
from megaswift.training.run import train_in_world
from tests.harness.distributed import run_distributed
from tests.harness.tiny_run import make_tiny_run


def train(rank: int, world_size: int, words: list[str]) -> None:
    def threads(processes: int, context: Any, *, initializer: Any, initargs: Any) -> ThreadPoolExecutor:
        windows._recipe = initargs[
            0
        ]  # the harness's ranks may not start processes; tests/unit/test_data_stream.py does
        return ThreadPoolExecutor(processes)

    def stat(path: Path, **how: Any) -> Any:
        if rank and str(path) == rows:
            raise FileNotFoundError(f"{path} is on the disk of rank 0 alone")
        return stat_of(path, **how)

    rows, stat_of = words[words.index("--dataset") + 1], Path.stat
    whole = windows.ProcessPoolExecutor
    Path.stat = stat  # type: ignore[method-assign,assignment]  # for this run
    windows.ProcessPoolExecutor = threads  # type: ignore[misc,assignment]  # for this run
    windows._kitchen.cache_clear()
    try:
        train_in_world(parse_run("sft", words), select_platform("cpu"))
    finally:
        windows.ProcessPoolExecutor = whole  # type: ignore[misc]
        Path.stat = stat_of  # type: ignore[method-assign]
    for found in gc.get_objects():  # see prepared() in tests/harness/training.py
        if isinstance(found, DistributedDataParallel):
            vars(found).clear()
    process_groups.destroy()


@pytest.mark.ranks(2)
def test_a_stream_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    model, rows = make_tiny_run(tmp_path)
    words = [
        "--model", str(model), "--dataset", str(rows), "--output_dir", str(tmp_path / "out"), "--train_iters", "6",
        "--global_batch_size", "4", "--learning_rate", "1e-3", "--lr_decay_style", "constant", "--save_steps", "3",
        "--report_to", "none", "--verbose", "true", "--save_safetensors", "false", "--streaming", "true",
        "--shuffle_buffer_size", "16", "--packing", "true", "--max_length", "64",
    ]  # fmt: skip

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "out" / "logging.jsonl").read_text().splitlines()]

    run_distributed(train, 2, words)
    expected = lines()
    assert [line["step"] for line in expected] == list(range(1, 7))
    assert not (tmp_path / "out" / ".tokenised").exists()
    (tmp_path / "out" / "checkpoint-6" / "manifest.json").unlink()
    run_distributed(train, 1, words)
    found = lines()
    assert [line["sample_ids"] for line in found] == [line["sample_ids"] for line in expected]
    losses = [line["loss"] for line in found]
    assert losses == pytest.approx([line["loss"] for line in expected], rel=1e-5)  # sums in another order
    assert losses[3:] != [line["loss"] for line in expected[3:]], "nothing was trained again"
