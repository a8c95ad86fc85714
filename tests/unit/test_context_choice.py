"""How a run chooses the way across cp ranks from its links, heads and documents."""

from dataclasses import replace

import numpy as np
import pytest

from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError
from megaswift.kernels.context_attention.volume import Heads
from megaswift.metadata.meta import MLAMeta, ModelMeta
from megaswift.parallel.context import heads_of
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import select_platform
from megaswift.training.context import place_context

LLAMA = ModelMeta(
    family="llama",
    architecture="LlamaForCausalLM",
    folder=None,
    model_type="llama",
    num_layers=2,
    hidden_size=512,
    ffn_hidden_size=512,
    num_heads=32,
    num_kv_heads=8,
    head_dim=16,
    vocab_size=131,
    max_length=4096,
)


def run_with(kind: str) -> RunConfig:
    run = RunConfig()
    return replace(run, parallel=replace(run.parallel, cp_comm_type=kind))


def placed(kind: str, cp: int, lengths: list[int], meta: ModelMeta = LLAMA) -> Layout:
    layout = Layout(world=cp, cp=cp)
    platform = select_platform("cpu")
    return place_context(
        run_with(kind), meta, layout, platform, lengths=np.array(lengths), rows=1, ranks_per_node=cp
    )


@pytest.mark.parametrize(
    ("kind", "cp", "inner"), [("p2p", 4, 1), ("all_gather", 4, 1), ("a2a", 4, 4), ("a2a+p2p", 4, 2)]
)
def test_what_is_asked_for_is_taken(kind: str, cp: int, inner: int) -> None:
    layout = placed(kind, cp, [1000])
    assert (layout.cp_comm_type, layout.cp_inner, layout.cp_ring) == (kind, inner, cp // inner)


def test_one_rank_has_nothing_to_choose() -> None:
    assert placed("auto", 1, [5]) == Layout(world=1)


def test_auto_is_resolved_and_a_window_takes_no_ring() -> None:
    assert placed("auto", 4, [100] * 400).cp_comm_type in ("p2p", "all_gather", "a2a", "a2a+p2p")
    window = placed("auto", 4, [100] * 400, replace(LLAMA, sliding_window=(64, None)))
    assert window.cp_comm_type in ("all_gather", "a2a")


def test_heads_are_exchanged_within_a_node_only() -> None:
    run, platform, lengths = run_with("a2a+p2p"), select_platform("cpu"), np.array([1000])
    layout = Layout(world=8, cp=8)
    placed_there = place_context(run, LLAMA, layout, platform, lengths=lengths, rows=1, ranks_per_node=4)
    assert (placed_there.cp_inner, placed_there.cp_ring) == (4, 2)
    with pytest.raises(ConfigError, match="There is none"):
        place_context(run, LLAMA, layout, platform, lengths=lengths, rows=1, ranks_per_node=1)


def test_heads_are_those_of_a_tensor_parallel_rank() -> None:
    assert heads_of(LLAMA, tp=4) == Heads(query=8, groups=2, key_size=16, value_size=16)
    assert heads_of(LLAMA, tp=16) == Heads(query=2, groups=1, key_size=16, value_size=16)
    assert heads_of(replace(LLAMA, num_heads=6, num_kv_heads=3), tp=2) == Heads(
        query=4, groups=2, key_size=16, value_size=16
    )  # padded to 8 and 4
    mla = MLAMeta(q_rank=8, kv_rank=8, nope_head_dim=16, rope_head_dim=8, v_head_dim=12, latent_norm_eps=1e-6)
    assert heads_of(replace(LLAMA, mla=mla), tp=2) == Heads(query=16, groups=16, key_size=24, value_size=12)
