"""Pipeline stages: which layers and parameters a stage holds, and how many micro batches it keeps in flight."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megaswift.parallel.layout import Layout, chunk_layers
from megaswift.planner.job import Job
from megaswift.planner.parts import LayerKind, Parts


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one pipeline stage holds."""

    index: int
    kinds: tuple[tuple[int, float], ...]  # (index of a layer kind, number of layers)
    layers: int
    first: bool  # has the embedding
    last: bool  # has the head


def stages_of(parts: Parts, layout: Layout) -> tuple[Stage, ...]:
    """Return the stages of a layout; raises ConfigError where the layers do not divide."""
    chunks = range(layout.vpp)
    return make_stages(
        [
            [
                parts.layers[layer]
                for chunk in chunks
                for layer in chunk_layers(layout, len(parts.layers), pp_rank=pp_rank, vp_rank=chunk)
            ]
            for pp_rank in range(layout.pp)
        ]
    )


def make_stages(kinds: Sequence[Sequence[int]]) -> tuple[Stage, ...]:
    """Return stages from the kinds of their layers, stage by stage."""
    return tuple(
        Stage(
            index=index,
            kinds=tuple(sorted(Counter(of_stage).items())),
            layers=len(of_stage),
            first=index == 0,
            last=index == len(kinds) - 1,
        )
        for index, of_stage in enumerate(kinds)
    )


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Return the largest number of micro batches whose activations a stage holds, in units of the whole stage.

    Megatron-Core 0.16.1, pipeline_parallel/schedules.py: 1F1B warms up pp - rank - 1 micro batches; the interleaved
    schedule warms up 2 (pp - rank - 1) + (vpp - 1) pp chunks; one more is in flight in the steady state.
    """
    if layout.pp == 1:
        return 1.0
    if layout.vpp == 1:
        return float(min(micro_batches, layout.pp - stage))
    chunks = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(chunks, micro_batches * layout.vpp) / layout.vpp


@dataclass(frozen=True, kw_only=True)
class StageParams:
    """Parameters that one rank of a stage holds."""

    dense: float  # copied over dp x cp
    linear: float  # of these, the matrices that FP8 recipes keep a second time
    experts: float  # copied over edp
    adapters: float  # of LoRA, on every linear of attention and the feed-forward part, experts with it
    beside: float  # of frozen models beside the trained one
    trained: float  # what has gradients of dense, and the adapters outside the experts
    trained_experts: float  # and of the experts, or their adapters
    trained_ends: float  # of trained, the embedding and the head

    @property
    def base(self) -> float:
        """Parameters without adapters."""
        return self.dense + self.experts


def stage_params(job: Job, layout: Layout, stage: Stage) -> StageParams:
    """Return the parameters that one rank of `stage` holds."""
    parts, trains = job.parts, job.parts.trained
    counts = list(stage.kinds)
    dense = trained = ends = 0.0
    if stage.first:
        dense += parts.embedding / layout.tp + parts.other
        trained += trains.embedding / layout.tp + trains.other
        ends += trains.embedding / layout.tp
    if stage.last:
        is_copy = parts.head == 0 and not stage.first
        dense += (parts.head + is_copy * parts.embedding) / layout.tp + parts.final_norm
        trained += (trains.head + is_copy * trains.embedding) / layout.tp + trains.final_norm
        ends += (trains.head + is_copy * trains.embedding) / layout.tp
        if job.mtp_layers:
            # Each is a layer with a 2 D x D projection; on a stage of its own it needs the embedding again.
            counts.append((parts.layers[-1], job.mtp_layers))
            beside = job.mtp_layers * 2 * job.meta.hidden_size**2 / layout.tp
            beside += 0 if stage.first else parts.embedding / layout.tp
            dense, trained = dense + beside, trained + beside
    linear = experts = trained_experts = 0.0
    # All that are drawn may be of one stage.
    drawn = 1.0 if job.drawn_layers is None else min(1.0, job.drawn_layers / max(1, stage.layers))
    for index, count in counts:
        kind, shards = parts.kinds[index], layout.etp * layout.ep
        cut = (kind.attention + kind.mlp + kind.shared_experts) / layout.tp + kind.attention_replicated
        linear += count * cut
        dense += count * kind.replicated
        experts += count * kind.experts / shards
        # A rank's share of what trains is taken to be its share of the whole layer.
        trained += drawn * count * (cut + kind.replicated) * kind.trained / (kind.total - kind.experts)
        trained_experts += drawn * count * kind.trained_experts / shards
    adapters = sum(count * _adapter(job, parts.kinds[index]) for index, count in stage.kinds) / layout.tp
    of_experts = sum(count * _expert_adapters(job, parts.kinds[index]) for index, count in stage.kinds)
    of_experts /= layout.etp * layout.ep
    return StageParams(
        dense=dense + linear,
        linear=linear,
        experts=experts,
        adapters=adapters + of_experts if job.frozen else 0.0,
        beside=sum(
            dense + linear + experts if other is None else _of_another(job, layout, stage, other)
            for other in job.beside
        ),
        trained=adapters + (trained if job.whole_modules else 0.0) if job.frozen else trained,
        trained_experts=of_experts if job.frozen else trained_experts,
        trained_ends=0.0 if job.frozen and not job.whole_modules else ends,
    )


def _of_another(job: Job, layout: Layout, stage: Stage, other: Parts) -> float:
    """Return another model's parameters on one rank: as large a share of its layers as the rank has of the trained one's."""
    share = stage.layers / len(job.parts.layers)
    kinds = tuple((kind, count * share) for kind, count in Counter(other.layers).items())
    alone = replace(job, parts=other, beside=(), mtp_layers=0)
    return stage_params(alone, layout, replace(stage, kinds=kinds)).base


def _adapter(job: Job, kind: LayerKind) -> float:
    """Return the adapters of one layer outside the experts: r (in + out) for q, k, v, o, gate, up and down."""
    meta = job.meta
    query, key = meta.num_heads * kind.head_dim, kind.kv_heads * kind.head_dim
    attention = 3 * meta.hidden_size + query + 2 * key + query + meta.hidden_size
    shared = meta.moe.shared_ffn_hidden_size if meta.moe and kind.is_moe else 0
    return job.lora_rank * attention + _mlp_adapter(job, kind.ffn) + _mlp_adapter(job, shared)


def _expert_adapters(job: Job, kind: LayerKind) -> float:
    """Return the adapters of one layer's routed experts; experts packed into one tensor have none (models/lora.py)."""
    moe = job.meta.moe
    if moe is None or not kind.is_moe or moe.only_packed:
        return 0.0
    return moe.num_experts * _mlp_adapter(job, moe.ffn_hidden_size)


def _mlp_adapter(job: Job, ffn: int) -> float:
    """Return the adapters of one feed-forward part: r (in + out) for gate, up and down; none where there is no part."""
    linears = 3 if job.meta.gated_mlp else 2
    return job.lora_rank * linears * (job.meta.hidden_size + ffn) if ffn and job.adapts_mlp else 0.0
