"""Rows of Gated DeltaNet; names as transformers 5.23 writes them (models/qwen3_next, qwen3_5).

Here every key head has its rows together: q, k, v of its value heads, and z of them; b and a likewise.
"""

from megaswift.converters.table import Place, Row, Shard

_DELTA = Place.DELTA
_NONE, _DIM0, _DIM1 = Shard.NONE, Shard.DIM0, Shard.DIM1

# fmt: off
_SHARED = (
    Row(_DELTA, "self_attention.conv1d.weight",       "linear_attn.conv1d.weight",                 "NP 1 T, NP 1 T, XY 1 T",     _DIM0, per="N"),
    Row(_DELTA, "self_attention.A_log",               "linear_attn.A_log",                         "X",                          _DIM0),
    Row(_DELTA, "self_attention.dt_bias",             "linear_attn.dt_bias",                       "X",                          _DIM0),
    Row(_DELTA, "self_attention.out_norm.weight",     "linear_attn.norm.weight",                   "Y",                          _NONE),
    Row(_DELTA, "self_attention.out_proj.weight",     "linear_attn.out_proj.weight",               "D XY",                       _DIM1),
)
DELTA_NET = (  # the file has the rows of a key head together too
    Row(_DELTA, "self_attention.in_proj_qkvz.weight", "linear_attn.in_proj_qkvz.weight",           "NJ D",                       _DIM0),
    Row(_DELTA, "self_attention.in_proj_ba.weight",   "linear_attn.in_proj_ba.weight",             "NI D",                       _DIM0),
    *_SHARED,
)
SPLIT_DELTA_NET = (
    Row(_DELTA, "self_attention.in_proj_qkvz.weight", "linear_attn.in_proj_{qkv,qkv,qkv,z}.weight", "NP D, NP D, XY D, XY D",    _DIM0, per="N"),
    Row(_DELTA, "self_attention.in_proj_ba.weight",   "linear_attn.in_proj_{b,a}.weight",          "X D, X D",                   _DIM0, per="N"),
    *_SHARED,
)
# fmt: on
