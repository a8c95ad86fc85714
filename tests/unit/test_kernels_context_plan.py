"""The cut of packed documents for cp ranks, and one-rank attention against its definition."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaswift.errors import ConfigError
from megaswift.kernels.context_attention.index import rank_tokens
from megaswift.kernels.context_attention.ops import Keys, context_attention
from megaswift.kernels.context_attention.plan import balance, make_plan, pairs
from megaswift.kernels.context_attention.reference import attention
from megaswift.kernels.context_attention.segments import Pattern, gathered_segments, ring_segments
from tests.harness.bench_context import draw_packs


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 70), max_size=12), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 3])
)
def test_every_token_lives_on_one_rank_and_all_ranks_hold_as_many(
    lengths: list[int], ring: int, inner: int
) -> None:
    lengths = [*lengths, -sum(lengths) % (ring * inner)]
    plan = make_plan(lengths, ring=ring, inner=inner)
    held = [rank_tokens(plan, rank, torch.device("cpu")).tolist() for rank in range(ring * inner)]
    assert {len(tokens) for tokens in held} == {sum(lengths) // (ring * inner)}
    assert sorted(token for tokens in held for token in tokens) == list(range(sum(lengths)))
    assert all(tokens == sorted(tokens) for tokens in held)
    sizes = [{stop - start for start, stop in itertools.pairwise(cuts)} for cuts in plan.cuts]
    assert all(max(found) - min(found) <= 1 for found in sizes)


@given(
    st.lists(st.integers(0, 40), max_size=8),
    st.sampled_from([2, 3, 4]),
    st.one_of(st.none(), st.integers(1, 50)),
)
@settings(max_examples=60, deadline=None)
def test_segments_show_every_query_exactly_the_keys_it_may_see(
    lengths: list[int], ring: int, window: int | None
) -> None:
    lengths = [*lengths, -sum(lengths) % ring]
    plan, pattern = make_plan(lengths, ring=ring), Pattern(scale=1.0, window=window)
    held = [rank_tokens(plan, rank, torch.device("cpu")).tolist() for rank in range(ring)]
    starts = [start for start, length in zip(plan.offsets, plan.lengths, strict=True) for _ in range(length)]
    may = {
        (q, k)
        for q in range(sum(lengths))
        for k in range(starts[q], q + 1)
        if window is None or q - k < window
    }
    whole = list(range(sum(lengths)))
    for rank in range(ring):
        by_source = [(ring_segments(plan, pattern, rank, source), held[source]) for source in range(ring)]
        for steps in (by_source, [(gathered_segments(plan, pattern, rank), whole)]):
            seen = [
                (held[rank][segment.q_start + i], keys[segment.k_start + j])
                for segments, keys in steps
                for segment in segments
                for i in range(segment.q_len)
                for j in range(segment.k_len)
                if segment.offset + i - j >= 0 and (window is None or segment.offset + i - j < window)
            ]
            assert len(seen) == len(set(seen))
            assert set(seen) == {(q, k) for q, k in may if q in set(held[rank])}


@pytest.mark.parametrize("ring", [2, 8, 16])
def test_causal_work_is_even_to_two_percent(ring: int) -> None:
    found = balance(make_plan(lengths, ring=ring) for lengths in draw_packs(40))
    assert max(found) <= 1.02, max(found)


def test_work_is_the_number_of_visible_pairs() -> None:
    plan = make_plan([9, 4, 3], ring=2)
    assert (
        sum(plan.work(rank) for rank in range(2))
        == sum(pairs(0, length) for length in (9, 4, 3))
        == 45 + 10 + 6
    )


def test_a_pack_that_does_not_divide_is_refused_with_the_size_to_pad_to() -> None:
    with pytest.raises(ConfigError, match="Pad the pack to 12 tokens"):
        make_plan([5, 4], ring=2, inner=2)


@pytest.mark.parametrize("window", [None, 1, 4, 290])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "groups", "key_size", "value_size", "sinks"),
    [(4, 4, 8, 8, False), (4, 1, 8, 4, True), (4, 2, 4, 8, True)],
)
def test_one_rank_computes_attention(
    window: int | None, causal: bool, heads: int, groups: int, key_size: int, value_size: int, sinks: bool
) -> None:
    if window is not None and not causal:
        with pytest.raises(AssertionError, match="causal=False"):
            Pattern(scale=0.3, causal=causal, window=window)
        return
    pattern = Pattern(scale=0.3, causal=causal, window=window)
    torch.manual_seed(0)
    for lengths in ([5, 0, 33, 1, 1], [300], [0], []):
        tokens = sum(lengths)
        shapes = [
            (tokens, heads, key_size),
            (tokens, groups, key_size),
            (tokens, groups, value_size),
            *[(heads,)] * sinks,
        ]
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        plan = make_plan(lengths)
        got = context_attention(
            *inputs[:3], plan, pattern=pattern, sinks_H=inputs[3] if sinks else None, keys=Keys.GATHERED
        )
        wide = [x.detach().double().requires_grad_() for x in inputs]
        wanted = attention(*wide[:3], lengths, pattern, wide[3] if sinks else None)
        seed = torch.randn_like(got)
        pairs_of_grads = zip(
            (got, *torch.autograd.grad(got, inputs, seed)),
            (wanted, *torch.autograd.grad(wanted, wide, seed.double())),
            strict=True,
        )
        for mine, theirs in pairs_of_grads:
            # Float32 sums of at most 300 terms of order one.
            assert torch.allclose(
                mine.double(),
                theirs,
                rtol=0,
                atol=1e-5 * max(1.0, float(theirs.abs().max()) if theirs.numel() else 1),
            )


def test_recompute_gives_the_same_gradients() -> None:
    plan, pattern = make_plan([5, 6]), Pattern(scale=0.3)
    inputs = [torch.randn(11, 2, 4, requires_grad=True) for _ in range(3)]

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return context_attention(*inputs, plan, pattern=pattern)

    wanted = torch.autograd.grad(function(*inputs).sum(), inputs)
    recomputed = torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)
    for mine, theirs in zip(torch.autograd.grad(recomputed.sum(), inputs), wanted, strict=True):
        assert torch.equal(mine, theirs)
