"""The tables of families without experts."""

from dataclasses import replace

from megaswift.converters.table import Table
from megaswift.converters.tables.decoder import (
    ALL_HEADS_NORMS,
    APERTUS_NORMS,
    ATTENTION,
    ENDS,
    FUSED_GATED_MLP,
    FUSED_LINEARS,
    GATED_MLP,
    GEMMA_NORMS,
    GLM_NORMS,
    HEAD_NORMS,
    LATE_HEAD_NORMS,
    LINEARS,
    ONE_NORM,
    POST_NORMS,
    PRE_NORM_BIASES,
    PRE_NORMS,
    STARCODER_MLP,
    UNGATED_MLP,
    XIELU,
)

_LLAMA = Table(rows=ENDS + ATTENTION + GATED_MLP)
_OLMO = Table(rows=ENDS + POST_NORMS + LINEARS + ALL_HEADS_NORMS + GATED_MLP)
_GEMMA = Table(rows=ENDS + GEMMA_NORMS + LINEARS + HEAD_NORMS + GATED_MLP)
_COHERE = Table(rows=ENDS + ONE_NORM + LINEARS + GATED_MLP)

DENSE_TABLES: dict[str, Table] = {
    "apertus": Table(rows=ENDS + APERTUS_NORMS + LINEARS + HEAD_NORMS + UNGATED_MLP + XIELU),
    "arcee": Table(rows=ENDS + ATTENTION + UNGATED_MLP),
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "ernie4_5": _LLAMA,
    "exaone4": Table(rows=ENDS + POST_NORMS + LINEARS + HEAD_NORMS + GATED_MLP),
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "glm4": Table(rows=ENDS + GLM_NORMS + LINEARS + FUSED_GATED_MLP),
    "granite": _LLAMA,
    "hunyuan_v1_dense": Table(rows=ENDS + PRE_NORMS + LINEARS + LATE_HEAD_NORMS + GATED_MLP),
    "internlm3": _LLAMA,
    "llama": _LLAMA,
    "mimo": replace(_LLAMA, mtp_prefix="model.mtp_layers."),
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "phi3": Table(rows=ENDS + PRE_NORMS + FUSED_LINEARS + FUSED_GATED_MLP),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "starcoder2": Table(rows=ENDS + PRE_NORM_BIASES + ATTENTION + STARCODER_MLP),
}
