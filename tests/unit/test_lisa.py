"""Which layers are drawn, and how steps are counted where a part of the state begins anew."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from megaswift.checkpoint.state import RENEWED_EVERY, allocate_states
from megaswift.config.run import RunConfig
from megaswift.training.lisa import drawn_layers

LAYERS, DRAWN, INTERVAL = 7, 3, 4


def drawn(updates: int, *, seed: int = 42) -> list[int]:
    run = RunConfig()
    lisa = replace(run.lisa, lisa_activated_layers=DRAWN, lisa_step_interval=INTERVAL)
    return drawn_layers(
        replace(run, lisa=lisa, training=replace(run.training, seed=seed)), LAYERS, updates=updates
    )


def test_a_draw_lasts_an_interval_and_has_so_many_layers() -> None:
    for interval in range(50):
        first = interval * INTERVAL
        found = drawn(first)
        assert len(set(found)) == DRAWN and set(found) <= set(range(LAYERS)) and found == sorted(found)
        assert all(drawn(first + step) == found for step in range(INTERVAL))
    assert len({tuple(drawn(interval * INTERVAL)) for interval in range(50)}) > 20
    assert [drawn(interval * INTERVAL, seed=1) for interval in range(9)] != [
        drawn(interval * INTERVAL) for interval in range(9)
    ]


def test_all_sets_of_layers_are_drawn_as_often() -> None:
    """35 sets of 3 of 7: chi-square with 34 degrees of freedom is below 70 but once in 3000 seeds."""
    draws = 3500
    counts: dict[tuple[int, ...], int] = {}
    for interval in range(draws):
        found = tuple(drawn(interval * INTERVAL))
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 35
    assert sum((count - draws / 35) ** 2 for count in counts.values()) / (draws / 35) < 70


class CountsInItsGroups:
    """As the Adams of apex and Transformer Engine do."""

    def __init__(self, groups: list[dict[str, object]]) -> None:
        self.param_groups = groups
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}


def test_state_that_begins_anew_counts_from_there() -> None:
    always, sometimes = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))

    def groups() -> list[dict[str, object]]:
        return [{"params": [always]}, {"params": [sometimes], RENEWED_EVERY: INTERVAL}]

    by_tensor = torch.optim.AdamW(groups())
    by_group = CountsInItsGroups(groups())
    by_group.state = {always: {}, sometimes: {}}
    config = SimpleNamespace(optimizer="adam")
    parts = [SimpleNamespace(optimizer=one, config=config) for one in (by_tensor, by_group)]
    allocate_states(SimpleNamespace(chained_optimizers=parts), updates=2 * INTERVAL + 1)
    assert [float(by_tensor.state[one]["step"]) for one in (always, sometimes)] == [2 * INTERVAL + 1, 1]
    assert [group["step"] for group in by_group.param_groups] == [2 * INTERVAL + 1, 1]
