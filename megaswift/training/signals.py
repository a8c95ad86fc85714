"""Being told to stop: SIGTERM and SIGUSR1 become a save and a clean exit after the step that is under way."""

import signal
from types import FrameType, TracebackType
from typing import Any

from megaswift.logs import get_logger

logger = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm sends either before the end of a job (sbatch --signal)


class Interrupt:
    """Remembers that this rank was told to stop; a second signal acts at once, as the system meant it."""

    def __init__(self) -> None:
        self.seen = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        logger.warning("%s: saving after this step, then stopping", signal.Signals(number).name)
        self.seen = True
        signal.signal(number, signal.SIG_DFL)
