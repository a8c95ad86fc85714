"""When a run saves, and when what it saved in the background becomes a checkpoint."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from megaswift.training.callbacks import Save
from megaswift.training.due import Due
from megaswift.training.loop import Progress, Step


@dataclass
class Feed:
    """Counts no epochs."""

    items_per_step: int = 1


FEED: Any = Feed()


@dataclass
class BackgroundSaver:
    """Has written a save `takes` steps later."""

    takes: int
    events: list[str] = field(default_factory=list)
    is_under_way: bool = False
    asked: int = 0

    def __call__(self, progress: Progress) -> None:
        self.finish()
        self.events.append(f"save {progress.step}")
        self.is_under_way, self.asked = True, 0

    def is_written(self) -> bool:
        assert self.is_under_way, "ranks that have nothing to say must not be asked"
        self.asked += 1
        return self.asked > self.takes

    def finish(self) -> None:
        if self.is_under_way:
            self.events.append("finish")
        self.is_under_way = False


@pytest.mark.parametrize(
    ("takes", "stop_after_first", "expected"),
    [
        (1, False, ["2", "save 2", "3", "finish", "4", "save 4", "5", "finish", "save 5", "finish"]),
        (9, False, ["2", "save 2", "3", "4", "finish", "save 4", "5", "finish", "save 5", "finish"]),
        (9, True, ["2", "save 2", "finish"]),
    ],
)
def test_a_save_is_finished_when_it_is_written_or_must_be(
    takes: int, stop_after_first: bool, expected: list[str]
) -> None:
    saver: Any = BackgroundSaver(takes)
    save = Save(
        saver, timed=lambda action: action, due=Due(FEED, every_steps=2), stop_after_first=stop_after_first
    )
    result: Any = None
    for step in range(2, 6):
        saver.events.append(str(step))
        if save.after_step(Step(progress=Progress(step=step), result=result, time_s=0.0, is_last=step == 5)):
            break
    assert saver.events == expected
