"""ModelMeta: the facts about one model that everything else is derived from.

Sizes are logical, before any sharding. The defaults describe a Llama: whatever differs from it is named.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched; fields as in config.json's rope_scaling / rope_parameters."""

    kind: str  # "llama3", "linear", "yarn", "longrope", "dynamic", "ntk_alpha" or "proportional"
    factor: float = 1.0
    original_max_position: int | None = None  # llama3, yarn, longrope: context length before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    attention_factor: float | None = (
        None  # yarn, longrope: cos and sin are multiplied by it; None: from the paper
    )
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: divisors of the frequencies up to the original length
    long_factor: tuple[float, ...] = ()  # longrope: and beyond it
    alpha: float | None = None  # ntk_alpha: the base is multiplied by alpha ** (dim / (dim - 2))
    proportion: float = 1.0  # proportional: this fraction of all frequencies turns, the rest are zero

    @property
    def amplitude(self) -> float:
        """The number by which cosines and sines are multiplied (transformers 5.23, modeling_rope_utils.py)."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "longrope":
            assert self.original_max_position is not None, "longrope has an original context"
            ratio = max(math.log(self.factor) / math.log(self.original_max_position), 0.0)
            return math.sqrt(1 + ratio)
        if self.mscale and self.mscale_all_dim:
            return self._yarn_amplitude(self.mscale) / self._yarn_amplitude(self.mscale_all_dim)
        return self._yarn_amplitude(1.0)

    def _yarn_amplitude(self, coefficient: float) -> float:
        """Peng et al. 2023, eq. 22, of which the square root is taken for q and k each."""
        return 0.1 * coefficient * math.log(max(self.factor, 1.0)) + 1.0


@dataclass(frozen=True, kw_only=True)
class RopeMeta:
    """What is unusual about a model's rotary positions."""

    interleaved: bool = False  # pairs are neighbours (x0, x1), not halves (x0, x[dim/2])
    layers: tuple[bool, ...] = ()  # which layers turn q and k; (): all of them
    local_theta: float | None = None  # base of the sliding layers; they have no scaling. None: as everywhere
    mrope_section: tuple[int, ...] = ()  # multimodal axes; text alone does not see them


@dataclass(frozen=True, kw_only=True)
class NormMeta:
    """The norms of a decoder layer."""

    kind: str = "rmsnorm"  # or "layernorm"
    bias: bool = False  # layernorm with a bias
    zero_centered: bool = False  # the file holds weight - 1, for the norms of q and k too
    placement: str = "pre"  # "pre"; "post": of each branch's output only; "sandwich": both


@dataclass(frozen=True, kw_only=True)
class QueryScaling:
    """Queries grow with their position: 1 + beta * log(1 + floor((position + offset) / length))."""

    beta: float
    length: int
    offset: int
    only_without_rope: bool  # only in layers without rotary positions


@dataclass(frozen=True, kw_only=True)
class AttentionMeta:
    """What is unusual about a model's attention."""

    scale: float | None = None  # of the scores; None: 1 / sqrt(size of a query head)
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: bool = False  # a learned logit a head joins the softmax and is dropped
    value_norm: bool = False  # v is normed like q and k, without a weight
    output_gate: bool = False  # output * sigmoid(gate), the gate from q_proj beside each query head
    clip_qkv: float | None = None  # q, k and v are clamped to [-clip, clip] before rope
    chunk: tuple[int | None, ...] = ()  # attention within chunks of this many tokens, per layer; (): nowhere
    query_scaling: QueryScaling | None = None


@dataclass(frozen=True, kw_only=True)
class MLAMeta:
    """Multi-head latent attention: keys and values come from a small latent vector."""

    q_rank: int | None  # None: queries are projected directly
    kv_rank: int
    nope_head_dim: int  # part of a q/k head without rotary positions
    rope_head_dim: int  # and with them; the key's is shared by all heads
    v_head_dim: int
    latent_norm_eps: float = 1e-6  # of the norms of the latents


@dataclass(frozen=True, kw_only=True)
class LinearAttentionMeta:
    """Gated DeltaNet layers in place of attention."""

    layers: tuple[bool, ...]  # one entry a decoder layer
    conv_kernel: int
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int


@dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """gate = min(gate, limit), up = clamp(up, +-limit), output = gate * sigmoid(alpha * gate) * (up + 1)."""

    alpha: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """Constants by which activations are multiplied."""

    embedding: float = 1.0  # after the embedding
    residual: float = 1.0  # of each branch before it is added
    logits: float = 1.0  # after the output layer
    logits_softcap: float | None = None  # then logits become softcap * tanh(logits / softcap)


@dataclass(frozen=True, kw_only=True)
class LayerVariation:
    """Sizes that differ between decoder layers; one entry a layer, the uniform fields hold the first layer's."""

    head_dims: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    ffn_hidden_sizes: tuple[int, ...]
    value_is_key: tuple[bool, ...]  # v is the k projection before its norm; there is no v_proj
    kv_from_layer: tuple[int | None, ...]  # k and v are those of this earlier layer; None: the layer's own


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """A second embedding whose slice for the layer enters every layer (Gemma's per-layer embeddings)."""

    vocab_size: int
    hidden_size: int  # of one layer's slice


@dataclass(frozen=True, kw_only=True)
class MoEMeta:
    """A model's experts and router."""

    num_experts: int
    topk: int
    ffn_hidden_size: int  # of one expert
    layer_is_moe: tuple[bool, ...]  # one entry a decoder layer
    shared_ffn_hidden_size: int = 0  # of the shared experts together; 0: none
    shared_gate: bool = False  # the shared expert's output is scaled by sigmoid(gate(x))
    norm_topk_prob: bool = True  # the chosen probabilities are normalised to sum to 1
    score_function: str = "softmax"  # or "sigmoid"
    router_bias: bool = False  # e_score_correction_bias, added for the choice only
    router_linear_bias: bool = False  # the router's projection has a bias
    expert_bias: bool = False  # the experts' projections have biases
    scale_input: bool = False  # probabilities multiply the expert's input instead of its output
    beside_dense: bool = (
        False  # experts are added to a dense feed-forward part, each with norms before and after it (gemma4)
    )
    router_norm: bool = False  # the router reads x / rms(x) * scale / sqrt(D), not the experts' input
    expert_scale: bool = False  # a learned number of each expert multiplies its weight
    only_packed: bool = False  # one tensor holds a matrix of all experts: to PEFT they are no linears (gemma4)
    num_groups: int | None = (
        None  # group-limited routing: choose among the experts of the best topk_groups groups
    )
    topk_groups: int | None = None
    group_score: str = "top2"  # a group's score: sum of its two best experts, or "max"
    routed_scaling_factor: float = 1.0
    aux_loss_coeff: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelMeta:
    """Everything that config.json, generation_config.json and the tokenizer files say about a model.

    `folder` holds the files; None for a config alone.
    """

    model_type: str  # config.json's model_type
    architecture: str  # config.json's first architecture, e.g. "LlamaForCausalLM"
    family: str  # key of the catalogue of families
    folder: Path | None

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of dense layers
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # rows of the embedding in the file
    max_length: int  # context length in tokens

    norm_eps: float = 1e-6
    norm: NormMeta = NormMeta()
    activation: str = "silu"  # of the feed-forward part
    gated_mlp: bool = True  # act(gate(x)) * up(x), otherwise act(up(x))
    clamped_swiglu: ClampedSwiGLU | None = None  # in place of the activation
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0  # of the head, from its start
    rope: RopeMeta = RopeMeta()
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    qk_norm: str | None = (
        None  # "head": every head by itself; "full": all heads together; "l2": head, no weight
    )
    qk_norm_after_rope: bool = False
    tied_embeddings: bool = False
    scores: int | None = None  # numbers a token in place of logits; 0: the last hidden states themselves
    sliding_window: tuple[int | None, ...] = ()  # tokens, the query's included, per layer; (): nowhere
    attention: AttentionMeta = AttentionMeta()
    mla: MLAMeta | None = None
    linear_attention: LinearAttentionMeta | None = None
    moe: MoEMeta | None = None
    multipliers: Multipliers = Multipliers()
    parallel_residual: bool = False  # attention and feed-forward read the same normed input; one norm a layer
    num_mtp_layers: int = 0  # multi-token-prediction layers that the config announces; files may lack them
    layer_variation: LayerVariation | None = None
    layer_inputs: LayerInputs | None = None
    layer_scalar: bool = False  # each layer's output is multiplied by a number in the file
    attention_dropout: float = 0.0  # what the config asks for while training
    residual_dropout: float = 0.0
    initializer_range: float = 0.02

    dtype: str = "bfloat16"  # of the weights in the file
    quantization: dict[str, object] | None = (
        None  # config.json's quantization_config: how the file's weights are packed
    )
    template: str | None = None  # the tokenizer's chat template (Jinja), if any
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    eos_token_ids: tuple[int, ...] = ()  # generation stops at any of these
    target_modules: tuple[str, ...] = ()  # what `all-linear` means here, in the file's names
    trust_remote_code: bool = False  # the folder asks for its own code (auto_map)
    generation: dict[str, object] = field(default_factory=dict)  # generation_config.json
    raw: dict[str, object] = field(default_factory=dict)  # config.json as it is

    def of_layer(self, layer: int) -> "ModelMeta":
        """Return the model whose every layer has the sizes of this one."""
        varied = self.layer_variation
        if varied is None:
            return self
        return replace(
            self,
            head_dim=varied.head_dims[layer],
            num_kv_heads=varied.num_kv_heads[layer],
            ffn_hidden_size=varied.ffn_hidden_sizes[layer],
            layer_variation=None,
        )

    @property
    def kv_head_counts(self) -> tuple[int, ...]:
        """The numbers of key/value heads that layers have, the smallest first."""
        varied = self.layer_variation
        return tuple(sorted(set(varied.num_kv_heads))) if varied else (self.num_kv_heads,)

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers whose feed-forward part is a mixture of experts."""
        return sum(self.moe.layer_is_moe) if self.moe else 0
