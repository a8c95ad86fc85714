"""Rows that llama-like decoders share; names of the files as transformers 5.23 writes them (models/llama, qwen2, qwen3)."""

from megaswift.converters.table import Place, Row, Shard

_FIRST, _LAST, _LAYER, _DENSE = Place.FIRST, Place.LAST, Place.LAYER, Place.DENSE
_NONE, _DIM0, _DIM1 = Shard.NONE, Shard.DIM0, Shard.DIM1

# fmt: off
ENDS = (
    Row(_FIRST, "embedding.word_embeddings.weight",     "model.embed_tokens.weight",       "V D",              _DIM0),
    Row(_LAST,  "decoder.final_layernorm.weight",       "model.norm.weight",               "D",                _NONE),
    Row(_LAST,  "output_layer.weight",                  "score.weight",                    "O D",              _NONE, when="scores"),
    Row(_LAST,  "output_layer.weight",                  "lm_head.weight",                  "V D",              _DIM0, when="untied"),
)

LINEARS = (
    Row(_LAYER, "self_attention.linear_qkv.weight",     "self_attn.{q,k,v}_proj.weight",   "HK D, GK D, GK D", _DIM0, per="G"),
    Row(_LAYER, "self_attention.linear_qkv.bias",       "self_attn.{q,k,v}_proj.bias",     "HK, GK, GK",       _DIM0, per="G", when="qkv_bias"),
    Row(_LAYER, "self_attention.linear_proj.weight",    "self_attn.o_proj.weight",         "D HK",             _DIM1),
    Row(_LAYER, "self_attention.linear_proj.bias",      "self_attn.o_proj.bias",           "D",                _NONE, when="attention_out_bias"),
)
# Layers that share keys and values: of a layer with its values, of one whose values are its keys, of one that projects neither.
_KEYS, _VALUES, _NO_VALUES, _NO_KEYS = Place.KEYS, Place.VALUES, Place.NO_VALUES, Place.NO_KEYS
KEY_VALUE_LINEARS = (
    Row(_VALUES,    "self_attention.linear_qkv.weight", "self_attn.{q,k,v}_proj.weight",   "HK D, GK D, GK D", _DIM0, per="G"),
    Row(_VALUES,    "self_attention.linear_qkv.bias",   "self_attn.{q,k,v}_proj.bias",     "HK, GK, GK",       _DIM0, per="G", when="qkv_bias"),
    Row(_NO_VALUES, "self_attention.linear_qkv.weight", "self_attn.{q,k}_proj.weight",     "HK D, GK D",       _DIM0, per="G"),
    Row(_NO_VALUES, "self_attention.linear_qkv.bias",   "self_attn.{q,k}_proj.bias",       "HK, GK",           _DIM0, per="G", when="qkv_bias"),
    Row(_NO_KEYS,   "self_attention.linear_qkv.weight", "self_attn.q_proj.weight",         "HK D",             _DIM0),
    Row(_NO_KEYS,   "self_attention.linear_qkv.bias",   "self_attn.q_proj.bias",           "HK",               _DIM0, when="qkv_bias"),
    Row(_LAYER,     "self_attention.q_layernorm.weight", "self_attn.q_norm.weight",        "K",                _NONE),
    Row(_KEYS,      "self_attention.k_layernorm.weight", "self_attn.k_norm.weight",        "K",                _NONE),
    *LINEARS[2:],
)
LAYER_INPUTS = (
    Row(_FIRST, "layer_inputs.word_embeddings.weight",  "model.embed_tokens_per_layer.weight", "R Q",          _DIM0, when="layer_inputs"),
    Row(_FIRST, "layer_inputs.projection.weight",       "model.per_layer_model_projection.weight", "Q D",      _NONE, when="layer_inputs"),
    Row(_FIRST, "layer_inputs.norm.weight",             "model.per_layer_projection_norm.weight", "B",         _NONE, when="layer_inputs"),
    Row(_LAYER, "input_gate.weight",                    "per_layer_input_gate.weight",     "B D",              _NONE, when="layer_inputs"),
    Row(_LAYER, "input_projection.weight",              "per_layer_projection.weight",     "D B",              _NONE, when="layer_inputs"),
    Row(_LAYER, "input_norm.weight",                    "post_per_layer_input_norm.weight", "D",               _NONE, when="layer_inputs"),
)
FUSED_LINEARS = (
    Row(_LAYER, "self_attention.linear_qkv.weight",     "self_attn.qkv_proj.weight",       "HK D, GK D, GK D", _DIM0, per="G"),
    Row(_LAYER, "self_attention.linear_proj.weight",    "self_attn.o_proj.weight",         "D HK",             _DIM1),
)

# Each query head stands above its gate in the file; Megatron has the gates of a group below its queries (attention.py, 0.16.1).
_SOFTMAX = Place.SOFTMAX
GATED_LINEARS = (
    Row(_SOFTMAX, "self_attention.linear_qkv.weight",   "self_attn.{q,q,k,v}_proj.weight", "HK D, HK D, GK D, GK D", _DIM0, per="G", by_head=True),
    Row(_SOFTMAX, "self_attention.linear_qkv.bias",     "self_attn.{q,q,k,v}_proj.bias",   "HK, HK, GK, GK",   _DIM0, per="G", by_head=True, when="qkv_bias"),
    Row(_SOFTMAX, "self_attention.linear_proj.weight",  "self_attn.o_proj.weight",         "D HK",             _DIM1),
    Row(_SOFTMAX, "self_attention.linear_proj.bias",    "self_attn.o_proj.bias",           "D",                _NONE, when="attention_out_bias"),
    Row(_SOFTMAX, "self_attention.q_layernorm.weight",  "self_attn.q_norm.weight",         "K",                _NONE),
    Row(_SOFTMAX, "self_attention.k_layernorm.weight",  "self_attn.k_norm.weight",         "K",                _NONE),
)

# One norm shared by the heads, or one over all of them; Hunyuan's come after the rotary positions.
HEAD_NORMS = (
    Row(_LAYER, "self_attention.q_layernorm.weight",    "self_attn.q_norm.weight",         "K",                _NONE, when="qk_norm"),
    Row(_LAYER, "self_attention.k_layernorm.weight",    "self_attn.k_norm.weight",         "K",                _NONE, when="qk_norm"),
)
ALL_HEADS_NORMS = (
    Row(_LAYER, "self_attention.q_layernorm.weight",    "self_attn.q_norm.weight",         "HK",               _DIM0),
    Row(_LAYER, "self_attention.k_layernorm.weight",    "self_attn.k_norm.weight",         "GK",               _DIM0),
)
LATE_HEAD_NORMS = (
    Row(_LAYER, "self_attention.core_attention.q_layernorm.weight", "self_attn.query_layernorm.weight", "K",   _NONE, when="late_qk_norm"),
    Row(_LAYER, "self_attention.core_attention.k_layernorm.weight", "self_attn.key_layernorm.weight",   "K",   _NONE, when="late_qk_norm"),
)
SINKS = (
    Row(_LAYER, "self_attention.core_attention.softmax_offset", "self_attn.sinks",              "H",                _DIM0),
)

PRE_NORMS = (
    Row(_LAYER, "input_layernorm.weight",               "input_layernorm.weight",          "D",                _NONE),
    Row(_LAYER, "pre_mlp_layernorm.weight",             "post_attention_layernorm.weight", "D",                _NONE),
)
PRE_NORM_BIASES = (
    Row(_LAYER, "input_layernorm.bias",                 "input_layernorm.bias",            "D",                _NONE),
    Row(_LAYER, "pre_mlp_layernorm.bias",               "post_attention_layernorm.bias",   "D",                _NONE),
    Row(_LAST,  "decoder.final_layernorm.bias",         "model.norm.bias",                 "D",                _NONE),
)
ONE_NORM = (
    Row(_LAYER, "input_layernorm.weight",               "input_layernorm.weight",          "D",                _NONE),
)
APERTUS_NORMS = (
    Row(_LAYER, "input_layernorm.weight",               "attention_layernorm.weight",      "D",                _NONE),
    Row(_LAYER, "pre_mlp_layernorm.weight",             "feedforward_layernorm.weight",    "D",                _NONE),
)
POST_NORMS = (
    Row(_LAYER, "self_attn_bda.norm.weight",            "post_attention_layernorm.weight", "D",                _NONE),
    Row(_LAYER, "mlp_bda.norm.weight",                  "post_feedforward_layernorm.weight", "D",              _NONE),
)
GEMMA_NORMS = (
    *POST_NORMS,
    Row(_LAYER, "input_layernorm.weight",               "input_layernorm.weight",          "D",                _NONE),
    Row(_LAYER, "pre_mlp_layernorm.weight",             "pre_feedforward_layernorm.weight", "D",               _NONE),
)
GEMMA4_NORMS = (
    *POST_NORMS,
    Row(_LAYER, "input_layernorm.weight",               "input_layernorm.weight",          "D",                _NONE),
    Row(_DENSE, "pre_mlp_layernorm.weight",             "pre_feedforward_layernorm.weight", "D",               _NONE),
    Row(_LAYER, "layer_scalar",                         "layer_scalar",                    "1",                _NONE),
)
GLM_NORMS = (
    *PRE_NORMS,
    Row(_LAYER, "self_attn_bda.norm.weight",            "post_self_attn_layernorm.weight", "D",                _NONE),
    Row(_LAYER, "mlp_bda.norm.weight",                  "post_mlp_layernorm.weight",       "D",                _NONE),
)

ATTENTION = PRE_NORMS + LINEARS + HEAD_NORMS

GATED_MLP = (
    Row(_DENSE, "mlp.linear_fc1.weight",                "mlp.{gate,up}_proj.weight",       "F D, F D",         _DIM0),
    Row(_DENSE, "mlp.linear_fc1.bias",                  "mlp.{gate,up}_proj.bias",         "F, F",             _DIM0, when="mlp_bias"),
    Row(_DENSE, "mlp.linear_fc2.weight",                "mlp.down_proj.weight",            "D F",              _DIM1),
    Row(_DENSE, "mlp.linear_fc2.bias",                  "mlp.down_proj.bias",              "D",                _NONE, when="mlp_bias"),
)
LLAMA4_MLP = (
    Row(_DENSE, "mlp.linear_fc1.weight",                "feed_forward.{gate,up}_proj.weight", "F D, F D",      _DIM0),
    Row(_DENSE, "mlp.linear_fc2.weight",                "feed_forward.down_proj.weight",   "D F",              _DIM1),
)
FUSED_GATED_MLP = (
    Row(_DENSE, "mlp.linear_fc1.weight",                "mlp.gate_up_proj.weight",         "F D, F D",         _DIM0),
    Row(_DENSE, "mlp.linear_fc2.weight",                "mlp.down_proj.weight",            "D F",              _DIM1),
)
UNGATED_MLP = (
    Row(_DENSE, "mlp.linear_fc1.weight",                "mlp.up_proj.weight",              "F D",              _DIM0),
    Row(_DENSE, "mlp.linear_fc1.bias",                  "mlp.up_proj.bias",                "F",                _DIM0, when="mlp_bias"),
    Row(_DENSE, "mlp.linear_fc2.weight",                "mlp.down_proj.weight",            "D F",              _DIM1),
    Row(_DENSE, "mlp.linear_fc2.bias",                  "mlp.down_proj.bias",              "D",                _NONE, when="mlp_bias"),
)
STARCODER_MLP = (
    Row(_DENSE, "mlp.linear_fc1.weight",                "mlp.c_fc.weight",                 "F D",              _DIM0),
    Row(_DENSE, "mlp.linear_fc1.bias",                  "mlp.c_fc.bias",                   "F",                _DIM0, when="mlp_bias"),
    Row(_DENSE, "mlp.linear_fc2.weight",                "mlp.c_proj.weight",               "D F",              _DIM1),
    Row(_DENSE, "mlp.linear_fc2.bias",                  "mlp.c_proj.bias",                 "D",                _NONE, when="mlp_bias"),
)
XIELU = (
    Row(_DENSE, "mlp.activation_func.alpha_p",          "mlp.act_fn.alpha_p",              "1",                _NONE),
    Row(_DENSE, "mlp.activation_func.alpha_n",          "mlp.act_fn.alpha_n",              "1",                _NONE),
    Row(_DENSE, "mlp.activation_func.beta",             "mlp.act_fn.beta",                 "",                 _NONE),
    Row(_DENSE, "mlp.activation_func.eps",              "mlp.act_fn.eps",                  "",                 _NONE),
)
# fmt: on
