"""Time of one optimizer step: the slowest stage's micro batches, the bubble, and communication that nothing hides."""

from dataclasses import dataclass, fields
from functools import cached_property

from megaswift.planner.collectives import gather, inside_node
from megaswift.planner.costs import Costs
from megaswift.planner.job import Candidate
from megaswift.planner.memory import recomputed_share
from megaswift.planner.stages import Stage

HOST_LINK_BYTES_S = (
    25e9  # device to host, one direction: PCIe 4 x16 (32 GB/s by its specification) as copies reach it
)
HOST_ADAM_BYTES_S = (
    40e9  # a rank's share of the host's memory bandwidth: 8 ranks, two sockets of 8 DDR4-3200 channels
)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step by what they are spent on."""

    compute: float  # of the slowest stage, all micro batches
    tensor: float  # exposed tensor-parallel communication
    context: float  # exposed context-parallel communication
    experts: float  # exposed dispatch and combination of routed tokens
    pipeline: float  # exposed transfers between stages
    bubble: float  # stages wait for the first and the last micro batch
    data: float  # exposed gradient reduction and parameter gathering
    optimizer: float
    overhead: float

    @cached_property
    def total(self) -> float:
        """Seconds of the step."""
        return float(sum(getattr(self, item.name) for item in fields(self)))


def step_time(costs: Costs, candidate: Candidate, stages: tuple[Stage, ...]) -> StepTime:
    """Return the time of one optimizer step."""
    job, layout = costs.job, candidate.layout
    layers, head = costs.layers(candidate), costs.head(candidate)
    count = candidate.micro_batches(job)
    totals = []
    for stage in stages:
        total = sum(number * layers[kind].total for kind, number in stage.kinds)
        if candidate.recompute == "full" and candidate.recompute_layers is not None:
            spared = 1 - recomputed_share(candidate, stage)
            total -= spared * sum(number * layers[kind].forward for kind, number in stage.kinds)
        if stage.last:
            total += (1 + job.mtp_layers) * head + job.mtp_layers * layers[job.parts.layers[-1]].total
        totals.append(total)
    slowest = max(range(len(stages)), key=totals.__getitem__)
    kinds = stages[slowest].kinds
    tensor = count * sum(number * layers[kind].tensor for kind, number in kinds)
    context = count * sum(number * layers[kind].context for kind, number in kinds)
    experts = count * sum(number * layers[kind].experts for kind, number in kinds)
    data, optimizer = _data_and_optimizer(costs, candidate, stages, totals[slowest])
    return StepTime(
        compute=count * totals[slowest] - tensor - context - experts,
        tensor=tensor,
        context=context,
        experts=experts,
        pipeline=_pipeline(costs, candidate),
        bubble=(sum(totals) - totals[slowest]) / layout.vpp,
        data=data,
        optimizer=optimizer,
        overhead=costs.time_constants.step_overhead_s,
    )


def _pipeline(costs: Costs, candidate: Candidate) -> float:
    """Exposed transfers between stages: every micro batch is received and sent on, forward and backward."""
    job, machine, constants, layout = costs.job, costs.machine, costs.time_constants, candidate.layout
    if layout.pp == 1:
        return 0.0
    size = 2 * candidate.tokens(job) * job.meta.hidden_size / candidate.sequence_shards
    if inside_node(machine, 2, layout.world // layout.pp):
        one = size / (machine.device.link_bytes_s * constants.link) + constants.link_latency_s
    else:
        one = size / (machine.device.network_bytes_s * constants.network) + constants.network_latency_s
    exposed = 1 - constants.pipe_hidden if layout.vpp > 1 else 1.0
    return 2 * candidate.micro_batches(job) * layout.vpp * one * exposed


def _data_and_optimizer(
    costs: Costs, candidate: Candidate, stages: tuple[Stage, ...], micro_batch_s: float
) -> tuple[float, float]:
    """Return the exposed gradient reduction and parameter gathering, and the time of the optimizer, of the worst stage."""
    job, machine, software, constants = costs.job, costs.machine, costs.software, costs.time_constants
    layout, shards = candidate.layout, candidate.layout.dp * candidate.layout.cp
    expert_shards, expert_stride = max(1, layout.edp), layout.etp * layout.ep
    communication = traffic = host = 0.0
    for stage in stages[:1] + stages[-1:] if len(stages) > 2 else stages:
        params = costs.params(layout, stage)
        dense, experts = params.trained, params.trained_experts
        # Gradients are reduced once; bf16 weights gathered once, or once a pass where they are sharded too.
        each = software.gradient_bytes + 2 * (2 if candidate.fully_sharded else 1)
        time = gather(machine, each * dense, size=shards, stride=layout.tp, constants=constants)
        if experts:
            time += gather(
                machine, each * experts, size=expert_shards, stride=expert_stride, constants=constants
            )
        communication = max(communication, time)
        # The norm reads gradients once; Adam reads gradient, master weight and moments, and writes all but the first.
        own = dense / shards + experts / expert_shards
        traffic = max(traffic, software.gradient_bytes * (dense + experts) + 34 * own)
        # Offloaded: fp32 gradients down, bf16 weights up, Adam on the host.
        host = max(host, 6 * own / HOST_LINK_BYTES_S + 34 * own / HOST_ADAM_BYTES_S)
    beside = micro_batch_s
    if candidate.fully_sharded:
        communication *= candidate.micro_batches(job)
        beside *= candidate.micro_batches(job)
    if software.overlap_data:
        communication = max(communication * (1 - constants.data_hidden), communication - beside)
    optimizer = traffic / (machine.device.memory_bytes_s * constants.memory)
    if candidate.offload_optimizer:
        optimizer += host
    return communication, optimizer
