"""The catalogue of tables: family of ModelMeta -> the weights of its files."""

from megaswift.converters.table import Table
from megaswift.converters.tables.decoder import (
    ALL_HEADS_NORMS,
    ATTENTION,
    ENDS,
    GATED_LINEARS,
    GATED_MLP,
    GEMMA4_NORMS,
    KEY_VALUE_LINEARS,
    LATE_HEAD_NORMS,
    LAYER_INPUTS,
    LINEARS,
    LLAMA4_MLP,
    PRE_NORMS,
    SINKS,
)
from megaswift.converters.tables.delta import DELTA_NET, SPLIT_DELTA_NET
from megaswift.converters.tables.dense import DENSE_TABLES
from megaswift.converters.tables.experts import (
    DEEPSEEK_EXPERTS,
    ERNIE_EXPERTS,
    GEMMA4_EXPERTS,
    GPT_OSS_EXPERTS,
    GRANITE_EXPERTS,
    HUNYUAN_EXPERTS,
    LLAMA4_EXPERTS,
    MINIMAX_EXPERTS,
    MIXTRAL_EXPERTS,
    QWEN_EXPERTS,
)
from megaswift.converters.tables.latent import LATENT_ATTENTION

_QWEN_MOE = Table(rows=ENDS + ATTENTION + GATED_MLP + QWEN_EXPERTS)
_NORMED_OVER_HEADS = ENDS + PRE_NORMS + LINEARS + ALL_HEADS_NORMS
_DEEPSEEK_MOE = Table(rows=ENDS + ATTENTION + GATED_MLP + DEEPSEEK_EXPERTS)
_DEEPSEEK = Table(rows=ENDS + PRE_NORMS + LATENT_ATTENTION + GATED_MLP + DEEPSEEK_EXPERTS)
_GRANITE_MOE = Table(rows=ENDS + ATTENTION + GRANITE_EXPERTS)
_HYBRID = ENDS + PRE_NORMS + GATED_LINEARS + GATED_MLP

TABLES: dict[str, Table] = {
    **DENSE_TABLES,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "dots1": _DEEPSEEK_MOE,
    "ernie4_5_moe": Table(rows=ENDS + ATTENTION + GATED_MLP + ERNIE_EXPERTS),
    "gemma4_text": Table(
        rows=ENDS + GEMMA4_NORMS + KEY_VALUE_LINEARS + GATED_MLP + GEMMA4_EXPERTS + LAYER_INPUTS
    ),
    "glm4_moe": _DEEPSEEK_MOE,
    "glm4_moe_lite": _DEEPSEEK,
    "gpt_oss": Table(rows=ENDS + PRE_NORMS + LINEARS + SINKS + GPT_OSS_EXPERTS),
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "hunyuan_v1_moe": Table(rows=ENDS + PRE_NORMS + LINEARS + LATE_HEAD_NORMS + HUNYUAN_EXPERTS),
    "kimi_k2": _DEEPSEEK,
    "llama4_text": Table(rows=ENDS + PRE_NORMS + LINEARS + LLAMA4_MLP + LLAMA4_EXPERTS),
    "minimax_m2": Table(rows=_NORMED_OVER_HEADS + MINIMAX_EXPERTS),
    "mixtral": Table(rows=ENDS + ATTENTION + MIXTRAL_EXPERTS),
    "olmoe": Table(rows=_NORMED_OVER_HEADS + QWEN_EXPERTS),
    "qwen2_moe": _QWEN_MOE,
    "qwen3_5_moe_text": Table(rows=_HYBRID + SPLIT_DELTA_NET + QWEN_EXPERTS, mtp_prefix="mtp."),
    "qwen3_5_text": Table(rows=_HYBRID + SPLIT_DELTA_NET, mtp_prefix="mtp."),
    "qwen3_moe": _QWEN_MOE,
    "qwen3_next": Table(rows=_HYBRID + DELTA_NET + QWEN_EXPERTS, mtp_prefix="mtp."),
}
