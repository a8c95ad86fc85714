"""A plan: one candidate with its memory and its time."""

from dataclasses import dataclass, field
from functools import cached_property

from megaswift.planner.costs import Costs
from megaswift.planner.job import Candidate, Job
from megaswift.planner.machine import GIB, Machine
from megaswift.planner.memory import Memory
from megaswift.planner.steptime import StepTime, step_time
from megaswift.planner.work import model_flops, plain_precision

# Of the device's memory, what a plan must leave free: the largest error of the memory model on held-out runs is 6 %, and
# on runs of Megatron-Core with Transformer Engine 2 % (tests/harness/bench_plan.py).
MARGIN = 0.03
SIMPLER = 1.005  # a plan with one more axis in use must be this much faster to be preferred


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way of running a job, predicted."""

    candidate: Candidate
    memory: Memory  # of the fullest stage
    fits: bool
    costs: Costs = field(repr=False, compare=False)

    @property
    def memory_gib(self) -> float:
        """Memory of the fullest rank."""
        return self.memory.total / GIB

    @cached_property
    def time(self) -> StepTime:
        """Time of the step; nobody asks for that of most plans that do not fit."""
        return step_time(self.costs, self.candidate, self.costs.stages(self.candidate.layout))

    @cached_property
    def cost(self) -> float:
        """What plans are ranked by."""
        return cost_of(self.candidate, self.time)


def cost_of(candidate: Candidate, time: StepTime) -> float:
    """Return the seconds of the step, a little more for every axis in use."""
    layout = candidate.layout
    in_use = [
        layout.tp > 1,
        layout.pp > 1,
        layout.vpp > 1,
        layout.cp > 1,
        layout.ep > 1,
        layout.etp > 1,
        layout.pp_first is not None,
        candidate.recompute != "none",
        candidate.micro_batch > 1,
    ]
    return time.total * SIMPLER ** sum(in_use)


def memory_limit(machine: Machine) -> float:
    """Return the bytes of a device that a plan may fill."""
    return machine.device.memory_gib * GIB * max(0.0, 1 - MARGIN - machine.kept_share)


def evaluate(costs: Costs, candidate: Candidate) -> Plan:
    """Return the plan of a candidate; raises ConfigError where its layers do not divide."""
    stages = costs.stages(candidate.layout)
    memory = costs.memory(candidate, stages)
    return Plan(
        candidate=candidate,
        memory=memory,
        fits=memory.total <= memory_limit(costs.machine),
        costs=costs,
    )


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a step time means for a job on a machine."""

    tokens_s_device: float
    model_tflops_device: float  # causal attention, no recomputation
    mfu: float  # of the 16-bit peak (fp32 where that is trained in), also with FP8 GEMMs


def rates(plan: Plan, job: Job, machine: Machine) -> Rates:
    """Return tokens per second and model FLOP/s of one device."""
    per_device = plan.time.total * machine.num_devices
    flops = model_flops(job) / per_device
    return Rates(
        tokens_s_device=job.tokens / per_device,
        model_tflops_device=flops / 1e12,
        mfu=flops / machine.device.peak(plain_precision(plan.candidate)),
    )
