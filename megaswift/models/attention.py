"""Core attention for ranks without Transformer Engine: torch's SDPA, one call a document, no quadratic mask; or its flash kernel.

Where a sequence is spread over ranks it is the core attention of every platform.

Letters: S sequence, B batch, T packed tokens, H query heads of this rank, G key/value heads of this rank, K head size.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from megaswift.data.batches import MicroBatch
from megaswift.kernels.context_attention.segments import Pattern
from megaswift.mcore.process_groups import context_groups
from megaswift.metadata.meta import QueryScaling
from megaswift.models.context import SpreadDocuments, keys_of, spread_attention
from megaswift.models.flash import flash_attention, has_flash

CAPPED_QUERIES = 512  # queries whose soft-capped scores are formed at once: 512 * length * 4 bytes a head


@dataclass
class PackedDocuments(PackedSeqParams):
    """Documents that lie end to end on one rank."""

    lengths: tuple[int, ...] = ()  # so that no layer waits for the device to tell them


def packed_documents(cu_seqlens: torch.Tensor, max_seqlen: int, *, device: torch.device) -> PackedDocuments:
    """Return Megatron's description of documents that lie end to end on one rank.

    `cu_seqlens` is int32 [documents + 1], on the CPU; `max_seqlen` must be the true longest length: Megatron's rotary
    embedding reads a table of that many rows and takes one of exactly T rows for a table by packed position (rope_utils.py,
    0.16.1).
    """
    on_device = cu_seqlens.to(device, non_blocking=True)
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        lengths=tuple(cu_seqlens.diff().tolist()),
    )


def documents_of(batch: MicroBatch, device: torch.device) -> PackedSeqParams | None:
    """Return the documents of a micro batch, or of this rank's part of one; None for padded rows."""
    if batch.plan is not None:
        positions_T = batch.position_ids[0].to(device, non_blocking=True)
        return SpreadDocuments(plan=batch.plan, position_ids_T=positions_T, longest=batch.max_seqlen)
    if batch.cu_seqlens is None:
        return None
    return packed_documents(batch.cu_seqlens, batch.max_seqlen, device=device)


class CoreAttention(torch.nn.Module):
    """Causal attention on [S, B, heads, K] batches or on packed [T, heads, K] documents.

    Takes the place of Megatron's DotProductAttention in the layer spec, which refuses packed input (0.16.1).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        *,
        softcap: float | None = None,
        query_scaling: QueryScaling | None = None,
        qk_norm: ModuleSpec | None = None,
        chunk: int | None = None,
        **_: Any,
    ) -> None:
        """`qk_norm` is applied to q and k as they come: after the rotary positions. Tokens see their own chunk of a document."""
        super().__init__()
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale
        self.causal = attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        windowed = config.window_size is not None and is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window = config.window_size[0] + 1 if windowed else None
        self.softcap = softcap
        self.chunk = chunk
        self.groups, self.keys = context_groups(config), keys_of(config)
        turns = not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])
        skips = query_scaling is not None and query_scaling.only_without_rope and turns
        self.query_scaling = None if skips else query_scaling
        self.q_layernorm = self.k_layernorm = None
        if qk_norm is not None:
            self.q_layernorm, self.k_layernorm = (
                build_module(
                    qk_norm,
                    config=config,
                    hidden_size=config.kv_channels,
                    eps=config.layernorm_epsilon,
                )
                for _ in range(2)
            )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Return [S, B, H*K], or [T, H*K] for packed input. `attention_mask` is not read: the mask is causal."""
        assert attention_bias is None, "no attention bias in a decoder"
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if isinstance(packed_seq_params, SpreadDocuments):
            return self._attend_across_ranks(query, key, value, packed_seq_params)
        if packed_seq_params is None:
            out_BHSK = self._attend(*(x_SBHK.permute(1, 2, 0, 3) for x_SBHK in (query, key, value)))
            return out_BHSK.permute(2, 0, 1, 3).flatten(2)
        assert isinstance(packed_seq_params, PackedDocuments)
        if self._is_plain and has_flash(query, value):
            out_THK = flash_attention(
                query, key, value, cu_seqlens=packed_seq_params.cu_seqlens_q, longest=packed_seq_params.max_seqlen_q,
                causal=self.causal, window=self.window, scale=self.scale,
            )  # fmt: skip
            return out_THK.flatten(1)
        lengths = packed_seq_params.lengths
        documents = zip(*(x_THK.split(lengths) for x_THK in (query, key, value)), strict=True)
        outs = [
            self._attend(*(x_THK.transpose(0, 1)[None] for x_THK in document))[0].transpose(0, 1)
            for document in documents
        ]
        return torch.cat(outs).flatten(1)

    def _attend_across_ranks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: SpreadDocuments
    ) -> torch.Tensor:
        assert self.softcap is None and self.chunk is None and not self.dropout, (
            "refused by config/context_rules.py"
        )
        if self.query_scaling is not None:
            assert documents.position_ids_T is not None
            growth_T = _growth(self.query_scaling, documents.position_ids_T).to(query)
            query = query * growth_T.view(-1, *[1] * (query.dim() - 1))
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return spread_attention(
            query, key, value, documents, pattern=Pattern(causal=self.causal, window=self.window, scale=scale),
            groups=self.groups, keys=self.keys, sinks_H=self.sinks,
        )  # fmt: skip

    @property
    def _is_plain(self) -> bool:
        """Whether nothing but a window is between this and the attention of every kernel."""
        special = (self.softcap, self.chunk, self.query_scaling, self.sinks)
        return all(one is None for one in special) and not (self.training and self.dropout)

    @property
    def sinks(self) -> torch.Tensor | None:
        """A logit of each head that takes its share of the weights [H]; None here."""
        return None

    def _attend(
        self, query_BHSK: torch.Tensor, key_BGSK: torch.Tensor, value_BGSK: torch.Tensor
    ) -> torch.Tensor:
        length = query_BHSK.shape[2]
        if self.query_scaling is not None:
            query_BHSK = (
                query_BHSK * _growth(self.query_scaling, torch.arange(length)).to(query_BHSK)[:, None]
            )
        if self.chunk is not None and length > self.chunk:
            chunks = zip(
                *(x.split(self.chunk, dim=2) for x in (query_BHSK, key_BGSK, value_BGSK)), strict=True
            )
            return torch.cat([self._sdpa(*chunk, causal=self.causal) for chunk in chunks], dim=2)
        window = length if self.window is None else min(self.window, length)
        if window == length and self.softcap is None:
            return self._sdpa(query_BHSK, key_BGSK, value_BGSK, causal=self.causal)
        # Queries in blocks of one window see at most two windows of keys: memory stays linear in the length.
        step = window if self.softcap is None else min(window, CAPPED_QUERIES)
        blocks = []
        for start in range(0, length, step):
            stop, first = min(start + step, length), max(0, start - window + 1)
            distance = torch.arange(start, stop)[:, None] - torch.arange(first, stop)[None, :]
            mask = (distance >= 0) & (distance < window)
            block = (
                query_BHSK[:, :, start:stop],
                key_BGSK[:, :, first:stop],
                value_BGSK[:, :, first:stop],
            )
            if self.softcap is None:
                blocks.append(self._sdpa(*block, mask=mask.to(query_BHSK.device)))
            else:
                blocks.append(self._softcapped(*block, mask=mask.to(query_BHSK.device)))
        return torch.cat(blocks, dim=2)

    def _softcapped(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor
    ) -> torch.Tensor:
        """Attention whose scores are soft-capped before the mask (Gemma 2; transformers 5.23, modeling_gemma2.py)."""
        assert self.softcap is not None
        heads_per_group = query.shape[1] // key.shape[1]
        key, value = (x_BGSK.repeat_interleave(heads_per_group, dim=1) for x_BGSK in (key, value))
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = torch.tanh(query @ key.transpose(2, 3) * (scale / self.softcap)) * self.softcap
        weights = scores.float().masked_fill(~mask, float("-inf")).softmax(dim=-1).to(query.dtype)
        if self.training and self.dropout:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                weights = F.dropout(weights, self.dropout)
        return weights @ value

    def _sdpa(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        def attend(dropout: float) -> torch.Tensor:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )

        if not (self.training and self.dropout):
            return attend(0.0)
        with (
            tensor_parallel.get_cuda_rng_tracker().fork()
        ):  # heads differ between tp ranks, and so must their dropout
            return attend(self.dropout)


def _growth(scaling: QueryScaling, positions_S: torch.Tensor) -> torch.Tensor:
    """Return the factor of the query at each position in its document [S], float32 (Llama 4; Ministral 3)."""
    steps = torch.floor((positions_S + scaling.offset) / scaling.length)
    return 1 + scaling.beta * torch.log1p(steps)


class GatedAttention(SelfAttention):
    """Self-attention whose heads are scaled by gates, without the compiler that Megatron's own function calls at run time."""

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Return [S, B, H*K] scaled by gates of as many elements, in float32."""
        return (x * torch.sigmoid(gate.float()).reshape(x.shape)).to(x.dtype)


class OwnRopeAttention(SelfAttention):
    """Self-attention that takes its layer's table of rotary positions, where layers have several kinds of them."""

    def __init__(
        self, config: TransformerConfig, *args: Any, table: int, size: int, stretched: bool, **kwargs: Any
    ) -> None:
        """`table` has `size` angles a position (models/rope.py), which are `stretched` or not."""
        super().__init__(config, *args, **kwargs)
        self.table, self.size = table, size
        if not stretched:
            self.config = copy.copy(config)
            self.config.yarn_rotary_scaling_factor = 1.0  # other layers' positions may be stretched
            self._yarn_concentration_factor = 1.0  # where 0.19 keeps what follows from it

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As Megatron's; `rotary_pos_emb` is [S, tables, 1, the largest of their sizes]."""
        if rotary_pos_emb is not None:
            rotary_pos_emb = rotary_pos_emb[:, self.table : self.table + 1, :, : self.size]
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)
