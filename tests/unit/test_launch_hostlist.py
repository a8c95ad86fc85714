"""Slurm's host lists."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from megaswift.errors import LaunchError
from megaswift.launch.hostlist import expand_hostlist


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", "node1"),
        ("a,b", "a b"),
        ("node[1-3]", "node1 node2 node3"),
        ("node[08-10]", "node08 node09 node10"),
        ("node[01-03,7],gpu-a", "node01 node02 node03 node7 gpu-a"),
        ("a[1-2]b[3-4]", "a1b3 a1b4 a2b3 a2b4"),
        ("a[1-2]b[1-2]c[1-2]", "a1b1c1 a1b1c2 a2b1c1 a2b1c2 a1b2c1 a1b2c2 a2b2c1 a2b2c2"),
        ("a[1-2],a1", "a1 a2 a1"),
        ("n[9-011,009-10]", "n9 n10 n11 n009 n010"),
        ("n[9-11]", "n9 n10 n11"),
        ("", ""),
    ],
)
def test_lists_expand(text: str, hosts: str) -> None:
    assert expand_hostlist(text) == hosts.split()


@pytest.mark.parametrize(
    "text", ["a[1-2", "a1]", "a[2-1]", "a[x-y]", "a[]", "a[1-100000]", "a[1-1000]b[1-1000]", "a[1-2]b3"]
)
def test_what_is_no_list_is_an_error(text: str) -> None:
    with pytest.raises(LaunchError, match="host list"):
        expand_hostlist(text)


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="scontrol is not installed")
def test_200_drawn_lists_expand_as_scontrol_does(tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"  # scontrol wants one, and reads nothing from it here
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=n\nPartitionName=p Nodes=n\n")
    lists = [_draw(random.Random(seed)) for seed in range(200)]
    script = "\n".join(f"scontrol show hostnames '{one}'; echo" for one in lists)
    done = subprocess.run(
        ["sh", "-c", script],
        env={**os.environ, "SLURM_CONF": str(conf)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert [expand_hostlist(one) for one in lists] == [
        part.split() for part in done.stdout.split("\n\n")[:-1]
    ]


def _draw(random: random.Random) -> str:
    return ",".join(_draw_name(random) for _ in range(random.randint(1, 4)))


def _draw_name(random: random.Random) -> str:
    name = random.choice("abn") + random.choice(["", "-", "x.y-"])
    for _ in range(random.choice([0, 1, 1, 1, 2, 3])):
        ranges = []
        for _ in range(random.randint(1, 3)):
            first, width = random.randint(0, 120), random.randint(1, 4)
            last = first + random.randint(0, 12)
            ranges.append(f"{first:0{width}}" + random.choice(["", f"-{last}", f"-{last:0{width}}"]))
        name += random.choice(["", "r", "-ib"]) + f"[{','.join(ranges)}]"
    return name
