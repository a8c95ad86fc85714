"""Attention on packed documents in one call of torch's own flash kernel, where this torch and this GPU have it.

Letters: T packed tokens, H query heads, G key/value heads, K head size.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

_HALF = (torch.bfloat16, torch.float16)
_LARGEST, _LARGEST_ELSEWHERE = 256, 192
_FOR_THE_LARGEST = (
    (8, 0),
    (9, 0),
    (10, 0),
)  # others have too little shared memory for gradients (sdp_utils.cpp)


def has_flash(query_THK: torch.Tensor, value_TGK: torch.Tensor) -> bool:
    """Say whether flash_attention takes these tensors."""
    if not query_THK.is_cuda or query_THK.dtype not in _HALF or _kernel() is None:
        return False
    capability = torch.cuda.get_device_capability(query_THK.device)
    largest = _LARGEST if capability in _FOR_THE_LARGEST else _LARGEST_ELSEWHERE
    size = query_THK.shape[-1]
    fits = size == value_TGK.shape[-1] and size <= largest and size % 8 == 0
    return fits and capability >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


def flash_attention(
    query_THK: torch.Tensor,
    key_TGK: torch.Tensor,
    value_TGK: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    longest: int,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Return [T, H, K]: each document attends to itself, causally to the last `window` of its tokens if there is one.

    `cu_seqlens` is int32 [documents + 1]; torch 2.13, torch/nn/attention/varlen.py.
    """
    kernel = _kernel()
    assert kernel is not None, "has_flash was asked"
    left, right = (-1 if window is None else window - 1), (0 if causal else -1)
    out: torch.Tensor = kernel(
        query_THK, key_TGK, value_TGK, cu_seqlens, cu_seqlens, longest, longest,
        scale=scale, window_size=(left, right), enable_gqa=query_THK.shape[1] != key_TGK.shape[1],
    )  # fmt: skip
    return out


@cache
def _kernel() -> Callable[..., Any] | None:
    """Return torch's function, None before it took windows and grouped heads (it came in torch 2.10 without)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return (
        varlen_attn
        if {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
        else None
    )
