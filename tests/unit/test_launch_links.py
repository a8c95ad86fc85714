"""Slow links: which nodes measure together, and which are named."""

from itertools import pairwise

import pytest

from megaswift.launch.links import LinkTime, check_links, rounds

FAST, SLOW = (
    240e9,
    60e9,
)  # bytes a second; the planner reckons with 236e9 inside a node of H100s, and no more between two


def times(
    nodes: int, *, slow_inside: tuple[int, ...] = (), slow_network: tuple[int, ...] = ()
) -> list[LinkTime]:
    """Return what so many nodes measure."""
    found = []
    for group in (group for groups in rounds(map(str, range(nodes))) for group in groups):
        slow = slow_inside if len(group) == 1 else slow_network
        bytes_s = SLOW if any(int(host) in slow for host in group) else FAST
        found.append(LinkTime(hosts=group, bytes_s=bytes_s))
    return found


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 16])
def test_every_node_measures_alone_and_with_two_neighbours(nodes: int) -> None:
    hosts = [f"n{rank // 2}" for rank in range(2 * nodes)]
    found = rounds(hosts)
    for groups in found:
        members = [host for group in groups for host in group]
        assert len(members) == len(set(members)), "a node cannot be in two groups at a time"
    assert found[0] == [(f"n{node}",) for node in range(nodes)]
    pairs = {frozenset(pair) for groups in found[1:] for pair in groups}
    ring = [f"n{node}" for node in range(nodes)]
    assert pairs == {frozenset(pair) for pair in pairwise([*ring, ring[0]]) if len(set(pair)) == 2}


def test_fast_links_pass_in_silence() -> None:
    assert check_links(times(4), gpu="H100", per_node=8) == []


@pytest.mark.parametrize("nodes", [3, 4, 7, 8])
def test_a_node_that_is_slow_with_both_neighbours_is_named_alone(nodes: int) -> None:
    (warning,) = check_links(times(nodes, slow_network=(1,)), gpu="NVIDIA H100 80GB HBM3", per_node=8)
    assert warning.startswith(
        "1: an all-reduce reaches 60 GB/s to other nodes, with 8 x 50 GB/s by the catalogue; 236 GB/s were"
    )
    assert warning.endswith("Consider --exclude 1.")


def test_nodes_with_slow_links_inside_are_named() -> None:
    (warning,) = check_links(times(4, slow_inside=(3, 0)), gpu="H100", per_node=8)
    assert warning.startswith(
        "0, 3: an all-reduce reaches 60 GB/s inside the node, where nvlink has 450 GB/s"
    )
    assert warning.endswith("Consider --exclude 0,3.")


def test_of_two_nodes_none_is_blamed_for_their_network() -> None:
    (warning,) = check_links(times(2, slow_network=(1,)), gpu="H100", per_node=8)
    assert warning.startswith("0, 1: ") and "--exclude" not in warning


def test_where_all_nodes_are_slow_none_is_to_be_left_out() -> None:
    (warning,) = check_links(times(4, slow_network=(0, 1, 2, 3)), gpu="H100", per_node=8)
    assert "--exclude" not in warning and "All of them are alike" in warning
