"""Reward models as reward functions: scores are those of transformers, one conversation at a time; what is no reward model is refused."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from megaswift.config.parse import parse_run
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError
from megaswift.rollout.reward_models import load_reward_models
from tests.harness.tiny_run import make_tiny_run, save_tiny_scorer
from tests.harness.training import temporary_folder

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
TALKS = [
    [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "no " * words}]
    for words in (1, 9, 4)
]


@cache
def folder() -> Path:
    """A policy, and a reward model beside it."""
    folder = temporary_folder()
    model, _ = make_tiny_run(folder, rows=1)
    save_tiny_scorer(model, folder / "rm")
    return folder


def run_of(*models: Path) -> RunConfig:
    words = [
        "--rlhf_type",
        "grpo",
        "--model",
        str(folder() / "model"),
        "--dataset",
        "d",
        "--reward_model",
        *map(str, models),
    ]
    return parse_run("rlhf", words)


@torch.no_grad()
def expected(talk: list[dict[str, Any]]) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder() / "rm", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder() / "rm").apply_chat_template(talk).input_ids
    return float(model(torch.tensor([ids])).logits[0, 0])


@pytest.mark.parametrize("knows_padding", [True, False])
def test_scores_are_those_of_each_conversation_alone(knows_padding: bool, tmp_path: Path) -> None:
    path = folder() / "rm"
    if not knows_padding:
        path = tmp_path / "rm"
        path.mkdir()
        for file in (folder() / "rm").iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    (model,) = load_reward_models(run_of(path), **CPU).values()
    found = model([""] * 3, TALKS)
    if knows_padding:  # the padding is the eos here, so that each is read from the token before
        assert found == pytest.approx([expected(talk) for talk in TALKS], abs=1e-6)
    assert len(set(found)) == 3


def test_models_are_named_by_their_number() -> None:
    path = folder() / "rm"
    assert list(load_reward_models(run_of(path), **CPU)) == ["reward_model"]
    assert list(load_reward_models(run_of(path, path), **CPU)) == ["reward_model_1", "reward_model_2"]


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has num_labels=2, and a reward is one number"):
        load_reward_models(run_of(folder() / "model"), **CPU)
    headless = AutoModelForCausalLM.from_pretrained(folder() / "model")
    headless.config.num_labels = 1
    headless.save_pretrained(tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"lacks score.weight, so its scores would be random"):
        load_reward_models(run_of(tmp_path / "lm"), **CPU)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ConfigError, match=r"adapter is not opened by transformers: .* merges an adapter"):
        load_reward_models(run_of(tmp_path / "adapter"), **CPU)
