"""Rows of multi-head latent attention; names as transformers 5.23 writes them (models/deepseek_v3)."""

from megaswift.converters.table import Place, Row, Shard

_LAYER = Place.LAYER
_NONE, _DIM0, _DIM1 = Shard.NONE, Shard.DIM0, Shard.DIM1

# fmt: off
LATENT_ATTENTION = (
    Row(_LAYER, "self_attention.linear_q_proj.weight",       "self_attn.q_proj.weight",             "HK D", _DIM0, when="direct_queries"),
    Row(_LAYER, "self_attention.linear_q_down_proj.weight",  "self_attn.q_a_proj.weight",           "A D",  _DIM0, when="latent_queries"),
    Row(_LAYER, "self_attention.q_layernorm.weight",         "self_attn.q_a_layernorm.weight",      "A",    _NONE, when="latent_queries"),
    Row(_LAYER, "self_attention.linear_q_up_proj.weight",    "self_attn.q_b_proj.weight",           "HK A", _DIM0, when="latent_queries"),
    Row(_LAYER, "self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "L D",  _DIM0),
    Row(_LAYER, "self_attention.kv_layernorm.weight",        "self_attn.kv_a_layernorm.weight",     "C",    _NONE),
    Row(_LAYER, "self_attention.linear_kv_up_proj.weight",   "self_attn.kv_b_proj.weight",          "HW C", _DIM0),
    Row(_LAYER, "self_attention.linear_proj.weight",         "self_attn.o_proj.weight",             "D HU", _DIM1),
)
# fmt: on
