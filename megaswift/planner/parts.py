"""How many parameters each part of a model has and how each part is sharded. Sizes in elements."""

from dataclasses import dataclass, replace
from functools import cached_property

from megaswift.converters.selection import Elements
from megaswift.metadata.count import count_parameters
from megaswift.metadata.meta import ModelMeta, MoEMeta

LINEAR_ATTENTION_SPAN = (
    64  # keys that a gated-delta-rule query meets: the chunk of its kernels (flash-linear-attention)
)


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Decoder layers that are alike."""

    is_moe: bool
    span: int | None  # keys that a query sees; None: all before it
    head_dim: int
    kv_heads: int
    kv_projections: int  # of keys and of values: 2, or 1 where they are one
    ffn: int  # width of the dense part; 0: none
    attention: int  # sharded over tp
    attention_replicated: int  # on every rank of tp
    mlp: int  # dense feed-forward part, sharded over tp
    experts: int  # all routed experts together, sharded over ep and etp
    shared_experts: int  # sharded over tp
    replicated: int  # norms and router
    trained: int  # of those outside the experts, where adapters do not
    trained_experts: int  # of the experts

    @cached_property
    def total(self) -> int:
        """Parameters of one such layer."""
        return (
            self.attention
            + self.attention_replicated
            + self.mlp
            + self.experts
            + self.shared_experts
            + self.replicated
        )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model cut into parts whose sum is the exact number of its parameters."""

    kinds: tuple[LayerKind, ...]
    layers: tuple[int, ...]  # index into kinds, one entry a decoder layer
    embedding: int
    head: int  # 0 where it is the embedding
    final_norm: int
    other: int  # what some families have beside; counted on the first stage
    trained: Elements  # of them all

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        layers = sum(self.kinds[kind].total for kind in self.layers)
        return layers + self.embedding + self.head + self.final_norm + self.other


def parts_of(meta: ModelMeta, trained: Elements | None = None) -> Parts:
    """Cut a model into parts, of which so much trains; None: everything."""
    kinds: list[LayerKind] = []
    layers = []
    for layer in range(meta.num_layers):
        kind = _layer_kind(meta, layer)
        if trained is not None:  # layers that train alike are of one kind
            kind = replace(kind, trained=trained.layers[layer], trained_experts=trained.experts[layer])
        if kind not in kinds:
            kinds.append(kind)
        layers.append(kinds.index(kind))
    embedding = meta.vocab_size * meta.hidden_size
    head = 0 if meta.tied_embeddings else embedding + (meta.vocab_size if meta.lm_head_bias else 0)
    final_norm = _norm(meta, meta.hidden_size)
    known = sum(kinds[kind].total for kind in layers) + embedding + head + final_norm
    other = count_parameters(meta).total - known
    everything = Elements(
        layers=tuple(kinds[kind].trained for kind in layers),
        experts=tuple(kinds[kind].trained_experts for kind in layers),
        embedding=embedding,
        head=head,
        final_norm=final_norm,
        other=other,
    )
    return Parts(
        kinds=tuple(kinds),
        layers=tuple(layers),
        embedding=embedding,
        head=head,
        final_norm=final_norm,
        other=other,
        trained=trained or everything,
    )


def _layer_kind(meta: ModelMeta, layer: int) -> LayerKind:
    sharded, replicated, span = _attention(meta, layer)
    moe = meta.moe if meta.moe and meta.moe.layer_is_moe[layer] else None
    norms = {"pre": 2, "post": 2, "sandwich": 4}[meta.norm.placement] - (1 if meta.parallel_residual else 0)
    one, varied = meta.of_layer(layer), meta.layer_variation
    ffn = one.ffn_hidden_size if moe is None or moe.beside_dense else 0
    kind = LayerKind(
        is_moe=moe is not None,
        span=span,
        head_dim=one.head_dim,
        kv_heads=one.num_kv_heads,
        kv_projections=1 if varied and varied.value_is_key[layer] else 2,
        ffn=ffn,
        attention=sharded,
        attention_replicated=replicated,
        mlp=_mlp(meta, ffn, bias=meta.mlp_bias),
        experts=moe.num_experts * _mlp(meta, moe.ffn_hidden_size, bias=moe.expert_bias) if moe else 0,
        shared_experts=_mlp(meta, moe.shared_ffn_hidden_size, bias=meta.mlp_bias) if moe else 0,
        replicated=norms * _norm(meta, meta.hidden_size) + (_router(meta, moe) if moe else 0),
        trained=0,
        trained_experts=0,
    )
    return replace(kind, trained=kind.total - kind.experts, trained_experts=kind.experts)


def _norm(meta: ModelMeta, size: int) -> int:
    return size * (2 if meta.norm.bias else 1)


def _mlp(meta: ModelMeta, ffn: int, *, bias: bool) -> int:
    if ffn == 0:
        return 0
    inner = ffn * (2 if meta.gated_mlp else 1)
    return meta.hidden_size * (inner + ffn) + (inner + meta.hidden_size if bias else 0)


def _router(meta: ModelMeta, moe: MoEMeta) -> int:
    beside = meta.hidden_size * (int(moe.shared_gate) + int(moe.router_norm))
    beside += 3 * _norm(meta, meta.hidden_size) if moe.beside_dense else 0
    return moe.num_experts * (meta.hidden_size + int(moe.router_linear_bias) + int(moe.expert_scale)) + beside


def _attention(meta: ModelMeta, layer: int) -> tuple[int, int, int | None]:
    """Return the parameters of attention that tp shards, those it does not, and the keys that a query sees."""
    hidden, linear = meta.hidden_size, meta.linear_attention
    if linear is not None and linear.layers[layer]:
        keys, values = (
            linear.num_key_heads * linear.key_head_dim,
            linear.num_value_heads * linear.value_head_dim,
        )
        projections = hidden * (2 * keys + 2 * values + 2 * linear.num_value_heads) + values * hidden
        small = linear.conv_kernel * (2 * keys + values) + 2 * linear.num_value_heads
        return projections + small, linear.value_head_dim, LINEAR_ATTENTION_SPAN
    span = meta.sliding_window[layer] if meta.sliding_window else None
    if meta.attention.chunk and meta.attention.chunk[layer] is not None:
        span = meta.attention.chunk[layer]
    if meta.mla is not None:
        mla, bias = meta.mla, int(meta.qkv_bias)
        query = meta.num_heads * (mla.nope_head_dim + mla.rope_head_dim)
        value = meta.num_heads * mla.v_head_dim
        up = mla.kv_rank * (meta.num_heads * mla.nope_head_dim + value)
        down = (hidden + bias) * (mla.kv_rank + mla.rope_head_dim) + mla.kv_rank
        down += mla.q_rank * (hidden + bias + 1) if mla.q_rank else 0
        out_bias = hidden if meta.attention_out_bias else 0
        return (mla.q_rank or hidden) * query + up + value * hidden, down + out_bias, span
    one, varied = meta.of_layer(layer), meta.layer_variation
    head = one.head_dim
    query, key = meta.num_heads * head, one.num_kv_heads * head
    own_keys = varied is None or varied.kv_from_layer[layer] is None
    projected = query * (2 if meta.attention.output_gate else 1)
    if own_keys:
        projected += key * (1 if varied and varied.value_is_key[layer] else 2)
    sharded = projected * (hidden + int(meta.qkv_bias)) + query * hidden
    sharded += meta.num_heads if meta.attention.sinks else 0
    norm = {"head": head * (2 if own_keys else 1), "full": query + key}.get(meta.qk_norm or "", 0)
    return sharded, norm + (hidden if meta.attention_out_bias else 0), span
