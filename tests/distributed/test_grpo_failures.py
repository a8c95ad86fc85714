"""Runs of `megaswift rlhf --rlhf_type grpo` that cannot go well end with one message."""

import re

import pytest

from megaswift.config.parse import parse_run
from megaswift.errors import UserError
from tests.distributed.test_grpo_runs import flags, folder
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed


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
def test_reward_that_fails_names_the_function_and_the_row_once() -> None:
    words = flags("grpo", "dp2", output="broken")
    words[words.index("near")] = "broken"
    found = sorted(run_distributed(failure, 2, words))
    assert found[0] == "exit code 2"
    assert re.match(r"reward_funcs=broken fails at .*prompts.jsonl:\d+: ZeroDivisionError: ", found[1])
    assert not list((folder() / "broken").glob("checkpoint-*"))
