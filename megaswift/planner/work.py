"""Arithmetic and memory traffic of a layer, and how long a device takes for them.

Letters: T tokens of a micro batch on this rank, D hidden, F ffn, H heads, G kv groups, K head size, V vocabulary.
Forward and backward are kept apart: recomputation repeats the one, frozen weights drop a third of the other.
"""

from dataclasses import dataclass, replace

from megaswift.planner.calibration import TimeConstants
from megaswift.planner.job import Candidate, Job
from megaswift.planner.machine import Device
from megaswift.planner.parts import LayerKind
from megaswift.planner.software import Software

OPERAND_BYTES = {
    "fp32": 4.0,
    "fp8": 1.0,
    "mxfp8": 1.0,
    "nvfp4": 0.5,
}  # of a GEMM operand's element; 2 otherwise
CAST = ("fp8", "mxfp8", "nvfp4")  # precisions whose operands are cast from bf16


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Seconds of the forward and of the backward pass."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Seconds of both passes."""
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """`count` products of [m, k] with [k, n]."""

    m: float
    n: float
    k: float
    count: float = 1.0


def plain_precision(candidate: Candidate) -> str:
    """Return the precision of what FP8 recipes leave alone: attention, the output layer."""
    return "bf16" if candidate.precision in CAST else candidate.precision


def rate_of(device: Device, precision: str, shares: dict[str, float], constants: TimeConstants) -> float:
    """Return FLOP/s under sustained load: the peak, the generation's share of it, and the device's own factor.

    A generation without a share of its own takes the nearest one's.
    """
    known = {"volta": "ampere", "turing": "ampere", "ada": "ampere", "cpu": "ampere"}
    generation = known.get(device.generation, device.generation)
    if generation == "ampere" and precision in CAST:
        generation = "hopper"
    kind = precision if precision in CAST else "16"
    share = shares[generation] if generation in shares else shares[f"{generation} {kind}"]
    factor = constants.device.get(f"{device.name} {precision}", constants.device.get(device.name, 1.0))
    return device.peak(precision) * share * factor


def gemm_passes(
    gemms: list[Gemm], job: Job, precision: str, device: Device, software: Software, constants: TimeConstants
) -> Passes:
    """Return the time of GEMMs: arithmetic at a share of the peak, and the operand traffic that it does not hide."""
    rate = rate_of(device, precision, constants.gemm, constants)
    size = OPERAND_BYTES.get(precision, 2.0)
    bandwidth = device.memory_bytes_s * constants.memory / constants.gemm_traffic
    accumulated = (2 if software.wgrad_fusion else 3) * software.gradient_bytes
    forward = backward = 0.0
    for gemm in gemms:
        arithmetic = 2 * gemm.m * gemm.n * gemm.k * gemm.count / rate
        inputs, outputs = gemm.m * gemm.k * gemm.count, gemm.m * gemm.n * gemm.count
        weights = gemm.n * gemm.k * gemm.count
        forward += arithmetic + (size * (inputs + weights) + 2 * outputs) / bandwidth
        backward += arithmetic + (size * (outputs + weights) + 2 * inputs) / bandwidth
        if not job.frozen:
            by_weights = arithmetic + (size * (inputs + outputs) + accumulated * weights) / bandwidth
            backward += job.drawn_share * by_weights
    return Passes(forward=forward, backward=backward)


def attention_gemms(job: Job, candidate: Candidate, kind: LayerKind) -> list[Gemm]:
    """Return the projections of attention on one rank."""
    meta, tp, size = job.meta, candidate.layout.tp, candidate.tokens(job)
    if meta.mla is not None:
        mla = meta.mla
        down = (mla.q_rank or 0) + mla.kv_rank + mla.rope_head_dim
        query, value = mla.nope_head_dim + mla.rope_head_dim, mla.nope_head_dim + mla.v_head_dim
        return [
            Gemm(m=size / candidate.sequence_shards, n=down, k=meta.hidden_size),
            Gemm(m=size, n=meta.num_heads * query / tp, k=mla.q_rank or meta.hidden_size),
            Gemm(m=size, n=meta.num_heads * value / tp, k=mla.kv_rank),
            Gemm(m=size, n=meta.hidden_size, k=meta.num_heads * mla.v_head_dim / tp),
        ]
    query, key = meta.num_heads * kind.head_dim, kind.kv_heads * kind.head_dim
    projected = query * (2 if meta.attention.output_gate else 1) + kind.kv_projections * key
    return [
        Gemm(m=size, n=projected / tp, k=meta.hidden_size),
        Gemm(m=size, n=meta.hidden_size, k=query / tp),
    ]


def mlp_gemms(job: Job, candidate: Candidate, kind: LayerKind) -> list[Gemm]:
    """Return the dense, shared and routed feed-forward GEMMs on one rank."""
    meta, layout, size = job.meta, candidate.layout, candidate.tokens(job)
    gates = 2 if meta.gated_mlp else 1
    moe = meta.moe if kind.is_moe else None
    gemms = []
    for ffn in (kind.ffn, (moe.shared_ffn_hidden_size if moe else 0)):
        if ffn:
            gemms.append(Gemm(m=size, n=gates * ffn / layout.tp, k=meta.hidden_size))
            gemms.append(Gemm(m=size, n=meta.hidden_size, k=ffn / layout.tp))
    if moe is not None:
        local = moe.num_experts / layout.ep
        rows, ffn_local = candidate.routed_tokens(job) / local, moe.ffn_hidden_size / layout.etp
        gemms.append(Gemm(m=rows, n=gates * ffn_local, k=meta.hidden_size, count=local))
        gemms.append(Gemm(m=rows, n=meta.hidden_size, k=ffn_local, count=local))
    return gemms


def core_attention(
    job: Job,
    candidate: Candidate,
    kind: LayerKind,
    device: Device,
    software: Software,
    constants: TimeConstants,
) -> Passes:
    """Return the time of the scores, their softmax and the weighted sum."""
    meta, precision = job.meta, plain_precision(candidate)
    length = min(job.seq_len, job.document_len or job.seq_len)
    span = min(length, kind.span or length)
    pairs = candidate.tokens(job) * span * meta.num_heads / candidate.layout.tp
    mla = meta.mla
    width = mla.nope_head_dim + mla.rope_head_dim + mla.v_head_dim if mla else 2 * kind.head_dim
    flops = 2 * pairs * width
    if software.attention.startswith("flash"):
        # Causal: half of the scores where the span is the sequence. The backward pass has five products for two
        # (FlashAttention, arXiv:2205.14135, appendix B).
        flops *= 1 - 0.5 * span / length
        rate = rate_of(device, precision, constants.attention, constants)
        rate *= constants.kernels.get(f"{device.generation} {software.attention}", 1.0)
        return Passes(forward=flops / rate, backward=2.5 * flops / rate)
    rate = rate_of(device, precision, constants.gemm, constants)
    traffic = constants.scores_traffic if software.attention == "scores" else constants.scores_fused_traffic
    traffic *= 1.5 if software.dropout else 1.0
    moved = traffic * pairs / (device.memory_bytes_s * constants.memory)
    return Passes(forward=flops / rate + 0.4 * moved, backward=2 * flops / rate + 0.6 * moved)


def elementwise(
    job: Job,
    candidate: Candidate,
    kind: LayerKind,
    device: Device,
    software: Software,
    constants: TimeConstants,
) -> Passes:
    """Return the time of norms, rotary positions, activations, residual additions, permutation and FP8 casts.

    Fused kernels read and write each tensor once. Bytes a token, forward: 8 D for two norms, 12 D for two additions,
    5 H K for rotary positions, 6 F for a gated activation; backward twice that.
    """
    meta, tp, size = job.meta, candidate.layout.tp, candidate.tokens(job)
    hidden, query = meta.hidden_size / candidate.sequence_shards, meta.num_heads * kind.head_dim / tp
    gates = 2 if meta.gated_mlp else 1
    ffn = kind.ffn / tp
    rows = 0.0
    if kind.is_moe and meta.moe is not None:
        rows = candidate.routed_tokens(job) / size
        ffn += meta.moe.shared_ffn_hidden_size / tp + rows * meta.moe.ffn_hidden_size / candidate.layout.etp
    eager = 1.0 if software.fused_elementwise else constants.eager_traffic
    forward = 8 * hidden + eager * (12 * hidden + 5 * query + 2 * (gates + 1) * ffn)
    forward += 6 * hidden if software.dropout else 0.0
    backward = 2 * forward
    if not software.fused_norm:
        forward += 0.4 * constants.eager_norm_traffic * hidden
        backward += 0.6 * constants.eager_norm_traffic * hidden
    # Permuting and returning a routed row reads and writes it.
    forward += 8 * rows * meta.hidden_size
    backward += 8 * rows * meta.hidden_size
    if candidate.precision in CAST:
        # A cast reads 2 bytes and writes both orientations; the norms write FP8 themselves.
        forward += 4 * (query + ffn)
        backward += 4 * (2 * meta.hidden_size + query + gates * ffn)
    bandwidth = device.memory_bytes_s * constants.memory
    return Passes(forward=size * forward / bandwidth, backward=size * backward / bandwidth)


def head_passes(
    job: Job, candidate: Candidate, device: Device, software: Software, constants: TimeConstants
) -> Passes:
    """Return the time of the output layer and the loss; the output layer stays in 16 bits under FP8 recipes."""
    size, vocab = candidate.tokens(job), job.meta.vocab_size / candidate.layout.tp
    gemm = Gemm(m=size, n=vocab, k=job.meta.hidden_size)
    job = replace(job, drawn_layers=None)  # the output layer always trains
    time = gemm_passes([gemm], job, plain_precision(candidate), device, software, constants)
    # The loss reads and writes what it keeps once in each direction.
    moved = 2 * software.loss_bytes * size * vocab
    if software.loss_tokens is not None and not job.frozen:
        # The fp32 sum of the weight's gradient is read and written for every piece.
        moved += 8 * job.meta.hidden_size * vocab * size / software.loss_tokens
    moved /= 2 * device.memory_bytes_s * constants.memory
    return Passes(forward=time.forward + moved, backward=time.backward + moved)


def model_flops(job: Job) -> float:
    """Return the FLOPs of one optimizer step: forward and twice that backward, causal attention, no recomputation."""
    meta, parts = job.meta, job.parts
    active = float(parts.embedding)  # the output layer; looking up an embedding computes nothing
    scores = 0.0
    for index in parts.layers:
        kind = parts.kinds[index]
        width = (
            kind.head_dim * 2
            if meta.mla is None
            else meta.mla.nope_head_dim + meta.mla.rope_head_dim + meta.mla.v_head_dim
        )
        active += kind.attention + kind.attention_replicated + kind.mlp + kind.shared_experts
        if kind.is_moe and meta.moe is not None:
            active += kind.experts * meta.moe.topk / meta.moe.num_experts
        length = min(job.seq_len, job.document_len or job.seq_len)
        span = min(length, kind.span or length)
        scores += meta.num_heads * width * span * (1 - 0.5 * span / length)
    return 3 * job.tokens * 2 * (active + scores)


def dequantisation(candidate: Candidate, kind: LayerKind, device: Device, constants: TimeConstants) -> float:
    """Return the time of turning one layer's matrices from four bits into numbers once: half a byte in, two or four out."""
    layout = candidate.layout
    dense = (kind.total - kind.experts - kind.replicated) / layout.tp
    elements = dense + kind.experts / (layout.etp * layout.ep)
    return (
        elements
        * (0.5 + OPERAND_BYTES.get(plain_precision(candidate), 2.0))
        / (device.memory_bytes_s * constants.memory)
    )
