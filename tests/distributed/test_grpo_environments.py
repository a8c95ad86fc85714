"""Environments in whole runs: what they began with, said and gave is what completions.jsonl and the figures tell.

Layouts are compared with one rank, and a resumed run with the whole, in test_grpo_runs.py.
"""

import json
import re
import statistics

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megaswift.config.parse import parse_run
from megaswift.data.tokenizer import load_tokenizer
from megaswift.rollout.engine import Sampling
from megaswift.rollout.generate import chances, complete
from tests.distributed.test_grpo_failures import failure
from tests.distributed.test_grpo_runs import PLUGIN, SEED, figures, flags, folder, table
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed


@pytest.mark.slow
def test_conversations_and_rewards_are_those_of_the_environments() -> None:
    rows, lines = table("games", "one", "completions.jsonl"), figures("games", "one")
    given = [json.loads(line) for line in (folder() / "prompts.jsonl").read_text().splitlines()]
    assert {len(row["turns"]) for row in rows} > {1, 3}, "some conversations end at once, some go on"
    curt = 0
    for row in rows:
        own = given[int(row["source"].rpartition(":")[2]) - 1]
        left, is_curt = own["env_config"]["letters"], "name" in own["env_config"]
        curt += is_curt
        first = [{"role": "system", "content": "Go"}] * (left > 1) + [
            {"role": "user", "content": f"{left} e"}
        ]
        assert row["prompt"] == (own["messages"][:1] if is_curt else first)
        assert row["environment"]["infos"][0] == (None if is_curt else {"goal": own["goal"]})
        answers = [turn["content"] for turn in row["turns"] if turn["role"] == "assistant"]
        found = [text.count("e") for text in answers]
        assert row["environment"]["infos"][1:] == [{"found": number} for number in found]
        assert row["environment"]["step_rewards"] == [0.5 * number - 0.25 for number in found]
        assert row["rewards"]["gym_reward"] == sum(row["environment"]["step_rewards"])
        said = [turn["content"] for turn in row["turns"] if turn["role"] == "user"]
        assert said == [f"{left - sum(found[: number + 1])} more" for number in range(len(answers) - 1)]
        assert row["environment"]["gym_done"] == (sum(found) >= left)
    assert 0 < curt < len(rows), "rows of both environments"
    for number, line in enumerate(lines):
        own = rows[number // 2 * 8 :][:8]
        total = [
            row["rewards"]["near"] + 0.5 * row["rewards"]["brief"] + 2 * row["rewards"]["gym_reward"]
            for row in own
        ]
        assert line["reward"] == pytest.approx(statistics.mean(total))
        assert line["rewards/gym_reward/mean"] == pytest.approx(
            statistics.mean(row["rewards"]["gym_reward"] for row in own)
        )
        assert line["loss_tokens"] == sum(row["tokens"] for row in own)


@pytest.mark.slow
def test_what_an_environment_begins_with_is_what_the_model_answers() -> None:
    """The first answers are what transformers samples to the first messages in the table."""
    rows = table("games", "one", "completions.jsonl")[:8]
    model = AutoModelForCausalLM.from_pretrained(folder() / "model", dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder() / "model")
    prompts = [
        np.array(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True).input_ids)
        for row in rows
    ]
    draws = [chances((SEED, place // 4, place % 4), length=10) for place in range(8)]
    sampling = Sampling(temperature=0.9, top_p=1, top_k=-1, max_tokens=10, stop_ids=(2, *range(20, 50)))
    ids = complete(model, prompts, draws, sampling, pad_id=0)
    found = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert found == [row["turns"][0]["content"] for row in rows]


def alone(output: str, plugin: str) -> list[str]:
    """Return flags of a run on two ranks that environments alone reward."""
    (folder() / f"{output}.py").write_text(plugin)
    words = flags("games", "dp2", output=output)
    words[words.index("--external_plugins") + 1] = str(folder() / f"{output}.py")
    for name, values in (("--reward_funcs", 2), ("--reward_weights", 3)):
        start = words.index(name)
        del words[start : start + 1 + values]
    return words


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_environments_alone_are_enough() -> None:
    run_distributed(train_all, 2, [parse_run("rlhf", alone("alone", PLUGIN))])
    rows = [json.loads(line) for line in (folder() / "alone" / "completions.jsonl").read_text().splitlines()]
    for start in range(0, len(rows), 4):
        group = [row["environment"]["total_reward"] for row in rows[start : start + 4]]
        spread = statistics.stdev(group)
        for row, reward in zip(rows[start : start + 4], group, strict=True):
            assert row["rewards"] == {"gym_reward": reward}
            expected = (reward - statistics.mean(group)) / (spread + 1e-4)
            assert row["advantage"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert any(row["advantage"] for row in rows)


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("output", "old", "new", "message"),
    [
        ("divided", "self.left -= found", "self.left /= 0",
         r"gym_env=(Letters|Curt) fails at .*prompts.jsonl:\d+ in step: ZeroDivisionError: "),
        ("renamed", "class Curt", "class Court", r"env_config at .*prompts.jsonl:4 names Curt, which is no environment"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_told_once_and_ends_the_run(output: str, old: str, new: str, message: str) -> None:
    found = run_distributed(failure, 2, alone(output, PLUGIN.replace(old, new)))
    assert "exit code 2" in found
    assert [bool(re.match(message, text)) for text in found].count(True) == 1
    assert not list((folder() / output).glob("checkpoint-*"))
