"""Who is named as slow, and who is not."""

from megaswift.launch.stragglers import IN_A_ROW, Pace, Watch


def paces(
    *work_s: float, products_s: tuple[float | None, ...] | None = None, peers: tuple[int, ...] | None = None
) -> list[Pace]:
    """Return the paces of as many ranks."""
    return [
        Pace(
            rank=rank,
            peers=peers[rank] if peers else 0,
            work_s=one,
            product_s=products_s[rank] if products_s else None,
        )
        for rank, one in enumerate(work_s)
    ]


def named(watch: Watch, window: list[Pace], times: int) -> list[int]:
    return [one.rank for _ in range(times) for one in watch.see(window)]


def test_a_rank_that_stays_slow_is_named_once() -> None:
    watch, slow = Watch(), paces(1.0, 1.1, 1.6, 0.9)
    assert named(watch, slow, IN_A_ROW - 1) == []
    (found,) = watch.see(slow)
    assert found.told("gpu7, GPU 2") == (
        "rank 2 on gpu7, GPU 2 keeps the others waiting: its own work of a step takes 1.6e+03 ms, and 1e+03 ms on ranks "
        "that do the same (1.6 x, 3 windows in a row)"
    )
    assert named(watch, slow, 3 * IN_A_ROW) == []


def test_a_rank_that_was_slow_for_a_moment_is_not_named() -> None:
    watch, slow, even = Watch(), paces(1.0, 9.0), paces(1.0, 1.0)
    for _ in range(3):
        assert named(watch, slow, IN_A_ROW - 1) == named(watch, even, 1) == []


def test_ranks_that_differ_by_little_are_not_named() -> None:
    assert named(Watch(), paces(1.0, 1.4, 1.2, 1.0), 9) == []
    assert named(Watch(), paces(0.0, 9e-4), 9) == []  # nothing to measure
    assert named(Watch(), paces(0.0, 9e-3), 9) == [1]


def test_of_two_ranks_the_slower_one_is_named() -> None:
    assert named(Watch(), paces(1.0, 1.5), IN_A_ROW) == [1]


def test_pipeline_stages_are_not_compared_with_each_other() -> None:
    assert named(Watch(), paces(1.0, 1.0, 3.0, 3.0, peers=(0, 0, 1, 1)), 9) == []
    assert named(Watch(), paces(1.0, 1.0, 3.0, 6.0, peers=(0, 0, 1, 1)), IN_A_ROW) == [3]


def test_a_slow_gpu_is_named_whatever_stage_it_has() -> None:
    window = paces(1.0, 1.0, 1.0, products_s=(2e-4, 2e-4, 4e-4), peers=(0, 1, 2))
    watch = Watch()
    assert named(watch, window, IN_A_ROW - 1) == []
    (found,) = watch.see(window)
    assert (found.rank, found.what, found.factor) == (2, "product_s", 2.0)
    assert "a matrix product takes 0.4 ms, and 0.2 ms" in found.told("gpu0")
