"""Documents that are spread over the ranks of a sequence, as Megatron's layers are told of them, and their attention.

Letters: T tokens of this rank, H query heads, G key/value heads, K head size, L head size of values.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megaswift.kernels.context_attention.ops import Keys, context_attention
from megaswift.kernels.context_attention.plan import ContextPlan
from megaswift.kernels.context_attention.segments import Pattern
from megaswift.mcore.process_groups import ContextGroups


@dataclass
class SpreadDocuments(PackedSeqParams):
    """Documents of which this rank holds some tokens.

    It leaves `qkv_format` empty: Megatron then turns token i by row i of the rotary table (models/rope.py makes it by
    `position_ids_T`), and does none of its own cutting of documents, which asks for lengths padded to 2 * cp.
    """

    plan: ContextPlan | None = None
    position_ids_T: torch.Tensor | None = None
    longest: int = 0  # tokens of the longest document


def spread_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: SpreadDocuments,
    *,
    pattern: Pattern,
    groups: ContextGroups,
    keys: Keys,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Return the output [T, 1, H*L] of this rank's tokens; every cp rank calls it.

    query, key, value: [T, 1, heads, size], or [T, heads, size] as latent attention has them.
    """
    assert documents.plan is not None, "spread documents have a plan"
    query_THK, key_TGK, value_TGL = (x.flatten(0, -3) for x in (query, key, value))
    out_THL = context_attention(
        query_THK, key_TGK, value_TGL, documents.plan, pattern=pattern,
        ring_group=groups.ring, inner_group=groups.inner, keys=keys, sinks_H=sinks_H,
    )  # fmt: skip
    return out_THL.flatten(1)[:, None]


def keys_of(config: TransformerConfig) -> Keys:
    """Return how keys come to a rank."""
    return Keys.GATHERED if config.cp_comm_type == "all_gather" else Keys.RING
