"""What candidates of one job cost on one machine, remembered by what each part depends on."""

from megaswift.parallel.layout import Layout
from megaswift.planner.calibration import MEMORY, TIME, MemoryConstants, TimeConstants
from megaswift.planner.job import Candidate, Job
from megaswift.planner.layertime import LayerTime, layer_time
from megaswift.planner.machine import Machine
from megaswift.planner.memory import Memory, Saved, add_up, saved
from megaswift.planner.software import Software
from megaswift.planner.stages import Stage, StageParams, stage_params, stages_of
from megaswift.planner.work import head_passes


class Costs:
    """Layer times, kept activations, stages and parameters: thousands of candidates share each of them."""

    def __init__(
        self,
        job: Job,
        machine: Machine,
        software: Software,
        *,
        time: TimeConstants = TIME,
        memory: MemoryConstants = MEMORY,
    ) -> None:
        """Remember nothing yet."""
        self.job, self.machine, self.software = job, machine, software
        self.time_constants, self.memory_constants = time, memory
        self._layers: dict[tuple[object, ...], tuple[LayerTime, ...]] = {}
        self._heads: dict[tuple[object, ...], float] = {}
        self._saved: dict[tuple[object, ...], tuple[Saved, ...]] = {}
        self._stages: dict[tuple[object, ...], tuple[Stage, ...]] = {}
        self._params: dict[tuple[object, ...], StageParams] = {}

    def layers(self, candidate: Candidate) -> tuple[LayerTime, ...]:
        """Return the time of a layer of every kind."""
        key = (*_axes(candidate), candidate.cp_comm)
        if key not in self._layers:
            self._layers[key] = tuple(
                layer_time(self.job, candidate, kind, self.machine, self.software, self.time_constants)
                for kind in self.job.parts.kinds
            )
        return self._layers[key]

    def head(self, candidate: Candidate) -> float:
        """Return the time of the output layer and the loss for one micro batch."""
        layout = candidate.layout
        key = (layout.tp, layout.cp, candidate.micro_batch, candidate.precision)
        if key not in self._heads:
            device = self.machine.device
            self._heads[key] = head_passes(
                self.job, candidate, device, self.software, self.time_constants
            ).both
        return self._heads[key]

    def stages(self, layout: Layout) -> tuple[Stage, ...]:
        """Return the stages of a layout; raises ConfigError where the layers do not divide."""
        key = (layout.pp, layout.vpp, layout.pp_first, layout.pp_last)
        if key not in self._stages:
            self._stages[key] = stages_of(self.job.parts, layout)
        return self._stages[key]

    def params(self, layout: Layout, stage: Stage) -> StageParams:
        """Return the parameters that a rank of a stage holds."""
        key = (layout.tp, layout.ep, layout.etp, stage.first, stage.last, stage.kinds)
        if key not in self._params:
            self._params[key] = stage_params(self.job, layout, stage)
        return self._params[key]

    def memory(self, candidate: Candidate, stages: tuple[Stage, ...]) -> Memory:
        """Return the memory of the fullest stage; between the second and the last stage none can be fuller."""
        key = _axes(candidate)
        if key not in self._saved:
            self._saved[key] = tuple(
                saved(self.job, candidate, kind, self.software, self.memory_constants)
                for kind in self.job.parts.kinds
            )
        layers = self._saved[key]
        few = stages if len(stages) <= 3 else (stages[0], stages[1], stages[-1])
        found = [
            add_up(
                self.job,
                candidate,
                stage,
                layers,
                self.params(candidate.layout, stage),
                software=self.software,
                constants=self.memory_constants,
            )
            for stage in few
        ]
        return max(found, key=lambda one: one.total)


def _axes(candidate: Candidate) -> tuple[object, ...]:
    """Return what a layer's time and memory depend on."""
    layout = candidate.layout
    return (
        layout.tp,
        layout.cp,
        layout.ep,
        layout.etp,
        layout.sequence_parallel,
        candidate.micro_batch,
        candidate.precision,
        candidate.recompute,
    )
