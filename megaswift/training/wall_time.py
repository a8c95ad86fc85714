"""The end of a job's time as one more reason to save and stop."""

from collections.abc import Callable

from megaswift.launch.governor import Governor
from megaswift.logs import get_logger
from megaswift.training.due import Due
from megaswift.training.loop import Progress, Step
from megaswift.training.signals import Interrupt

logger = get_logger(__name__)


class WallTime:
    """Measures steps and saves, and asks for the stop when one more step could be too many; the last of the callbacks."""

    def __init__(
        self,
        signals: Interrupt,
        governor: Governor,
        *,
        start: Progress,
        saves: Due,
        validates: Due,
        under_way: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        """`signals` are the other reasons to stop; the run is at `start`; `under_way` says whether a save is.

        `clock` gives seconds since the epoch.
        """
        self._signals, self._governor, self._clock = signals, governor, clock
        self._progress, self._saves, self._validates = start, saves, validates
        self._under_way = under_way
        self._mark = governor.start
        self._saving_s = 0.0
        self._told = False

    @property
    def seen(self) -> bool:
        """Whether this rank was told to stop, or its job ends soon; asked before each step."""
        late = self._governor.must_stop(
            self._clock(),
            save_due=self._saves.may_be_after(self._progress),
            save_under_way=self._under_way(),
            validation_due=self._validates.may_be_after(self._progress),
        )
        if late and not self._told:
            seconds = self._governor.save_s()
            logger.warning(
                "the job's time ends soon (%.0f s are set aside for saving): stopping after this step",
                seconds,
            )
            self._told = True
        return late or self._signals.seen

    @property
    def signalled(self) -> bool:
        """Whether a signal told this rank to stop."""
        return self._signals.seen

    def timed(self, save: Callable[[Progress], float | None]) -> Callable[[Progress], float | None]:
        """Return `save`, measured; it returns the seconds that a save has taken, where one is complete now.

        These are what the last save takes. Until then, one in the background has not been measured.
        """

        def measured(progress: Progress) -> float | None:
            began = self._clock()
            whole_s = save(progress)
            self._saving_s += self._clock() - began
            if whole_s is not None:
                self._governor = self._governor.after_save(whole_s)
            return whole_s

        return measured

    def after_step(self, step: Step) -> bool:
        """Measure a step with all that came with it, but for the save."""
        now = self._clock()
        seconds = now - self._mark - self._saving_s
        if self._validates.at(step.progress):
            self._governor = self._governor.after_validation(seconds)
        else:
            self._governor = self._governor.after_step(seconds)
        self._mark, self._saving_s, self._progress = now, 0.0, step.progress
        return False
