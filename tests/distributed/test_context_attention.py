"""Attention spread over gloo ranks: every mode against its definition in float64, and the bytes it sends."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaswift.kernels.context_attention.ops import Keys
from megaswift.kernels.context_attention.volume import Heads, volume
from tests.harness.context import AttentionCase, errors, spread_worker
from tests.harness.distributed import run_distributed

TOLERANCE = 1e-5  # of float32, relative to the largest value
ODD = (37, 1, 0, 3, 2, 21)  # 64 tokens, of which most documents are shorter than 2 * 8 ranks
MODES = {
    "p2p": lambda case, ranks: replace(case, ring=ranks),
    "all_gather": lambda case, ranks: replace(case, ring=ranks, keys=Keys.GATHERED),
    "a2a": lambda case, ranks: replace(case, inner=ranks),
    "a2a+p2p": lambda case, ranks: replace(case, ring=ranks // 2, inner=2),
}
VARIETIES = [
    AttentionCase(lengths=ODD, heads=8, groups=8),
    AttentionCase(lengths=ODD, heads=8, groups=2),
    AttentionCase(lengths=ODD, heads=8, groups=1),
    AttentionCase(lengths=ODD, heads=8, groups=2, causal=False),
    AttentionCase(lengths=ODD, heads=8, groups=2, key_size=12, value_size=8),
    AttentionCase(lengths=ODD, heads=8, groups=1, key_size=4, value_size=8, sinks=True),
    AttentionCase(lengths=ODD, heads=8, groups=2, window=5),
    AttentionCase(lengths=ODD, heads=8, groups=4, window=17, sinks=True),
    AttentionCase(lengths=(64,), heads=8, groups=4),
    AttentionCase(lengths=(1,) * 64, heads=8, groups=2),
]


@pytest.mark.ranks(8)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_mode_is_attention(ranks: int) -> None:
    varieties = VARIETIES if ranks < 8 else VARIETIES[1::3]
    cases = [make(case, ranks) for make in MODES.values() for case in varieties]
    for case, error in zip(cases, errors(cases), strict=True):
        assert max(error.values()) <= TOLERANCE, (case, error)


@pytest.mark.ranks(2)
def test_bfloat16_errs_no_more_than_its_roundings() -> None:
    cases = [make(AttentionCase(lengths=ODD, dtype=torch.bfloat16), 2) for make in MODES.values()]
    for case, error in zip(cases, errors(cases), strict=True):
        assert max(error.values()) <= 2**-6, (
            case,
            error,
        )  # four roundings of 2^-8: score, output, two of gradients


def pack_of(ranks: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw document lengths whose sum the ranks divide, short and odd ones preferred."""
    lengths = st.lists(st.one_of(st.integers(0, 2 * ranks), st.integers(0, 80)), min_size=1, max_size=8)
    return lengths.map(lambda drawn: (*drawn, -sum(drawn) % ranks))


@pytest.mark.ranks(4)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(packs=st.lists(pack_of(4), min_size=4, max_size=4), window=st.one_of(st.none(), st.integers(1, 90)))
def test_any_documents_under_any_mode(packs: list[tuple[int, ...]], window: int | None) -> None:
    plain = [AttentionCase(lengths=lengths, window=window) for lengths in packs if sum(lengths)]
    cases = [make(case, 4) for make in MODES.values() for case in plain]
    for case, error in zip(cases, errors(cases) if cases else [], strict=True):
        assert max(error.values()) <= TOLERANCE, (case, error)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("mode", MODES)
def test_bytes_sent_are_those_of_the_formula(mode: str) -> None:
    shape = AttentionCase(lengths=(40, 24), heads=8, key_size=12, value_size=8)
    dtypes = (torch.float32, torch.bfloat16)
    cases = [
        MODES[mode](replace(shape, groups=groups, dtype=dtype), 4) for groups in (1, 2, 8) for dtype in dtypes
    ]
    for spreads in run_distributed(spread_worker, 4, cases):
        for case, spread in zip(cases, spreads, strict=True):
            heads = Heads(query=8, groups=case.groups, key_size=12, value_size=8)
            wanted = volume(heads, tokens=16, ring=case.ring, inner=case.inner)
            assert spread.forward_bytes == wanted.forward * case.dtype.itemsize, case
            assert (
                spread.backward_bytes == wanted.backward * case.dtype.itemsize + wanted.backward_float32 * 4
            ), case


def test_a_ring_sends_the_same_for_more_ranks_and_exchanged_heads_less() -> None:
    heads, tokens = Heads(query=32, groups=32, key_size=128, value_size=128), 65536
    ring = [
        volume(heads, tokens=tokens // ranks, ring=ranks, inner=1).forward * ranks // (ranks - 1)
        for ranks in (2, 4, 8, 16)
    ]
    exchanged = [
        volume(heads, tokens=tokens // ranks, ring=1, inner=ranks).forward * ranks // (ranks - 1)
        for ranks in (2, 4, 8, 16)
    ]
    assert ring == [2 * tokens * 32 * 128] * 4  # 2 N h_kv
    assert exchanged == [4 * tokens * 32 * 128 // ranks for ranks in (2, 4, 8, 16)]  # 4 N h / P
