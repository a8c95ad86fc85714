"""Model FLOPs of a training step: what the mathematics needs, whatever is recomputed, padded or sharded.

Convention (named because it moves figures by ten per cent and more): a matrix costs 2 FLOPs a parameter and token forward and
4 backward, the 6N of Kaplan et al. 2020 (appendix B) counted over matrices that a token really meets; causal attention costs
its query-key pairs, half the square of every document's length, as Megatron-LM has counted since core 0.12
(training.py, num_floating_point_operations); the output layer costs tokens that carry loss. The embedding is a look-up, and
norms, activations and the recurrence of linear attention are not counted.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from megaswift.config.tuner import TunerConfig
from megaswift.converters.lora_targets import adapted_modules
from megaswift.converters.selection import Elements
from megaswift.metadata.meta import ModelMeta
from megaswift.models.lora import resolve_targets
from megaswift.planner.parts import parts_of

FORWARD = 2  # multiply and add
BACKWARD_INPUT = 2  # the gradient of a matrix product's input
BACKWARD_WEIGHT = 2  # the gradient of its weight; a frozen matrix has none


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Which keys a query of a layer sees, beside all those before it."""

    window: int | None = None  # the last so many tokens, its own included
    chunk: int | None = None  # those of its own chunk of so many tokens

    def pairs(self, length: int) -> int:
        """Return the query-key pairs of a document of `length` tokens."""
        if self.chunk is not None and length > self.chunk:
            whole, rest = divmod(length, self.chunk)
            return whole * _triangle(self.chunk) + _triangle(rest)
        if self.window is not None and length > self.window:
            return _triangle(self.window) + (length - self.window) * self.window
        return _triangle(length)


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """FLOPs of one training step, as coefficients of what a batch holds."""

    per_token: int
    per_loss_token: int
    per_pair: dict[Reach, int]  # summed over the layers with this reach

    @property
    def token_in_pairs(self) -> float:
        """What a token costs outside attention, in query-key pairs."""
        pair = sum(self.per_pair.values())
        return self.per_token / pair if pair else 0.0

    def of(self, *, lengths: list[int], loss_tokens: int) -> float:
        """Return the FLOPs of a batch with documents of `lengths` tokens."""
        attention = sum(
            cost * sum(reach.pairs(length) for length in lengths) for reach, cost in self.per_pair.items()
        )
        return float(sum(lengths) * self.per_token + loss_tokens * self.per_loss_token + attention)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A matrix of a layer, and how often a token meets it."""

    name: str  # Megatron's
    inputs: int
    outputs: int
    times: int = 1


def step_cost(meta: ModelMeta, tuner: TunerConfig, *, trained: Elements | None = None) -> StepCost:
    """Return the cost of training `meta` with adapters, or in full; `trained` is what trains of it, if not nothing or everything."""
    lora = tuner.tuner_type == "lora"
    modules = adapted_modules(meta, tuner)
    targets = resolve_targets(tuner.target_modules) if lora else ()
    shares = [0.0] * meta.num_layers if lora and trained is None else _trained_shares(meta, trained)
    lowest = 0 if lora or trained is None else _lowest_trained(meta, trained)
    per_token, per_pair = 0.0, dict[Reach, int]()
    for layer, share in enumerate(shares):
        backward = BACKWARD_INPUT if layer >= lowest else 0
        matrix = FORWARD + backward + share * BACKWARD_WEIGHT
        if modules is not None:
            targets = _kinds_in(modules, layer)
        for linear in _linears(meta, layer):
            per_token += matrix * linear.inputs * linear.outputs * linear.times
            if linear.name in targets:
                per_token += 6 * tuner.lora_rank * (linear.inputs + linear.outputs) * linear.times
        if not _is_recurrent(meta, layer):
            reach = _reach(meta, layer)
            # Attention has no weights: its backward pass is the same with adapters, two products for one.
            pair = (FORWARD + 2 * backward) * _multiplications_of_a_pair(meta, layer)
            per_pair[reach] = per_pair.get(reach, 0) + pair
    learns = not lora if trained is None else trained.head or (meta.tied_embeddings and trained.embedding)
    passes_on = trained is None or lowest < meta.num_layers or trained.final_norm
    head = FORWARD + (BACKWARD_INPUT if passes_on else 0) + (BACKWARD_WEIGHT if learns else 0)
    per_loss_token = 0 if meta.scores is not None else head * meta.hidden_size * meta.vocab_size
    return StepCost(per_token=round(per_token), per_loss_token=per_loss_token, per_pair=per_pair)


def _kinds_in(modules: Collection[str], layer: int) -> tuple[str, ...]:
    """Return the kinds of a layer's linears that are among `modules`, which are global names."""
    prefix = f"decoder.layers.{layer}."
    return tuple({name.rpartition(".")[2] for name in modules if name.startswith(prefix)})


def _trained_shares(meta: ModelMeta, trained: Elements | None) -> list[float]:
    """Return the share of each layer's parameters that train; its matrices are taken to have the same one."""
    parts = parts_of(meta, trained)
    kinds = [parts.kinds[kind] for kind in parts.layers]
    return [(kind.trained + kind.trained_experts) / kind.total for kind in kinds]


def _lowest_trained(meta: ModelMeta, trained: Elements) -> int:
    """Return the lowest layer through which gradients pass; those below it have no backward pass."""
    if trained.embedding or trained.other:
        return 0
    layers = (layer for layer in range(meta.num_layers) if trained.layers[layer] or trained.experts[layer])
    return next(layers, meta.num_layers)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def _is_recurrent(meta: ModelMeta, layer: int) -> bool:
    return meta.linear_attention is not None and meta.linear_attention.layers[layer]


def _reach(meta: ModelMeta, layer: int) -> Reach:
    return Reach(
        window=meta.sliding_window[layer] if meta.sliding_window else None,
        chunk=meta.attention.chunk[layer] if meta.attention.chunk else None,
    )


def _multiplications_of_a_pair(meta: ModelMeta, layer: int) -> int:
    """Return what a query and a key cost in one pass: their scores and the weighted values, over all heads."""
    if meta.mla is not None:
        return meta.num_heads * (meta.mla.nope_head_dim + meta.mla.rope_head_dim + meta.mla.v_head_dim)
    return 2 * meta.num_heads * meta.of_layer(layer).head_dim


def _linears(meta: ModelMeta, layer: int) -> list[Linear]:
    if meta.layer_inputs is not None:
        size, hidden = meta.layer_inputs.hidden_size, meta.hidden_size
        own = Linear(
            name="input", inputs=hidden, outputs=size, times=3
        )  # its projection, the gate, and the way back
        return [own, *_linears(replace(meta, layer_inputs=None), layer)]
    if _is_recurrent(meta, layer):
        return [*_recurrence(meta), *_feed_forward(meta, layer)]
    return [*(_latent_attention(meta) if meta.mla else _attention(meta, layer)), *_feed_forward(meta, layer)]


def _attention(meta: ModelMeta, layer: int) -> list[Linear]:
    one, copies, varies = meta.of_layer(layer), 2, meta.layer_variation
    if varies is not None:
        copies = 0 if varies.kv_from_layer[layer] is not None else 1 if varies.value_is_key[layer] else 2
    queries = meta.num_heads * one.head_dim
    projected = queries * (2 if meta.attention.output_gate else 1) + copies * one.num_kv_heads * one.head_dim
    return [
        Linear(name="linear_qkv", inputs=meta.hidden_size, outputs=projected),
        Linear(name="linear_proj", inputs=queries, outputs=meta.hidden_size),
    ]


def _latent_attention(meta: ModelMeta) -> list[Linear]:
    mla, hidden = meta.mla, meta.hidden_size
    assert mla is not None
    queries = meta.num_heads * (mla.nope_head_dim + mla.rope_head_dim)
    linears = [
        Linear(name="linear_kv_down_proj", inputs=hidden, outputs=mla.kv_rank + mla.rope_head_dim),
        Linear(
            name="linear_kv_up_proj",
            inputs=mla.kv_rank,
            outputs=meta.num_heads * (mla.nope_head_dim + mla.v_head_dim),
        ),
        Linear(name="linear_proj", inputs=meta.num_heads * mla.v_head_dim, outputs=hidden),
    ]
    if mla.q_rank is None:
        return [*linears, Linear(name="linear_q_proj", inputs=hidden, outputs=queries)]
    return [
        *linears,
        Linear(name="linear_q_down_proj", inputs=hidden, outputs=mla.q_rank),
        Linear(name="linear_q_up_proj", inputs=mla.q_rank, outputs=queries),
    ]


def _recurrence(meta: ModelMeta) -> list[Linear]:
    linear = meta.linear_attention
    assert linear is not None
    keys = linear.num_key_heads * linear.key_head_dim
    values = linear.num_value_heads * linear.value_head_dim
    projected = (
        2 * keys + 2 * values + 2 * linear.num_value_heads
    )  # q and k, v and its gate, two rates a head
    return [
        Linear(name="in_proj", inputs=meta.hidden_size, outputs=projected),
        Linear(name="out_proj", inputs=values, outputs=meta.hidden_size),
    ]


def _feed_forward(meta: ModelMeta, layer: int) -> list[Linear]:
    moe, hidden = meta.moe, meta.hidden_size
    size = meta.of_layer(layer).ffn_hidden_size
    if moe is None or not moe.layer_is_moe[layer]:
        return _mlp(meta, size)
    linears = [
        Linear(name="router", inputs=hidden, outputs=moe.num_experts),
        *_mlp(meta, moe.ffn_hidden_size, times=moe.topk, adaptable=not moe.only_packed),
    ]
    if moe.shared_ffn_hidden_size:
        linears += _mlp(meta, moe.shared_ffn_hidden_size)
        linears.append(Linear(name="gate", inputs=hidden, outputs=int(moe.shared_gate)))
    return [*linears, *_mlp(meta, size)] if moe.beside_dense else linears


def _mlp(meta: ModelMeta, size: int, *, times: int = 1, adaptable: bool = True) -> list[Linear]:
    fanned, prefix = size * (2 if meta.gated_mlp else 1), "" if adaptable else "packed "
    return [
        Linear(name=f"{prefix}linear_fc1", inputs=meta.hidden_size, outputs=fanned, times=times),
        Linear(name=f"{prefix}linear_fc2", inputs=size, outputs=meta.hidden_size, times=times),
    ]
