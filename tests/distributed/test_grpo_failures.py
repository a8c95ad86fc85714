"""Runs of `megaswift rlhf --rlhf_type grpo` that cannot go well end with one message."""

import re
from pathlib import Path

import pytest

from megaswift.config.parse import parse_run
from megaswift.errors import UserError
from tests.distributed.test_grpo_runs import flags, folder
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed

LATE = """
import torch.distributed as dist


def late(completions, **columns):
    return [1 / (1 - dist.get_rank()) for _ in completions]
"""


def failure(rank: int, world_size: int, words: list[str]) -> str:
    """Return how a run ends that cannot go well."""
    try:
        train_all(rank, world_size, [parse_run("rlhf", words)])
    except UserError as error:
        return str(error)
    except SystemExit as left:
        return f"exit code {left.code}"
    return "nothing was wrong"


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize("where", ["everywhere", "on the last rank"])
def test_reward_that_fails_names_the_function_and_the_row_once(where: str, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    words, reward = (
        flags("grpo", "dp2", output=f"broken {where}"),
        {"everywhere": "broken"}.get(where, "late"),
    )
    words[words.index("near")] = reward
    words.insert(words.index("--external_plugins") + 1, str(tmp_path / "late.py"))
    found = sorted(run_distributed(failure, 2, words))
    assert found[0] == "exit code 2"
    assert re.match(rf"reward_funcs={reward} fails at .*prompts.jsonl:\d+: ZeroDivisionError: ", found[1])
    assert not list((folder() / f"broken {where}").glob("checkpoint-*"))
