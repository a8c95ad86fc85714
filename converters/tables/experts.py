"""Rows of mixtures of experts; files hold one tensor an expert, whatever transformers packs in memory (5.23)."""

from megaswift.converters.table import Place, Row, Shard

_MOE, _EXPERT = Place.MOE, Place.EXPERT
_NONE, _DIM0, _DIM1 = Shard.NONE, Shard.DIM0, Shard.DIM1

# fmt: off
QWEN_EXPERTS = (
    Row(_MOE,    "mlp.router.weight",                             "mlp.gate.weight",                          "E D",      _NONE),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc1.weight", "mlp.experts.#.{gate,up}_proj.weight",      "M D, M D", _DIM0),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc2.weight", "mlp.experts.#.down_proj.weight",           "D M",      _DIM1),
    Row(_MOE,    "mlp.shared_experts.linear_fc1.weight",          "mlp.shared_expert.{gate,up}_proj.weight",  "S D, S D", _DIM0, when="shared_experts"),
    Row(_MOE,    "mlp.shared_experts.linear_fc2.weight",          "mlp.shared_expert.down_proj.weight",       "D S",      _DIM1, when="shared_experts"),
    Row(_MOE,    "mlp.shared_experts.gate_weight",                "mlp.shared_expert_gate.weight",            "1 D",      _NONE, when="shared_gate"),
)

MIXTRAL_EXPERTS = (
    Row(_MOE,    "mlp.router.weight",                             "block_sparse_moe.gate.weight",             "E D",      _NONE),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc1.weight", "block_sparse_moe.experts.#.{w1,w3}.weight", "M D, M D", _DIM0),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc2.weight", "block_sparse_moe.experts.#.w2.weight",     "D M",      _DIM1),
)

_SHARED_EXPERTS = (
    Row(_MOE,    "mlp.shared_experts.linear_fc1.weight",          "mlp.shared_experts.{gate,up}_proj.weight", "S D, S D", _DIM0, when="shared_experts"),
    Row(_MOE,    "mlp.shared_experts.linear_fc2.weight",          "mlp.shared_experts.down_proj.weight",      "D S",      _DIM1, when="shared_experts"),
)

DEEPSEEK_EXPERTS = (
    *QWEN_EXPERTS[:3],
    Row(_MOE,    "mlp.router.expert_bias",                        "mlp.gate.e_score_correction_bias",         "E",        _NONE, when="router_bias", float32=True),
    *_SHARED_EXPERTS,
)

ERNIE_EXPERTS = (
    *QWEN_EXPERTS[:3],
    Row(_MOE,    "mlp.router.expert_bias",                        "mlp.moe_statics.e_score_correction_bias",  "1 E",      _NONE, when="router_bias", float32=True),
    *_SHARED_EXPERTS,
)

GRANITE_EXPERTS = (
    Row(_MOE,    "mlp.router.weight",                             "block_sparse_moe.router.layer.weight",     "E D",      _NONE),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc1.weight", "block_sparse_moe.input_linear.weight",     "M D, M D", _DIM0),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc2.weight", "block_sparse_moe.output_linear.weight",    "D M",      _DIM1),
    Row(_MOE,    "mlp.shared_experts.linear_fc1.weight",          "shared_mlp.input_linear.weight",           "S D, S D", _DIM0, when="shared_experts"),
    Row(_MOE,    "mlp.shared_experts.linear_fc2.weight",          "shared_mlp.output_linear.weight",          "D S",      _DIM1, when="shared_experts"),
)

GPT_OSS_EXPERTS = (
    Row(_MOE,    "mlp.router.weight",                             "mlp.router.weight",                        "E D",      _NONE),
    Row(_MOE,    "mlp.router.bias",                               "mlp.router.bias",                          "E",        _NONE, when="router_linear_bias"),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc1.weight", "mlp.experts.gate_up_proj",                 "M D, M D", _DIM0, transposed=True, interleaved=True),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc1.bias",   "mlp.experts.gate_up_proj_bias",            "M, M",     _DIM0, transposed=True, interleaved=True, when="expert_bias"),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc2.weight", "mlp.experts.down_proj",                    "D M",      _DIM1, transposed=True),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc2.bias",   "mlp.experts.down_proj_bias",               "D",        _NONE, transposed=True, when="expert_bias"),
)

LLAMA4_EXPERTS = (
    Row(_MOE,    "mlp.router.weight",                             "feed_forward.router.weight",               "E D",      _NONE),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc1.weight", "feed_forward.experts.gate_up_proj",        "M D, M D", _DIM0, transposed=True),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc2.weight", "feed_forward.experts.down_proj",           "D M",      _DIM1, transposed=True),
    Row(_MOE,    "mlp.shared_experts.linear_fc1.weight",          "feed_forward.shared_expert.{gate,up}_proj.weight", "S D, S D", _DIM0),
    Row(_MOE,    "mlp.shared_experts.linear_fc2.weight",          "feed_forward.shared_expert.down_proj.weight", "D S",   _DIM1),
)

GEMMA4_EXPERTS = (
    Row(_MOE,    "mlp.router.weight",                             "router.proj.weight",                       "E D",      _NONE),
    Row(_MOE,    "mlp.router.norm.weight",                        "router.scale",                             "D",        _NONE),
    Row(_MOE,    "mlp.router.expert_scale",                       "router.per_expert_scale",                  "E",        _NONE),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc1.weight", "experts.gate_up_proj",                     "M D, M D", _DIM0),
    Row(_EXPERT, "mlp.experts.local_experts.#.linear_fc2.weight", "experts.down_proj",                        "D M",      _DIM1),
    Row(_MOE,    "mlp.shared_experts.linear_fc1.weight",          "mlp.{gate,up}_proj.weight",                "F D, F D", _DIM0),
    Row(_MOE,    "mlp.shared_experts.linear_fc2.weight",          "mlp.down_proj.weight",                     "D F",      _DIM1),
    Row(_MOE,    "mlp.dense_input_norm.weight",                   "pre_feedforward_layernorm.weight",         "D",        _NONE),
    Row(_MOE,    "mlp.dense_output_norm.weight",                  "post_feedforward_layernorm_1.weight",      "D",        _NONE),
    Row(_MOE,    "mlp.expert_input_norm.weight",                  "pre_feedforward_layernorm_2.weight",       "D",        _NONE),
    Row(_MOE,    "mlp.expert_output_norm.weight",                 "post_feedforward_layernorm_2.weight",      "D",        _NONE),
)

HUNYUAN_EXPERTS = (
    Row(_MOE,    "mlp.router.weight",                             "mlp.gate.wg.weight",                       "E D",      _NONE),
    *QWEN_EXPERTS[1:3],
    Row(_MOE,    "mlp.shared_experts.linear_fc1.weight",          "mlp.shared_mlp.{gate,up}_proj.weight",     "S D, S D", _DIM0),
    Row(_MOE,    "mlp.shared_experts.linear_fc2.weight",          "mlp.shared_mlp.down_proj.weight",          "D S",      _DIM1),
)

MINIMAX_EXPERTS = (
    *MIXTRAL_EXPERTS,
    Row(_MOE,    "mlp.router.expert_bias",                        "block_sparse_moe.e_score_correction_bias", "E",        _NONE, when="router_bias", float32=True),
)
# fmt: on
