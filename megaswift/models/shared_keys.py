"""Attention whose values are normed, may be the keys, or come with them from an earlier layer (Gemma 4).

Letters: S sequence, B batch, D model size, H query heads of this rank, G key/value heads of this rank, K head size.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_config import TransformerConfig

from megaswift.metadata.meta import LayerVariation
from megaswift.models.attention import OwnRopeAttention
from megaswift.models.layer_inputs import Carried


class Projections(Enum):
    """What linear_qkv projects."""

    QUERIES_KEYS_VALUES = 0
    QUERIES_KEYS = 1
    QUERIES = 2

    @property
    def absent(self) -> int:
        """How many of keys and values it does not project."""
        return int(self.value)


@dataclass(frozen=True, kw_only=True)
class KeySource:
    """Where a layer's keys and values come from, and whether later layers read them."""

    projections: Projections = Projections.QUERIES_KEYS_VALUES
    layer: int | None = None  # that has projected them, of QUERIES
    is_read: bool = False

    @classmethod
    def of(cls, varied: LayerVariation | None, layer: int) -> "KeySource":
        """Return the source of one layer."""
        if varied is None:
            return cls()
        source = varied.kv_from_layer[layer]
        if source is not None:
            return cls(projections=Projections.QUERIES, layer=source)
        both = Projections.QUERIES_KEYS if varied.value_is_key[layer] else Projections.QUERIES_KEYS_VALUES
        return cls(projections=both, is_read=layer in varied.kv_from_layer)


class NormedValueAttention(OwnRopeAttention):
    """Self-attention whose values are normed without a weight (transformers 5.23, modeling_gemma4.py, Gemma4TextAttention)."""

    def __init__(
        self, config: TransformerConfig, *args: Any, source: KeySource, carried: Carried, **kwargs: Any
    ) -> None:
        """Without all projections linear_qkv is a FewerProjectionsLinear."""
        super().__init__(config, *args, **kwargs)
        self.source, self.carried = source, carried
        self.v_layernorm = L2Norm(self.hidden_size_per_attention_head, eps=config.layernorm_epsilon)

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q [S, B, H, K], k and v [S, B, G, K] of hidden states [S, B, D], before the rotary positions."""
        if self.source.layer is not None:
            query, _ = self.linear_qkv(hidden_states)
            query = query.unflatten(-1, (-1, self.hidden_size_per_attention_head))
            return self.q_layernorm(query), *self.carried.keys_values[self.source.layer]
        if self.source.projections is Projections.QUERIES_KEYS:
            query, key, value = self._queries_and_keys(hidden_states)
        else:
            query, key, value = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        value = self.v_layernorm(value)
        if self.source.is_read:
            self.carried.keys_values[self.layer_number - 1] = key, value
        return query, key, value

    def _queries_and_keys(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k, and k before its norm."""
        mixed, _ = self.linear_qkv(hidden_states)
        sharing = max(1, self.world_size // self.config.num_query_groups)  # ranks with the queries of one group
        if sharing > 1:
            # A rank has some rows of a group: as Megatron does, all are gathered and this rank's group is taken.
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed)
            mixed = mixed.chunk(self.config.num_query_groups, dim=-1)[self.tp_group.rank() // sharing]
        mixed_SBGN = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))
        head = self.hidden_size_per_attention_head
        query, key = mixed_SBGN[..., :-head], mixed_SBGN[..., -head:]
        query = query.reshape(*query.shape[:2], -1, head)
        query = query.chunk(sharing, dim=2)[self.tp_group.rank() % sharing]
        return self.q_layernorm(query), self.k_layernorm(key), key
