"""torchrun across two hosts, which are network namespaces of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.hosts import VirtualHosts, why_no_hosts
from tests.harness.tiny_run import make_tiny_run

pytestmark = [
    pytest.mark.alone,
    pytest.mark.slow,
    pytest.mark.ranks(4),
    pytest.mark.skipif(why_no_hosts() is not None, reason=f"no virtual hosts: {why_no_hosts()}"),
]
LIMIT_S = 400


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "logging.jsonl").read_text().splitlines()]


def test_torchrun_trains_across_two_hosts_as_on_one(tmp_path: Path) -> None:
    model, rows = make_tiny_run(tmp_path)
    flags = f"--model {model} --dataset {rows} --max_length 64 --global_batch_size 4 --train_iters 3 --tp 2"
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environ = {**kept, "OMP_NUM_THREADS": "1"}
    rendezvous = "--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-id=1 --rdzv-endpoint=node1:29400"
    torchrun = f"{sys.executable} -m torch.distributed.run {rendezvous} -m megaswift.cli.main sft {flags} --output_dir two"
    with VirtualHosts(2, folder=tmp_path) as hosts:
        agents = [
            subprocess.Popen(
                hosts.on(number, torchrun),
                cwd=tmp_path,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in (1, 2)
        ]
        try:
            outputs = [agent.communicate(timeout=LIMIT_S)[0] for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    one = [sys.executable, "-m", "megaswift.cli.main", "sft", *flags.split(), "--output_dir", "one"]
    subprocess.run(one, cwd=tmp_path, env=environ, check=True, capture_output=True, timeout=LIMIT_S)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    assert len(losses(tmp_path / "two")) == 3
