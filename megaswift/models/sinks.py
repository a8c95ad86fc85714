"""Core attention with sinks: a learned logit of each head joins the softmax and takes its share of the weight away.

Letters: S sequence, B batch, H query heads of this rank, G key/value heads of this rank, K head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megaswift.models.attention import CAPPED_QUERIES, CoreAttention


class SinkAttention(CoreAttention):
    """Attention as gpt-oss has it (transformers 5.23, modeling_gpt_oss.py, eager_attention_forward)."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.group = parallel_state.get_tensor_model_parallel_group()
        local_heads = config.num_attention_heads // self.group.size()
        # The name of Megatron's own learned offset (dot_product_attention.py, 0.16.1).
        self.softmax_offset = torch.nn.Parameter(
            torch.zeros(local_heads, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    @property
    def sinks(self) -> torch.Tensor:
        """The logits [H], H query heads of this rank."""
        return self.softmax_offset

    def _sdpa(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return [B, H, S, K]; without a mask the scores of so many queries at once are formed that memory stays linear."""
        if mask is not None:
            return self._weigh(query, key, value, mask=mask)
        assert causal, "a decoder looks back only"
        positions = torch.arange(query.shape[2], device=query.device)
        blocks = []
        for rows in positions.split(CAPPED_QUERIES):
            stop = int(rows[-1]) + 1
            mask = rows[:, None] >= positions[None, :stop]
            blocks.append(self._weigh(query[:, :, rows], key[:, :, :stop], value[:, :, :stop], mask=mask))
        return torch.cat(blocks, dim=2)

    def _weigh(
        self,
        query_BHSK: torch.Tensor,
        key_BGSK: torch.Tensor,
        value_BGSK: torch.Tensor,
        *,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        heads_per_group = query_BHSK.shape[1] // key_BGSK.shape[1]
        key, value = (x_BGSK.repeat_interleave(heads_per_group, dim=1) for x_BGSK in (key_BGSK, value_BGSK))
        scale = query_BHSK.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (query_BHSK @ key.transpose(2, 3) * scale).masked_fill(~mask, float("-inf"))
        sinks = self.softmax_offset[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1).float().softmax(dim=-1)[..., :-1].to(query_BHSK.dtype)
        if self.training and self.dropout:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                weights = F.dropout(weights, self.dropout)
        return weights @ value

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """Return Megatron's sharded state: the sinks are cut along the heads."""
        return make_sharded_tensors_for_checkpoint(
            {"softmax_offset": self.softmax_offset},
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {}).get("dp_cp_group")
            or parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
