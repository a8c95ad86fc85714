"""The wall-time governor on simulated clocks."""

import random

import pytest

from megaswift.launch.governor import Governor, percentile_95


def test_without_an_end_nothing_stops() -> None:
    assert not Governor(start=0, end=None, steps=(1e9,), saves=(1e9,)).must_stop(1e12)


def test_one_more_step_and_a_save_must_fit() -> None:
    governor = Governor(start=0, end=1000).after_step(10).after_save(20)
    assert governor.save_s() == 30  # 1.5 x
    assert not governor.must_stop(929)  # this step and the next, 15 each, 30 for the save and 10 to leave
    assert governor.must_stop(930)
    assert governor.must_stop(900, save_due=True)
    assert not governor.must_stop(869, save_due=True, save_under_way=True)
    assert governor.must_stop(870, save_due=True, save_under_way=True)
    assert not governor.after_validation(100).must_stop(779, validation_due=True)
    assert governor.after_validation(100).must_stop(780, validation_due=True)


def test_the_first_save_is_guessed_from_the_slice() -> None:
    assert Governor(start=0, end=60).save_s() == pytest.approx(9)
    assert Governor(start=0, end=86400).save_s() == 300


def test_old_measurements_are_forgotten() -> None:
    governor = Governor(start=0, end=1000).after_save(1).after_step(500)
    assert governor.must_stop(900)
    for _ in range(50):
        governor = governor.after_step(1)
    assert not governor.must_stop(900)


@pytest.mark.parametrize(
    ("values", "expected"), [([3], 3), ([1, 2], 2), (range(1, 101), 95), ([5] * 19 + [99], 5)]
)
def test_percentile(values: list[float], expected: float) -> None:
    assert percentile_95(list(values)) == expected


def test_a_thousand_drawn_slices_end_saved_and_in_time() -> None:
    """Steps and saves vary by 15 %: no slice is cut off, and none of a sensible length ends without progress."""
    for seed in range(1000):
        draw = random.Random(seed)
        step_s, save_s = draw.uniform(0.1, 30), draw.uniform(1, 60)
        length = 3 * step_s + 6 * save_s + draw.uniform(60, 7200)
        now, steps = 0.0, 0
        governor = Governor(start=0, end=length)
        save_every = draw.choice([5, 50, 10**9])
        stop = False
        while not stop:
            due = (steps + 1) % save_every == 0
            stop = governor.must_stop(now, save_due=due)
            took = step_s * draw.uniform(0.85, 1.15)
            now, steps, governor = now + took, steps + 1, governor.after_step(took)
            if due and not stop:
                took = save_s * draw.uniform(0.85, 1.15)
                now, governor = now + took, governor.after_save(took)
        if governor.saves:  # otherwise the time set aside is a guess
            assert now + save_s * 1.15 <= length, seed
        assert steps > 0, seed
