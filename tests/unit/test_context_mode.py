"""The choice among ways for attention to cross ranks."""

import pytest

from megaswift.errors import ConfigError
from megaswift.kernels.context_attention.volume import Heads
from megaswift.parallel.context import ContextMode, Links, context_mode, exposed_s, pad_multiple

# H100 SXM: NVLink 4 450 GB/s, InfiniBand 400 Gb/s a direction (NVIDIA data sheets); attention 400 TFLOP/s.
H100 = Links(ranks_per_node=8, node_bytes_per_s=450e9, network_bytes_per_s=50e9, attention_flops_per_s=400e12)
LLAMA_8B = Heads(query=32, groups=8, key_size=128, value_size=128)
MQA = Heads(query=7, groups=1, key_size=128, value_size=128)


def choose(
    kind: str = "auto",
    *,
    cp: int,
    tokens: int,
    heads: Heads = LLAMA_8B,
    mean_keys: float | None = None,
    **options: int | None,
) -> ContextMode:
    keys = tokens / 2 if mean_keys is None else mean_keys
    return context_mode(
        kind, cp=cp, tp=1, heads=heads, links=H100, rank_tokens=tokens // cp, keys_per_query=keys, **options
    )


def test_short_documents_inside_a_node_exchange_heads() -> None:
    mode = choose(cp=8, tokens=32768, mean_keys=200)
    assert (mode.kind, mode.ring, mode.inner) == ("a2a", 1, 8)
    assert "p2p" in mode.reason and "ms" in mode.reason


def test_a_long_document_across_nodes_takes_a_ring_that_compute_hides() -> None:
    mode = choose(cp=64, tokens=2**20)
    assert mode.kind in ("p2p", "a2a+p2p") and mode.ring > 1


def test_short_documents_across_nodes_do_not_wait_for_a_ring_of_all_ranks() -> None:
    mode = choose(cp=16, tokens=65536, mean_keys=200)
    assert mode.inner >= 8 and f"p2p {exposed_ring_ms(cp=16, tokens=65536, mean_keys=200):.2f}" in mode.reason


def exposed_ring_ms(*, cp: int, tokens: int, mean_keys: float) -> float:
    return 1e3 * exposed_s(
        "p2p", cp, 1, tp=1, heads=LLAMA_8B, links=H100, rank_tokens=tokens // cp, keys_per_query=mean_keys
    )


def test_heads_that_cannot_be_exchanged_leave_ring_and_gather() -> None:
    assert choose(cp=4, tokens=32768, heads=MQA, mean_keys=200).kind in ("p2p", "all_gather")
    with pytest.raises(
        ConfigError, match=r"cannot exchange 7 query and 1 key/value heads.*context_parallel_size=4"
    ):
        choose("a2a", cp=4, tokens=32768, heads=MQA)


def test_a_window_never_takes_a_ring_of_keys_that_nobody_sees() -> None:
    assert choose(cp=4, tokens=32768, heads=MQA, window=1024).kind == "all_gather"


def test_hybrid_exchanges_heads_within_the_node_only() -> None:
    mode = choose("a2a+p2p", cp=32, tokens=2**20)
    assert (mode.ring, mode.inner) == (4, 8)
    with pytest.raises(ConfigError, match="There is none"):
        choose("a2a+p2p", cp=2, tokens=32768)


def test_packs_divide_by_cp_and_by_tp_where_tp_shares_the_sequence() -> None:
    assert pad_multiple(cp=4, tp=2, sequence_parallel=False) == 4
    assert pad_multiple(cp=4, tp=2, sequence_parallel=True) == 8
