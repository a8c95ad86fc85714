"""Completions by transformers in batches: a row's own, whatever the other rows are."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megaswift.rollout.engine import Sampling
from megaswift.rollout.generate import chances, complete
from tests.harness.tiny import save_tiny
from tests.harness.training import temporary_folder

PROMPTS = [np.array(ids, np.int32) for ids in ([5, 6, 7, 8, 9, 5, 6], [11], [20, 21, 22])]
LONGEST = 12


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(
        save_tiny("llama", temporary_folder()), dtype=torch.float32
    ).eval()


def greedy(prompts: list[np.ndarray], penalty: float) -> list[list[int]]:
    sampling = Sampling(
        temperature=0.7, top_p=1.0, top_k=1, max_tokens=LONGEST, stop_ids=(), repetition_penalty=penalty
    )
    draws = [chances((number,), length=LONGEST) for number in range(len(prompts))]
    return complete(model(), prompts, draws, sampling, pad_id=0)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 5.0])
def test_repeated_tokens_are_penalised_as_transformers_does_it_for_one_row(penalty: float) -> None:
    expected = [
        model().generate(
            torch.tensor([prompt.tolist()]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=LONGEST,
            repetition_penalty=penalty, eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]  # fmt: skip
    assert greedy(PROMPTS, penalty) == expected
    assert penalty == 1 or expected != greedy(PROMPTS, 1.0), "the penalty must bite"


def test_a_penalised_row_is_the_same_alone_and_beside_longer_ones() -> None:
    together = greedy(PROMPTS, 1.3)
    assert [greedy([prompt], 1.3)[0] for prompt in PROMPTS] == together
