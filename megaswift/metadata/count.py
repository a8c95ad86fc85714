"""How many parameters a model has, from its facts alone.

Letters: D model, F ffn, H heads, K head size, G kv groups, E experts, V vocabulary.
"""

from dataclasses import dataclass

from megaswift.metadata.meta import LinearAttentionMeta, MLAMeta, ModelMeta, MoEMeta


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model; multi-token-prediction layers and the router's choice biases are not among them."""

    total: int
    active: int  # that one token passes through: all but the experts that it is not sent to
    embedding: int  # of the embeddings and of an untied output layer; part of both


def count_parameters(meta: ModelMeta) -> ParameterCount:
    """Return the exact number of parameters of the model that the file's config describes."""
    embedding = _embedding(meta)
    layers = [_layer(meta, layer) for layer in range(meta.num_layers)]
    total = embedding + sum(layers) + _norm(meta, meta.hidden_size) + _outside(meta)
    idle = 0
    if meta.moe is not None:
        idle = meta.num_moe_layers * (meta.moe.num_experts - meta.moe.topk) * _expert(meta, meta.moe)
    return ParameterCount(total=total, active=total - idle, embedding=embedding)


def _embedding(meta: ModelMeta) -> int:
    """Embedding V*D, the output layer unless it is the same matrix, and Gemma's per-layer embedding."""
    tables = meta.vocab_size * meta.hidden_size * (1 if meta.tied_embeddings else 2)
    tables += meta.vocab_size if meta.lm_head_bias else 0
    if meta.layer_inputs is not None:
        tables += meta.layer_inputs.vocab_size * meta.num_layers * meta.layer_inputs.hidden_size
    return tables


def _outside(meta: ModelMeta) -> int:
    """Parameters outside layers and embeddings: the projection of Gemma's per-layer inputs and its norm."""
    if meta.layer_inputs is None:
        return 0
    size = meta.layer_inputs.hidden_size
    return meta.hidden_size * meta.num_layers * size + size


def _layer(meta: ModelMeta, layer: int) -> int:
    """One decoder layer: its norms, attention of some kind, and a dense part or experts."""
    count = _layer_norms(meta) + _attention_of(meta, layer)
    moe = meta.moe
    is_moe = moe is not None and moe.layer_is_moe[layer]
    if moe is not None and is_moe:
        count += _experts(meta, moe)
    if not is_moe or (moe is not None and moe.beside_dense):
        count += _feed_forward(meta, meta.of_layer(layer).ffn_hidden_size, bias=meta.mlp_bias)
    if meta.layer_inputs is not None:
        count += 2 * meta.hidden_size * meta.layer_inputs.hidden_size + _norm(meta, meta.hidden_size)
    return count


def _layer_norms(meta: ModelMeta) -> int:
    """One norm with parallel branches, four around both branches, else two."""
    number = 1 if meta.parallel_residual else 4 if meta.norm.placement == "sandwich" else 2
    return number * _norm(meta, meta.hidden_size)


def _norm(meta: ModelMeta, size: int) -> int:
    """Weight and bias of one norm."""
    return size * (2 if meta.norm.bias else 1)


def _attention_of(meta: ModelMeta, layer: int) -> int:
    """The layer's attention, or what stands in its place."""
    if meta.linear_attention is not None and meta.linear_attention.layers[layer]:
        return _delta_net(meta, meta.linear_attention)
    if meta.mla is not None:
        return _latent_attention(meta, meta.mla)
    return _attention(meta, layer)


def _attention(meta: ModelMeta, layer: int) -> int:
    """q D*H*K (twice with an output gate), k and v D*G*K each, o H*K*D, their biases, norms and sinks."""
    one, varied = meta.of_layer(layer), meta.layer_variation
    head_dim = one.head_dim
    queries, keys = meta.num_heads * head_dim, one.num_kv_heads * head_dim
    projected = queries * (2 if meta.attention.output_gate else 1)
    own_keys = varied is None or varied.kv_from_layer[layer] is None
    if own_keys:
        projected += keys * (1 if varied and varied.value_is_key[layer] else 2)
    count = projected * (meta.hidden_size + meta.qkv_bias) + queries * meta.hidden_size
    count += meta.hidden_size if meta.attention_out_bias else 0
    if meta.qk_norm == "full":
        count += queries + keys
    elif meta.qk_norm == "head":
        count += head_dim * (2 if own_keys else 1)
    return count + (meta.num_heads if meta.attention.sinks else 0)


def _latent_attention(meta: ModelMeta, mla: MLAMeta) -> int:
    """Down and up projections of queries and of keys with values, the norms between, o; biases on the way down."""
    head_dim = mla.nope_head_dim + mla.rope_head_dim
    bias = int(meta.qkv_bias)
    if mla.q_rank is None:
        queries = meta.hidden_size * meta.num_heads * head_dim
    else:
        queries = mla.q_rank * (meta.hidden_size + bias + 1 + meta.num_heads * head_dim)
    down = (mla.kv_rank + mla.rope_head_dim) * (meta.hidden_size + bias)
    up = mla.kv_rank * (1 + meta.num_heads * (mla.nope_head_dim + mla.v_head_dim))
    out = meta.num_heads * mla.v_head_dim * meta.hidden_size + (
        meta.hidden_size if meta.attention_out_bias else 0
    )
    return queries + down + up + out


def _delta_net(meta: ModelMeta, linear: LinearAttentionMeta) -> int:
    """Projections of q, k, v, z and of the two gates, the convolution, decays, the output norm and projection."""
    keys = linear.num_key_heads * linear.key_head_dim
    values = linear.num_value_heads * linear.value_head_dim
    projections = meta.hidden_size * (2 * keys + 2 * values + 2 * linear.num_value_heads)
    convolution = (2 * keys + values) * linear.conv_kernel
    decays = 2 * linear.num_value_heads
    return projections + convolution + decays + linear.value_head_dim + values * meta.hidden_size


def _feed_forward(meta: ModelMeta, size: int, *, bias: bool) -> int:
    """Gate and up D*F each (up alone without a gate), down F*D, their biases; xielu learns two numbers."""
    wide = 2 if meta.gated_mlp else 1
    count = (wide + 1) * meta.hidden_size * size
    count += wide * size + meta.hidden_size if bias else 0
    return count + (2 if meta.activation == "xielu" else 0)


def _expert(meta: ModelMeta, moe: MoEMeta) -> int:
    """One routed expert."""
    return _feed_forward(meta, moe.ffn_hidden_size, bias=moe.expert_bias)


def _experts(meta: ModelMeta, moe: MoEMeta) -> int:
    """Router D*E, its norm D and its scales E, experts, shared experts and their gate; beside a dense part three norms more."""
    count = moe.num_experts * (meta.hidden_size + _expert(meta, moe))
    count += moe.num_experts if moe.router_linear_bias else 0
    if moe.shared_ffn_hidden_size:
        count += _feed_forward(meta, moe.shared_ffn_hidden_size, bias=meta.mlp_bias)
        count += meta.hidden_size if moe.shared_gate else 0
    count += meta.hidden_size if moe.router_norm else 0
    count += moe.num_experts if moe.expert_scale else 0
    return count + (3 * _norm(meta, meta.hidden_size) if moe.beside_dense else 0)
