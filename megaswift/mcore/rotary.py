"""Rotary positions of queries and keys by this project's kernel, in the place of Megatron's unfused function.

Letters: S positions, T tokens of q or k, H heads, K head size, R half of the rotary dimensions.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.transformer_config import TransformerConfig

from megaswift.kernels.rotary.ops import RotaryTable, rotary


def apply_rotary(
    t: torch.Tensor,
    freqs: torch.Tensor,
    config: TransformerConfig,
    cu_seqlens: torch.Tensor | None = None,
    mscale: float = 1.0,
    cp_group: torch.distributed.ProcessGroup | None = None,
    **others: Any,
) -> torch.Tensor:
    """Return `t` [S, B, H, K] or packed [T, H, K], turned by the angles `freqs` [S, 1, 1, 2R], as Megatron's function does.

    What Megatron or Transformer Engine cut or fuse by rules of their own stays theirs.
    """
    cut_by_megatron = cu_seqlens is not None and cp_group is not None and cp_group.size() > 1
    if config.apply_rope_fusion or config.multi_latent_attention or freqs.shape[1] != 1 or cut_by_megatron:
        return apply_rotary_pos_emb(t, freqs, config, cu_seqlens, mscale, cp_group, **others)
    table = _table(freqs, cu_seqlens, mscale, num_tokens=len(t), interleaved=config.rotary_interleaved)
    return rotary(t.flatten(1, -2), table, interleaved=config.rotary_interleaved).view(t.shape)


def _table(
    freqs: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    mscale: float,
    *,
    num_tokens: int,
    interleaved: bool,
) -> RotaryTable:
    """Return the cosines and sines of every token, made once for all layers that are given the same tensor of angles."""
    made: dict[tuple[int, float], tuple[torch.Tensor | None, RotaryTable]] = freqs.__dict__.setdefault(
        "rotary_tables", {}
    )
    key = (id(cu_seqlens), mscale)
    if key not in made:
        angles_SR = freqs[:, 0, 0, ::2] if interleaved else freqs[:, 0, 0, : freqs.shape[-1] // 2]
        cos, sin = torch.cos(angles_SR) * mscale, torch.sin(angles_SR) * mscale
        if cu_seqlens is not None:
            # Each token's place in its document, without asking the device for lengths.
            starts_T = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
            positions_T = torch.arange(num_tokens, device=cu_seqlens.device) - starts_T
            cos, sin = cos[positions_T], sin[positions_T]
        # `cu_seqlens` is kept so that its id stays its own.
        made[key] = cu_seqlens, RotaryTable(cos_TR=cos.contiguous(), sin_TR=sin.contiguous())
    return made[key][1]
