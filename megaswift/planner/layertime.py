"""Time of one layer for one micro batch: arithmetic, traffic, and the communication that nothing hides."""

from dataclasses import dataclass

from megaswift.planner.calibration import TimeConstants
from megaswift.planner.collectives import exchange, gather, group_rate, latency
from megaswift.planner.job import Candidate, Job
from megaswift.planner.machine import Machine
from megaswift.planner.parts import LayerKind
from megaswift.planner.software import Software
from megaswift.planner.work import (
    Passes,
    attention_gemms,
    core_attention,
    dequantisation,
    elementwise,
    gemm_passes,
    mlp_gemms,
)


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Seconds of one layer for one micro batch, both passes."""

    compute: float
    forward: float  # the part of compute that full recomputation repeats
    tensor: float
    context: float
    experts: float

    @property
    def total(self) -> float:
        """Seconds of the layer."""
        return self.compute + self.tensor + self.context + self.experts


def layer_time(
    job: Job,
    candidate: Candidate,
    kind: LayerKind,
    machine: Machine,
    software: Software,
    constants: TimeConstants,
) -> LayerTime:
    """Return the time of one layer of a kind."""
    device, precision = machine.device, candidate.precision
    projections = gemm_passes(
        attention_gemms(job, candidate, kind), job, precision, device, software, constants
    )
    mlp = gemm_passes(mlp_gemms(job, candidate, kind), job, precision, device, software, constants)
    attention = core_attention(job, candidate, kind, device, software, constants)
    small = elementwise(job, candidate, kind, device, software, constants)
    forward = projections.forward + mlp.forward + attention.forward + small.forward
    compute = forward + projections.backward + mlp.backward + attention.backward + small.backward
    full = candidate.recompute == "full"
    if full:
        compute += forward
    if job.four_bits or candidate.four_bits:
        compute += (2 + full) * dequantisation(candidate, kind, device, constants)
    if candidate.recompute == "selective":
        compute += (
            0.3 * small.forward if kind.is_moe else mlp.forward
        )  # the experts' activation, or the dense part
    elif candidate.recompute == "alternate":
        compute += 0.5 * (projections.forward + mlp.forward) + small.forward
    if not software.cuda_graphs:
        host = constants.host_moe_layer_s if kind.is_moe else constants.host_layer_s
        compute = max(compute, host * (4 / 3 if full else 1))
    return LayerTime(
        compute=compute,
        forward=forward,
        tensor=_tensor(job, candidate, kind, machine, software, constants),
        context=_context(job, candidate, kind, attention, machine, constants),
        experts=_experts(job, candidate, kind, machine, software, constants),
    )


def _forwards(candidate: Candidate) -> int:
    return 2 if candidate.recompute == "full" else 1


def _tensor(
    job: Job,
    candidate: Candidate,
    kind: LayerKind,
    machine: Machine,
    software: Software,
    constants: TimeConstants,
) -> float:
    """Attention and the feed-forward part each gather and reduce-scatter once a pass (or reduce: the same bytes)."""
    tp = candidate.layout.tp
    if tp == 1:
        return 0.0
    whole = 2 * candidate.tokens(job) * job.meta.hidden_size
    blocks = 1 if kind.is_moe and candidate.sequence_shards > 1 and not kind.shared_experts else 2
    one = gather(machine, whole, size=tp, stride=1, constants=constants)
    time = 2 * blocks * (_forwards(candidate) + 1) * one
    return time * (1 - constants.tensor_hidden) if software.overlap_tensor else time


def _context(
    job: Job,
    candidate: Candidate,
    kind: LayerKind,
    attention: Passes,
    machine: Machine,
    constants: TimeConstants,
) -> float:
    """Exposed communication of context parallelism: heads exchanged, or keys and values gathered or passed round."""
    layout, meta, forwards = candidate.layout, job.meta, _forwards(candidate)
    if layout.cp == 1:
        return 0.0
    size = candidate.tokens(job)
    if candidate.cp_comm == "a2a":
        sent = 2 * 2 * size * (meta.num_heads + kind.kv_heads) * kind.head_dim / layout.tp
        return (forwards + 1) * exchange(machine, sent, size=layout.cp, stride=layout.tp, constants=constants)
    block = 2 * 2 * size * (meta.num_heads if meta.mla else kind.kv_heads) * kind.head_dim / layout.tp
    rate = group_rate(machine, layout.cp, layout.tp, constants)
    steps = layout.cp - 1
    one = steps * (block / rate + latency(machine, layout.cp, layout.tp, constants))
    if candidate.cp_comm == "all_gather":
        return (forwards + 2) * one
    # A ring passes the next block on while it works on this one; the gradients of keys and values travel too.
    hidden = steps / layout.cp
    forward = max(0.0, one - hidden * attention.forward)
    return forwards * forward + max(0.0, 2 * one - hidden * attention.backward)


def _experts(
    job: Job,
    candidate: Candidate,
    kind: LayerKind,
    machine: Machine,
    software: Software,
    constants: TimeConstants,
) -> float:
    """Exposed dispatch and combination of routed tokens, once each a pass."""
    layout, moe = candidate.layout, job.meta.moe
    if not kind.is_moe or moe is None:
        return 0.0
    sent = 2 * candidate.routed_tokens(job) / layout.etp * job.meta.hidden_size
    link_copies = network_copies = 1.0
    if software.deduplicated_dispatch:
        nodes = max(1.0, layout.ep * layout.etp / machine.per_node)
        link_copies = _distinct(layout.ep, moe.topk) / moe.topk
        network_copies = _distinct(nodes, moe.topk) / moe.topk
    one = exchange(
        machine,
        sent,
        size=layout.ep,
        stride=layout.etp,
        link_copies=link_copies,
        network_copies=network_copies,
        constants=constants,
    )
    one += gather(machine, sent * layout.etp, size=layout.etp, stride=1, constants=constants)
    exposed = 2 * (_forwards(candidate) + 1) * one
    return exposed * (1 - constants.experts_hidden) if software.overlap_experts else exposed


def _distinct(places: float, choices: int) -> float:
    """Return the expected number of distinct places of `choices` made at random."""
    return places * (1 - (1 - 1 / places) ** choices)
