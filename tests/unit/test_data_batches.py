"""Global batches: the same for every number of ranks, resumable, and right to the token."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswift.data.batches import BatchSettings, TrainData, ValidationData, even_share
from megaswift.data.encode import EncodedSet
from megaswift.data.order import shuffled
from megaswift.errors import ConfigError


def encoded_set(lengths: list[int], *, seed: int = 0) -> EncodedSet:
    """Return a set whose tokens say where they come from: entry * 1000 + position."""
    rng = np.random.default_rng(seed)
    return EncodedSet(
        input_ids=np.concatenate([i * 1000 + np.arange(n) for i, n in enumerate(lengths)]).astype(np.int32),
        loss_weights=(rng.random(sum(lengths)) < 0.7).astype(np.uint8),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        samples=np.arange(len(lengths)),
    )


LENGTHS = [5, 9, 3, 12, 7, 4, 8, 6, 11, 2, 10, 3, 5]
MODES = {
    "packing": {"packing": True, "packing_length": 16},
    "padding_free": {},
    "padded": {"padding_free": False},
}


def settings_of(mode: str, **more) -> BatchSettings:
    return BatchSettings(global_batch_size=more.pop("global_batch_size", 4), **MODES[mode], **more)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_global_batches_do_not_depend_on_the_number_of_ranks(mode, micro_batch_size):
    data = TrainData(encoded_set(LENGTHS), settings_of(mode, micro_batch_size=micro_batch_size))
    seen = {}
    for dp in (1, 2, 4):
        if 4 % (micro_batch_size * dp):
            continue
        steps = []
        for consumed in range(0, 40, 4):
            shares = [list(data.micro_batches(consumed, dp_rank=rank, dp=dp)) for rank in range(dp)]
            assert {len(share) for share in shares} == {data.num_micro_batches(dp)}
            steps.append(sorted(batch.sample_ids for share in shares for batch in share))
        seen[dp] = steps
    assert all(steps == seen[1] for steps in seen.values())


@pytest.mark.parametrize("mode", MODES)
def test_every_epoch_holds_every_sample_once_and_in_another_order(mode):
    data = TrainData(encoded_set(LENGTHS), settings_of(mode, global_batch_size=1))
    epochs = [
        [batch.sample_ids for item in range(data.num_items) for batch in data.micro_batches(e * data.num_items + item, dp_rank=0, dp=1)]
        for e in range(3)
    ]  # fmt: skip
    for epoch in epochs:
        assert sorted(i for ids in epoch for i in ids) == list(range(len(LENGTHS)))
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_resumed_stream_goes_on_where_it_stopped_with_another_micro_batch_and_dp():
    encoded = encoded_set(LENGTHS)
    first = TrainData(encoded, settings_of("padding_free", micro_batch_size=1))
    whole = [
        i
        for consumed in range(0, 48, 4)
        for b in first.micro_batches(consumed, dp_rank=0, dp=1)
        for i in b.sample_ids
    ]
    resumed = TrainData(encoded, settings_of("padding_free", micro_batch_size=2))
    rest = [
        sorted(i for rank in range(2) for b in resumed.micro_batches(consumed, dp_rank=rank, dp=2) for i in b.sample_ids)
        for consumed in range(20, 48, 4)
    ]  # fmt: skip
    assert rest == [sorted(whole[start : start + 4]) for start in range(20, 48, 4)]


def test_ranks_of_a_global_batch_get_like_work():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.0, 4000), 8, 4096).astype(int).tolist()
    settings = BatchSettings(global_batch_size=32, packing=True, packing_length=4096)
    data = TrainData(encoded_set(lengths), settings)

    def work(batches):
        return sum(lengths[entry] ** 2 for batch in batches for entry in batch.sample_ids)

    plain, ours = [], []
    for consumed in range(0, 32 * 10, 32):
        works = [work(data.micro_batches(consumed, dp_rank=rank, dp=4)) for rank in range(4)]
        ours.append(max(works) / np.mean(works))
        one_by_one = [work([batch]) for batch in data.micro_batches(consumed, dp_rank=0, dp=1)]
        in_turn = [sum(one_by_one[rank::4]) for rank in range(4)]
        plain.append(max(in_turn) / np.mean(in_turn))
    assert np.mean(ours) < 1.05 < 1.1 < np.mean(plain)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=4, max_size=4 * 6).map(lambda drawn: drawn[: len(drawn) // 4 * 4])
)
def test_every_micro_batch_goes_to_one_rank_and_all_ranks_get_as_many(drawn):
    shares = [even_share(np.array(drawn, float), dp_rank=rank, dp=4) for rank in range(4)]
    assert sorted(number for share in shares for number in share) == list(range(len(drawn)))
    assert {len(share) for share in shares} == {len(drawn) // 4}
    sums = [sum(drawn[number] for number in share) for share in shares]
    assert max(sums) - min(sums) <= max(drawn)  # no rank is ahead by more than one micro batch


def test_the_last_batch_of_an_epoch_runs_on_into_the_next():
    data = TrainData(encoded_set(LENGTHS), settings_of("padding_free"))
    assert data.num_steps(1) == 4 and data.num_steps(2) == 7 and data.num_steps(0.1) == 1
    last = data.items(12)
    first_epoch = shuffled(13, seed=42, stream=0)
    second_epoch = shuffled(13, seed=42, stream=1)
    assert last.tolist() == [first_epoch[12], *second_epoch[:3]]


def test_a_batch_larger_than_the_set_sees_every_epoch():
    data = TrainData(encoded_set([3, 4, 5]), BatchSettings(global_batch_size=8))
    items = data.items(0).tolist()
    assert sorted(items[:3]) == sorted(items[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("mode", ["padding_free", "padded"])
def test_rows_of_like_length_follow_each_other(mode, monkeypatch):
    monkeypatch.setattr("megaswift.data.batches.SORTED_ROWS", 6)
    plain, grouped = (
        TrainData(encoded_set(LENGTHS), settings_of(mode, global_batch_size=3, group_by_length=chosen))
        for chosen in (False, True)
    )
    for epoch in (0, 1):
        first = epoch * len(LENGTHS)
        theirs, ours = (
            [int(i) for step in range(first, first + 13) for i in data.items(step)[:1]]
            for data in (plain, grouped)
        )
        assert ours != theirs and sorted(ours) == list(range(13))
        for window in (slice(0, 6), slice(6, 12), slice(12, 13)):
            assert sorted(ours[window]) == sorted(theirs[window])
            lengths = [LENGTHS[i] for i in ours[window]]
            assert lengths == sorted(lengths, reverse=True)


def test_without_shuffle_the_order_is_that_of_the_rows():
    data = TrainData(encoded_set(LENGTHS), settings_of("padding_free", shuffle=False))
    assert data.items(0).tolist() == [0, 1, 2, 3] and data.items(12).tolist() == [12, 0, 1, 2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_rows_hold_their_documents_and_nothing_else(mode, multiple):
    encoded = encoded_set(LENGTHS)
    data = TrainData(encoded, settings_of(mode, micro_batch_size=2, pad_to_multiple=multiple), pad_id=999_999)
    for consumed in range(0, 24, 4):
        for batch in data.micro_batches(consumed, dp_rank=0, dp=2):
            check_micro_batch(batch, encoded, multiple)


def check_micro_batch(batch, encoded, multiple):
    rows, width = batch.input_ids.shape
    assert width % multiple == 0
    for name in ("input_ids", "labels", "loss_mask", "position_ids"):
        assert getattr(batch, name).shape == (rows, width)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32
    if batch.cu_seqlens is None:
        bounds = [(row, 0, len_of(encoded, entry)) for row, entry in enumerate(batch.sample_ids)]
        assert rows == len(batch.sample_ids) and batch.max_seqlen == width
    else:
        assert rows == 1 and batch.cu_seqlens.dtype == torch.int32
        cu = batch.cu_seqlens.tolist()
        assert cu[0] == 0 and cu[-1] == width and all(a < b for a, b in pairwise(cu))
        assert batch.max_seqlen == max(b - a for a, b in pairwise(cu))
        assert len(cu) - 1 - len(batch.sample_ids) in (0, 1)  # one more document where there is padding
        bounds = [(0, cu[i], cu[i] + len_of(encoded, entry)) for i, entry in enumerate(batch.sample_ids)]
        assert all(end == cu[i + 1] for i, (_, _, end) in enumerate(bounds))
    covered = torch.zeros(rows, width, dtype=torch.bool)
    for entry, (row, start, end) in zip(batch.sample_ids, bounds, strict=True):
        tokens = torch.from_numpy(
            encoded.input_ids[encoded.starts[entry] : encoded.starts[entry + 1]].astype(np.int64)
        )
        weights = torch.from_numpy(
            encoded.loss_weights[encoded.starts[entry] : encoded.starts[entry + 1]].astype(np.float32)
        )
        assert torch.equal(batch.input_ids[row, start:end], tokens)
        assert torch.equal(batch.labels[row, start : end - 1], tokens[1:])
        assert torch.equal(batch.loss_mask[row, start : end - 1], weights[1:])
        assert batch.loss_mask[row, end - 1] == 0
        assert torch.equal(batch.position_ids[row, start:end], torch.arange(end - start))
        covered[row, start:end] = True
    assert (batch.input_ids[~covered] == 999_999).all() and (batch.loss_mask[~covered] == 0).all()


def len_of(encoded, entry):
    return int(encoded.starts[entry + 1] - encoded.starts[entry])


def test_loss_weights_other_than_0_and_1_reach_the_batch():
    encoded = encoded_set([4])
    encoded = EncodedSet(
        input_ids=encoded.input_ids, loss_weights=np.array([0, 0.5, 2, 0.25], np.float32), starts=encoded.starts, samples=encoded.samples,
    )  # fmt: skip
    (batch,) = TrainData(encoded, BatchSettings(global_batch_size=1)).micro_batches(0, dp_rank=0, dp=1)
    assert batch.loss_mask.tolist() == [[0.5, 2.0, 0.25, 0.0]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_validation_sees_every_sample_once_and_every_rank_runs_as_many_micro_batches(mode, dp):
    data = ValidationData(encoded_set(LENGTHS), settings_of(mode))
    seen, empty = [], 0
    for step in range(data.num_steps()):
        shares = [list(data.micro_batches(step, dp_rank=rank, dp=dp)) for rank in range(dp)]
        assert {len(share) for share in shares} == {4 // dp}
        for batch in (batch for share in shares for batch in share):
            seen += batch.sample_ids
            if not batch.sample_ids:
                empty += 1
                assert batch.loss_mask.sum() == 0 and batch.input_ids.numel() > 0
    assert sorted(seen) == list(range(len(LENGTHS)))
    assert empty == data.num_steps() * 4 - data.num_items


def test_a_global_batch_that_does_not_divide_is_an_error():
    data = TrainData(encoded_set(LENGTHS), settings_of("padding_free", micro_batch_size=3))
    with pytest.raises(
        ConfigError, match=r"global_batch_size=4 is not a multiple of micro_batch_size=3 x dp=2.*6"
    ):
        list(data.micro_batches(0, dp_rank=0, dp=2))


def test_packing_without_a_length_is_an_error():
    with pytest.raises(ConfigError, match="packing=true needs packing_length"):
        TrainData(encoded_set(LENGTHS), BatchSettings(global_batch_size=1, packing=True))


def test_an_encoded_set_comes_back_from_disk(tmp_path):
    encoded = encoded_set(LENGTHS)
    encoded.save(tmp_path / "set")
    loaded = EncodedSet.load(tmp_path / "set")
    for name in ("input_ids", "loss_weights", "starts", "samples"):
        assert np.array_equal(getattr(loaded, name), getattr(encoded, name))
    ours, theirs = (
        list(TrainData(s, settings_of("packing")).micro_batches(4, dp_rank=0, dp=1))
        for s in (encoded, loaded)
    )
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(ours, theirs, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.integers(0, 2**63), st.integers(-2, 2**31))
def test_an_order_is_a_permutation(count, seed, stream):
    assert np.array_equal(np.sort(shuffled(count, seed=seed, stream=stream)), np.arange(count))


def test_orders_are_fixed_for_all_time():
    assert shuffled(8, seed=42, stream=0).tolist() == GOLDEN_ORDER
    assert shuffled(8, seed=43, stream=0).tolist() != GOLDEN_ORDER
    assert shuffled(8, seed=42, stream=1).tolist() != GOLDEN_ORDER


def test_orders_look_random():
    first = np.array([shuffled(100, seed=seed, stream=0)[0] for seed in range(2000)])
    assert abs(first.mean() - 49.5) < 3 and len(np.unique(first)) == 100
    assert abs(np.corrcoef(np.arange(10_000), shuffled(10_000, seed=0, stream=0))[0, 1]) < 0.05


GOLDEN_ORDER = [4, 7, 1, 6, 3, 2, 0, 5]
