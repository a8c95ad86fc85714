"""Rank arithmetic without torch against Megatron-Core's own groups."""

from pathlib import Path

import pytest
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megaswift.mcore.process_groups import initialise
from megaswift.parallel.layout import Layout, chunk_layers, coordinates
from tests.harness.distributed import run_distributed

LAYOUTS = [
    Layout(world=4, tp=2, pp=2),
    Layout(world=4, tp=2, ep=2),
    Layout(world=4, tp=2, etp=2),
    Layout(world=4, pp=2, ep=2),
    Layout(world=4, tp=2, ep=4),
    Layout(world=4, cp=2, tp=2),
    Layout(world=4, cp=2, ep=2),
    Layout(world=4),
]


def megatron_coordinates(rank: int, world_size: int, layout: Layout) -> tuple[int, ...]:
    initialise(layout, seed=1, timeout_min=1)
    found = coordinates(layout, rank)
    assert found.tp == parallel_state.get_tensor_model_parallel_rank()
    assert found.pp == parallel_state.get_pipeline_model_parallel_rank()
    assert found.dp == parallel_state.get_data_parallel_rank()
    assert found.cp == parallel_state.get_context_parallel_rank()
    assert found.ep == parallel_state.get_expert_model_parallel_rank()
    assert found.etp == parallel_state.get_expert_tensor_parallel_rank()
    assert found.edp == parallel_state.get_expert_data_parallel_rank()
    assert layout.dp == parallel_state.get_data_parallel_world_size()
    return (found.tp, found.pp, found.dp, found.cp)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coordinates_equal_megatron_groups(layout: Layout) -> None:
    places = run_distributed(megatron_coordinates, 4, layout)
    assert len(set(places)) == 4


@pytest.mark.parametrize(
    ("layout", "num_layers"),
    [
        (Layout(world=2, pp=2), 6),
        (Layout(world=2, pp=2, vpp=3), 12),
        (Layout(world=4, pp=4, vpp=2), 16),
        (Layout(world=4, pp=4, pp_first=1), 7),
        (Layout(world=4, pp=4, pp_last=3), 9),
        (Layout(world=4, pp=4, pp_first=1, pp_last=2), 9),
        (Layout(world=2, pp=2, pp_first=1, pp_last=4), 5),
        (Layout(world=3, pp=3, vpp=2, pp_first=2, pp_last=4), 10),
    ],
    ids=str,
)
def test_layers_of_every_chunk_equal_megatron(layout: Layout, num_layers: int) -> None:
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=layout.pp_first,
        num_layers_in_last_pipeline_stage=layout.pp_last,
        pipeline_dtype=float,
        overlap_p2p_comm=True,
        batch_p2p_comm=False,
    )
    seen = []
    for vp_rank in range(layout.vpp):
        for pp_rank in range(layout.pp):
            layers = chunk_layers(layout, num_layers, pp_rank=pp_rank, vp_rank=vp_rank)
            vp_stage = vp_rank if layout.vpp > 1 else None
            assert layers.start == get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
            seen += list(layers)
    assert seen == list(range(num_layers))


def network_threads() -> int:
    """Return how many threads wait for gloo's network; an earlier test's may still be among them."""
    return sum(name.read_text() == "gloo_tcp_loop\n" for name in Path("/proc/self/task").glob("*/comm"))


def more_network_threads(rank: int, world_size: int, layout: Layout) -> tuple[int, int]:
    world = network_threads()  # the harness has made the world's group
    initialise(layout, seed=1, timeout_min=1)
    return world, network_threads()


@pytest.mark.ranks(2)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by Linux")
def test_all_groups_of_a_rank_share_a_network_thread() -> None:
    for world, all_groups in run_distributed(more_network_threads, 2, Layout(world=2, tp=2)):
        assert 1 <= all_groups <= world
