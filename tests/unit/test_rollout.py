"""Completions as micro batches: packed or not they are the same, and every rank has as many."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from megaswift.data.batches import BatchSettings, MicroBatch
from megaswift.rollout.rollout import Rollout

LENGTHS = (9, 4, 12, 7, 5, 11, 6, 10)  # of prompts with completions
COMPLETIONS = 8


def rollout() -> Rollout:
    """Completions whose log-probability is the number of their token."""
    starts = np.cumsum([0, *LENGTHS])
    numbers = np.arange(starts[-1])
    return Rollout(
        position=0,
        group=2,
        input_ids=numbers.astype(np.int32),
        starts=starts,
        prompt_lengths=np.array(LENGTHS) // 2,
        stopped=np.ones(COMPLETIONS, bool),
        rewards=np.zeros((COMPLETIONS, 1)),
        advantages=np.arange(COMPLETIONS, dtype=np.float32),
        old_logps=numbers.astype(np.float32),
    )


def batches_of(settings: BatchSettings, dp: int) -> list[list[MicroBatch]]:
    return [
        list(rollout().micro_batches(settings, dp_rank=dp_rank, dp=dp, pad_id=0)) for dp_rank in range(dp)
    ]


@pytest.mark.parametrize(("dp", "round_size"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_packed_completions_are_each_there_once_with_what_belongs_to_them(dp: int, round_size: int) -> None:
    packed = BatchSettings(
        global_batch_size=COMPLETIONS,
        packing=True,
        packing_length=24,
        round_size=round_size,
        pad_to_multiple=4,
    )
    ranks = batches_of(packed, dp)
    assert len({len(batches) for batches in ranks}) == 1 and len(ranks[0]) % round_size == 0
    every = [batch for batches in ranks for batch in batches]
    assert sorted(entry for batch in every for entry in batch.sample_ids) == list(range(COMPLETIONS))
    assert len([batch for batch in every if batch.sample_ids]) < COMPLETIONS, "nothing was packed"
    for batch in every:
        assert batch.targets is not None and batch.old_logps is not None and batch.cu_seqlens is not None
        assert batch.targets.tolist() == list(batch.sample_ids)
        assert batch.input_ids.shape[1] % 4 == 0
        for begin, end in list(pairwise(batch.cu_seqlens.tolist()))[: len(batch.sample_ids)]:
            assert batch.old_logps[0, begin : end - 1].tolist() == batch.labels[0, begin : end - 1].tolist()


@pytest.mark.parametrize("packing", [{"packing": True, "packing_length": 24}, {"micro_batch_size": 2}])
def test_each_token_keeps_its_experts(packing: dict[str, Any]) -> None:
    """Padding has as many as a token needs."""
    numbers = np.arange(sum(LENGTHS))[:, None, None] + np.array([[0, 100], [50, 150]])
    whole = replace(rollout(), experts=numbers.astype(np.uint8))
    settings = BatchSettings(global_batch_size=COMPLETIONS, pad_to_multiple=4, **packing)
    padding = 0
    for batch in whole.micro_batches(settings, dp_rank=0, dp=1, pad_id=255):
        assert batch.experts is not None and batch.experts.shape == (*batch.input_ids.shape, 2, 2)
        for token, experts in zip(batch.input_ids[0].tolist(), batch.experts[0].tolist(), strict=True):
            is_padding = token == 255
            padding += is_padding
            assert experts == ([[0, 1]] * 2 if is_padding else numbers[token].astype(np.uint8).tolist())
    assert padding
    assert np.array_equal(np.concatenate([part.experts for part in whole.parts(3)]), whole.experts)


def test_parts_hold_all_completions_with_what_belongs_to_them() -> None:
    whole = replace(rollout(), own=np.arange(sum(LENGTHS)) % 3 > 0)
    parts = whole.parts(3)
    assert [len(part) for part in parts] == [3, 3, 2]
    for name in ("input_ids", "own", "old_logps", "prompt_lengths", "stopped", "rewards", "advantages"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(joined, getattr(whole, name)), name
    assert [part.starts.tolist() for part in parts] == [[0, 9, 13, 25], [0, 7, 12, 23], [0, 6, 16]]
    assert parts[1].lengths.tolist() == whole.lengths[3:6].tolist()
    assert parts[0].reference_logps is None


def test_what_was_left_over_is_an_empty_micro_batch() -> None:
    ranks = batches_of(
        BatchSettings(global_batch_size=COMPLETIONS, packing=True, packing_length=64, round_size=2), 2
    )
    assert [len(batch.sample_ids) for batches in ranks for batch in batches] == [COMPLETIONS, 0, 0, 0]
    assert not ranks[1][0].loss_mask.any()
