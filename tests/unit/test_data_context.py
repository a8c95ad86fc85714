"""A rank's part of a micro batch: all tensors cut by one index, nothing lost, loss tokens counted once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswift.data.batches import BatchSettings, TrainData
from megaswift.data.context import spread
from megaswift.data.encode import EncodedSet


def data_of(lengths: list[int], ranks: int, **how) -> TrainData:
    rng = np.random.default_rng(len(lengths))
    encoded = EncodedSet(
        input_ids=rng.integers(3, 500, sum(lengths)).astype(np.int32),
        loss_weights=(rng.random(sum(lengths)) < 0.6).astype(np.uint8),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        samples=np.arange(len(lengths)),
    )
    return TrainData(encoded, BatchSettings(pad_to_multiple=ranks, **how))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    shape=st.sampled_from([(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]),
    padding_free=st.booleans(),
)
def test_the_parts_of_all_ranks_are_the_micro_batch(lengths, shape, padding_free) -> None:
    ring, inner = shape
    how = {"padding_free": padding_free, "micro_batch_size": len(lengths), "global_batch_size": len(lengths)}
    (batch,) = data_of(lengths, ring * inner, **how).micro_batches(0, dp_rank=0, dp=1)
    parts = [spread(batch, rank=rank, ring=ring, inner=inner) for rank in range(ring * inner)]
    assert {part.input_ids.shape for part in parts} == {(1, batch.input_ids.numel() // (ring * inner))}

    def rows(one) -> list[tuple[float, ...]]:
        columns = (one.input_ids, one.labels, one.loss_mask, one.position_ids)
        return list(zip(*(column.flatten().tolist() for column in columns), strict=True))

    assert sorted(row for part in parts for row in rows(part)) == sorted(rows(batch))
    assert sum(int((part.loss_mask != 0).sum()) for part in parts) == int((batch.loss_mask != 0).sum())
    assert {part.plan for part in parts} == {parts[0].plan} and parts[0].sample_ids == batch.sample_ids


def test_documents_shorter_than_the_ranks_need_no_padding_of_their_own() -> None:
    data = data_of([1, 2, 3, 5, 1], 4, packing=True, packing_length=16, global_batch_size=1)
    (batch,) = data.micro_batches(0, dp_rank=0, dp=1)
    assert batch.input_ids.shape == (1, 12)
    part = spread(batch, rank=3, ring=4, inner=1)
    assert part.input_ids.shape == (1, 3) and part.plan is not None and part.plan.lengths == (1, 2, 3, 5, 1)


@pytest.mark.parametrize("weights", [0.25, 1.0])
def test_loss_weights_travel_with_their_tokens(weights: float) -> None:
    data = data_of([6, 10], 2, packing=True, packing_length=16, global_batch_size=1)
    (batch,) = data.micro_batches(0, dp_rank=0, dp=1)
    batch.loss_mask.mul_(weights)
    total = sum(float(spread(batch, rank=rank, ring=2, inner=1).loss_mask.sum()) for rank in range(2))
    assert total == float(batch.loss_mask.sum()) and torch.is_tensor(batch.loss_mask)
