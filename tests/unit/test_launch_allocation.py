"""Which nodes of an allocation are unfit, and which are slow."""

import pytest

from megaswift.errors import LaunchError
from megaswift.launch.allocation import RankReport, check_reports


def reports(*, faults: dict[int, str], times: dict[int, float]) -> list[RankReport]:
    """Return those of four nodes with two ranks each."""
    return [
        RankReport(
            rank=rank,
            host=f"gpu{rank // 2}",
            faults=(faults[rank],) if rank in faults else (),
            product_s=times.get(rank, 1e-3),
        )
        for rank in range(8)
    ]


def test_a_healthy_allocation_passes_in_silence() -> None:
    assert check_reports(reports(faults={}, times={3: 1.4e-3})) == []


def test_unfit_nodes_are_named_for_exclude() -> None:
    faults = {3: "GPU 1 has 2 uncorrected memory errors", 2: "an all-reduce comes out wrong", 7: "x"}
    with pytest.raises(LaunchError) as caught:
        check_reports(reports(faults=faults, times={}))
    message = str(caught.value)
    assert message.startswith("gpu1 (rank 2): an all-reduce comes out wrong; gpu3 (rank 7): x.")
    assert message.endswith("--exclude gpu1,gpu3.")


def test_a_slow_node_is_a_warning() -> None:
    (warning,) = check_reports(reports(faults={}, times={5: 3e-3}))
    assert warning.startswith("gpu2: a matrix product takes 3.0 x as long") and "--exclude gpu2" in warning


def test_one_rank_has_nobody_to_compare_with() -> None:
    assert check_reports([RankReport(rank=0, host="a", faults=(), product_s=9.0)]) == []
    assert (
        check_reports([RankReport(rank=rank, host="a", faults=(), product_s=None) for rank in (0, 1)]) == []
    )
