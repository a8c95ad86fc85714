"""Memory of one rank by component, for every pipeline stage.

Letters: T tokens of a micro batch on this rank, D hidden, F ffn, H heads, G kv groups, K head size, V vocabulary,
R tokens routed to this rank's experts. What a layer keeps for its backward pass is counted from the tensors that the
modules of Megatron-Core 0.16.1 save; activations are bf16 unless said.
"""

from dataclasses import dataclass

from megaswift.planner.calibration import MEMORY, MemoryConstants
from megaswift.planner.job import Candidate, Job
from megaswift.planner.machine import GIB
from megaswift.planner.parts import LayerKind
from megaswift.planner.software import Software
from megaswift.planner.stages import Stage, StageParams, in_flight, stage_params

HALF = 2  # bytes of a bf16 element
WIDE = 4  # of an fp32 element
FOUR_BITS = (
    0.5 + 1 / 64
)  # a code, and a byte of scale for a block of 64 (models/nf4.py; scales of scales are left out)
MASTER = 12  # fp32 master weight and two Adam moments
# Bytes an element that FP8 recipes keep beside the bf16 weight: both orientations (Transformer Engine, linear modules).
WEIGHT_COPIES = {"fp8": 2.0, "mxfp8": 2.0, "nvfp4": 1.125}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest rank of one stage, by component."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    expert_tokens: float  # activations of routed tokens
    logits: float
    buffers: float  # gradient placeholders, gathered sequences, gradients of the layer in work
    slack: float  # allocator rounding and fragmentation
    context: float  # outside the allocator

    @property
    def allocated(self) -> float:
        """Bytes in tensors at the peak."""
        states = self.weights + self.gradients + self.optimizer
        return states + self.activations + self.expert_tokens + self.logits + self.buffers

    @property
    def total(self) -> float:
        """Bytes of device memory."""
        return self.allocated + self.slack + self.context


def memory_of(
    job: Job, candidate: Candidate, stage: Stage, *, software: Software, constants: MemoryConstants = MEMORY
) -> Memory:
    """Return the memory of one pipeline stage's fullest rank."""
    layers = tuple(saved(job, candidate, kind, software, constants) for kind in job.parts.kinds)
    params = stage_params(job, candidate.layout, stage)
    return add_up(job, candidate, stage, layers, params, software=software, constants=constants)


def add_up(
    job: Job,
    candidate: Candidate,
    stage: Stage,
    layers: tuple["Saved", ...],
    params: StageParams,
    *,
    software: Software,
    constants: MemoryConstants,
) -> Memory:
    """Return the memory of a stage from what a layer of every kind keeps and from the stage's parameters."""
    weights, gradients, optimizer = _states(job, candidate, stage, params, software)
    flight = in_flight(candidate.layout, stage.index, candidate.micro_batches(job))
    repeated = recomputed_share(candidate, stage)
    layer_input = (
        _element(candidate) * candidate.tokens(job) * job.meta.hidden_size / candidate.sequence_shards
    )
    activations = routed = in_work = work = 0.0
    for kind, count in stage.kinds:
        one = layers[kind]
        activations += flight * count * (one.dense * (1 - repeated) + layer_input * repeated)
        routed += flight * count * one.routed * (1 - repeated)
        in_work = max(in_work, one.dense + one.routed)
        work = max(work, one.workspace)
    work += in_work if repeated else 0.0
    logits, buffers = 0.0, _placeholders(job, candidate, stage, software)
    head_logits, head_buffers = _head(job, candidate, software) if stage.last else (0.0, 0.0)
    if head_logits + head_buffers > work:
        logits, buffers = head_logits, buffers + head_buffers
    else:
        buffers += work
    moving = activations + routed + logits + buffers
    scattered = activations + routed if flight > 1 and not software.expandable_segments else 0.0
    return Memory(
        stage=stage.index,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        expert_tokens=routed,
        logits=logits,
        buffers=buffers,
        slack=constants.rounding * moving + constants.fragmentation * scattered,
        context=constants.context_gib * GIB,
    )


def recomputed_share(candidate: Candidate, stage: Stage) -> float:
    """Return the share of a stage's layers that keep their input only."""
    if candidate.recompute != "full":
        return 0.0
    if candidate.recompute_layers is None:
        return 1.0
    return min(1.0, candidate.recompute_layers / max(1, stage.layers))


def _states(
    job: Job, candidate: Candidate, stage: Stage, params: StageParams, software: Software
) -> tuple[float, float, float]:
    """Return the bytes of weights, gradients and optimizer state."""
    layout = candidate.layout
    shards, expert_shards = layout.dp * layout.cp, max(1, layout.edp)
    size = _element(candidate)
    copies = WEIGHT_COPIES.get(candidate.precision, 0.0) * (params.linear + params.experts)
    copies += size * params.beside
    own = params.trained / shards + params.trained_experts / expert_shards
    optimizer = 0.0 if candidate.offload_optimizer else _optimizer_state(job, candidate, params, own)
    if job.frozen:
        if job.four_bits or candidate.four_bits:
            copies -= (size - FOUR_BITS) * (params.linear + params.experts)
        return (
            size * (params.base + params.adapters) + copies,
            software.gradient_bytes * (params.trained + params.trained_experts),
            optimizer,
        )
    if candidate.fully_sharded:
        # Gathered: embedding and head, and three layers around the one in work; the whole stage while a pipeline runs.
        ends = params.dense - params.linear
        layers = (params.linear + params.experts) * min(1.0, 3 / max(1, stage.layers))
        return size * (params.base if layout.pp > 1 else ends + layers), WIDE * own, optimizer
    gradients = software.gradient_bytes * (params.trained + params.trained_experts)
    return size * params.base + copies, gradients, optimizer


def _optimizer_state(job: Job, candidate: Candidate, params: StageParams, own: float) -> float:
    """Return the bytes of master weights and moments; `own` is the data-parallel rank's share of what trains."""
    # fp32 weights are their own master.
    whole = candidate.precision == "fp32" and not job.frozen and not candidate.fully_sharded
    master = 0 if whole else WIDE
    if not job.is_muon:
        return (master + 2 * WIDE) * own
    # Norms, which are small, are taken for matrices. Only dist_muon's momenta are not on every rank.
    trained, ends = params.trained + params.trained_experts, params.trained_ends
    own_ends = ends / (candidate.layout.dp * candidate.layout.cp)
    momenta = own - own_ends if job.optimizer == "dist_muon" else trained - ends
    return master * trained + WIDE * momenta + 2 * WIDE * ends


def _element(candidate: Candidate) -> int:
    """Return the bytes of one element of an activation."""
    return WIDE if candidate.precision == "fp32" else HALF


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes that one layer keeps for its backward pass, and the most that its backward pass needs beside them."""

    dense: float
    routed: float
    workspace: float


def saved(
    job: Job, candidate: Candidate, kind: LayerKind, software: Software, constants: MemoryConstants
) -> Saved:
    """Return what one layer of a kind keeps for one micro batch."""
    meta, layout, shards = job.meta, candidate.layout, candidate.sequence_shards
    size, hidden = candidate.tokens(job), job.meta.hidden_size
    element = _element(candidate)
    whole = 4.0 * element * hidden  # inputs of the two norms, and their outputs for the weight gradients
    whole += 0 if software.fused_norm else 2 * constants.eager_norm_bytes * hidden
    whole += 2 * hidden if software.dropout else 0  # one byte an element for each mask
    attention = _attention_bytes(job, kind, element, software, constants)
    masked = _mask_bytes(job, element, software)
    scaled = element if job.frozen and job.use_dora else 0
    whole += 2 * scaled * hidden  # outputs of attention and of the feed-forward part
    whole += 2 * masked * hidden  # the norms' outputs with holes instead of whole, and where the holes are
    gates = 2 if meta.gated_mlp else 1
    ffn = kind.ffn + (meta.moe.shared_ffn_hidden_size if meta.moe and kind.is_moe else 0)
    extra = 0 if software.fused_elementwise else gates - 1  # the activated gate, beside gate, up and product
    extra += gates - 1 if software.local_layers else 0
    mlp = (element * (gates + 1 + extra) + masked + scaled * gates) * ffn
    if candidate.recompute == "selective" and not kind.is_moe:
        mlp = 0
    if candidate.recompute == "alternate":
        # The layer's input, the output of attention, and every second product: q, v, the first half of fc1, fc2.
        query, _, value, _ = _head_widths(job, kind)
        whole, attention, mlp = 2 * element * hidden, element * (2 * query + value), element * kind.ffn
    routed, router, work = _routed_bytes(job, candidate, kind, gates, software)
    work = work or element * (2 * gates + 1) * kind.ffn / layout.tp
    gathered = 2 * element * hidden if shards > 1 else 0.0
    return Saved(
        dense=size * (whole / shards + (attention + mlp) / layout.tp + router),
        routed=routed,
        workspace=size * (work + gathered + 2 * element * hidden / shards),
    )


def _mask_bytes(job: Job, element: int, software: Software) -> int:
    """Return the bytes of one element of the mask that dropout keeps of an adapter's input: torch's CPU mask is of the input's dtype."""
    if not (job.frozen and job.lora_dropout):
        return 0
    return element if software.local_layers else 1


def _attention_bytes(
    job: Job, kind: LayerKind, element: int, software: Software, constants: MemoryConstants
) -> float:
    """Return what attention keeps of one token, over all heads: q, k, v, the output, and scores where they exist."""
    meta = job.meta
    query, key, value, kept = _head_widths(job, kind)
    width = element * (query + kept + value)
    width += element * (query + key) if meta.qk_norm else 0
    width += element * (query + key + value) if software.local_layers else 0
    width += element * (query + kept) if job.frozen and job.use_dora else 0
    masked = _mask_bytes(job, element, software)
    if masked:
        # The output with holes: in place of the local layers' copy, or beside the one that attention keeps.
        width += masked * value + (0 if software.local_layers else element * value)
    if software.attention.startswith("flash"):
        return width + WIDE * meta.num_heads  # the log-sum-exp
    per_score = constants.scores_bytes if software.attention == "scores" else constants.scores_fused_bytes
    per_score += 3 if software.dropout else 0  # the mask, and the probabilities after it
    return width + per_score * meta.num_heads * job.seq_len


def _head_widths(job: Job, kind: LayerKind) -> tuple[int, int, int, int]:
    """Return the widths over all heads of q, of k, of the output, and of what is kept of k and v."""
    meta = job.meta
    if meta.mla is not None:
        query = meta.num_heads * (meta.mla.nope_head_dim + meta.mla.rope_head_dim)
        value = meta.num_heads * meta.mla.v_head_dim
        # v is a view of the up-projection, which therefore stays whole; k is a copy with the rotary part.
        return query, query, value, query + meta.num_heads * meta.mla.nope_head_dim + value
    query, key = meta.num_heads * kind.head_dim, kind.kv_heads * kind.head_dim
    return query, key, query, 2 * key


def _routed_bytes(
    job: Job, candidate: Candidate, kind: LayerKind, gates: int, software: Software
) -> tuple[float, float, float]:
    """Return what a layer keeps of routed tokens, what its router keeps of a token, and its workspace of a token."""
    moe = job.meta.moe
    if not kind.is_moe or moe is None:
        return 0.0, 0.0, 0.0
    hidden, ffn = job.meta.hidden_size, moe.ffn_hidden_size / candidate.layout.etp
    rows = candidate.routed_tokens(job)
    activated = 0.0 if candidate.recompute == "selective" and not job.frozen else ffn
    element = _element(candidate)
    # The activated gate, the offset half, and the product before it is weighted for its token.
    activated += (2 * gates - 1) * ffn if software.local_layers else 0.0
    routed = element * rows * (hidden + gates * ffn + activated)
    routed += _mask_bytes(job, element, software) * rows * (hidden + ffn)
    router = (
        3 * WIDE * moe.num_experts / candidate.sequence_shards
    )  # fp32 logits, probabilities and their gradient
    return routed, router, element * rows / candidate.tokens(job) * ((gates + 1) * ffn + 2 * hidden)


def _placeholders(job: Job, candidate: Candidate, stage: Stage, software: Software) -> float:
    """Return the bytes of the dummy weight gradients that Transformer Engine keeps, one of every shape.

    transformer_engine/pytorch/module/base.py, get_dummy_wgrad; only where the GEMM accumulates into the buffer.
    """
    if not (software.wgrad_fusion and software.tensor_engine) or job.frozen:
        return 0.0
    shapes = 0.0
    for index, _ in stage.kinds:
        kind = job.parts.kinds[index]
        one = (kind.attention + kind.mlp + kind.shared_experts) / candidate.layout.tp
        if kind.is_moe and job.meta.moe is not None:
            one += kind.experts / job.meta.moe.num_experts / candidate.layout.etp
        shapes = max(shapes, one)
    return HALF * shapes


def _head(job: Job, candidate: Candidate, software: Software) -> tuple[float, float]:
    """Return the bytes of logits, and of buffers beside them, when the output layer is at its fullest.

    Forward: the logits and the copy that becomes the softmax (megatron/core/fusions/fused_cross_entropy.py); backward:
    bf16 logits and gradient beside the placeholder of the weight gradient and the gathered input.
    """
    vocab, hidden = job.meta.vocab_size / candidate.layout.tp, job.meta.hidden_size
    size, weight = candidate.tokens(job), hidden * vocab
    if software.loss_tokens is not None:
        # In pieces (kernels/linear_cross_entropy): the fp32 sum of the weight's gradient, its copy, the input's gradient.
        logits, element = software.loss_bytes * min(size, software.loss_tokens) * vocab, _element(candidate)
        gradient = WIDE + (HALF if element == HALF else 0)  # fp32 weights take the sum itself
        return logits, element * size * hidden + (0.0 if job.frozen else gradient * weight)
    forward = software.loss_bytes * size * (job.meta.vocab_size if software.gathered_loss else vocab)
    backward, beside = 2 * HALF * size * vocab, HALF * weight + 2 * HALF * hidden * size
    if job.frozen or forward > backward + beside:
        return forward, 0.0
    return backward, beside
