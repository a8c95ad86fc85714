"""A loss that jumps and stays up: the run ends before it overwrites its last good checkpoints."""

from collections import deque
from statistics import median

from megaswift.errors import TrainingError
from megaswift.logs import get_logger
from megaswift.parallel.agreement import alike
from megaswift.training.loop import Step

logger = get_logger(__name__)

REMEMBERED = 100  # steps whose median is the usual loss
FEWEST = 20  # steps before there is one
IN_A_ROW = 10  # steps above it that are no accident of a few batches


class SpikeGuard:
    """Ends the run after IN_A_ROW steps whose loss is above `factor` times the usual; before the callback that saves."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=REMEMBERED)
        self._above = 0

    def after_step(self, step: Step) -> bool:
        """Look at the loss of a step; raises TrainingError, on every rank alike."""
        loss = step.result.loss
        usual = median(self._losses) if len(self._losses) >= FEWEST else float("inf")
        if loss <= self._factor * usual:
            self._losses.append(loss)
            self._above = 0
            return False
        self._above += 1
        if self._above == 1:
            logger.warning("step %d: the loss is %.4g, and usually %.4g", step.progress.step, loss, usual)
        if self._above == IN_A_ROW:
            alike(lambda: self._give_up(step.progress.step, loss, usual))
        return False

    def _give_up(self, step: int, loss: float, usual: float) -> None:
        raise TrainingError(
            f"loss={loss:.4g} at step {step}: for {IN_A_ROW} steps it is above {self._factor:g} x {usual:.4g}, the median before "
            f"(spike_factor). Resume from a checkpoint before step {step - IN_A_ROW + 1} with a lower --learning_rate, or "
            "without the rows since then."
        )
