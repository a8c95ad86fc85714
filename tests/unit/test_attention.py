"""The CPU core attention against brute force."""

import itertools
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megaswift.models import attention
from megaswift.models.attention import CoreAttention, packed_documents


def core(window: int | None = None, **options: Any) -> CoreAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
    )
    return CoreAttention(
        config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self", **options
    )


def brute_force(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, softcap: float | None = None
) -> torch.Tensor:
    """Return causal attention of one document [L, heads, K] in float64."""
    length, heads, size = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhk,thk->hqt", q.double(), k.double()) / size**0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    visible = (distance >= 0) & (distance < (window or length))
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqt,thk->qhk", weights, v.double()).flatten(1)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4, 7])
@pytest.mark.parametrize("lengths", [(9,), (1, 8, 1, 21), (4, 4), (29, 2)])
def test_packed_documents_attend_within_themselves_only(
    window: int | None, lengths: tuple[int, ...], softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CAPPED_QUERIES", 5)
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed = packed_documents(cu_seqlens, max(lengths))
    out = core(window, softcap=softcap)(q, k, v, packed_seq_params=packed)
    pieces = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    expected = torch.cat([brute_force(*piece, window, softcap) for piece in pieces])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)  # fp32 against fp64
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v), retain_graph=True)
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_batches_equal_the_same_documents_packed() -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(6, 3, heads, 8) for heads in (4, 2, 2))  # [S, B, heads, K]
    batched = core(4)(q, k, v)
    cu_seqlens = torch.tensor([0, 6, 12, 18], dtype=torch.int32)
    flat = [x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)]
    packed = core(4)(*flat, packed_seq_params=packed_documents(cu_seqlens, 6))
    torch.testing.assert_close(batched.transpose(0, 1).flatten(0, 1), packed, rtol=1e-5, atol=1e-6)
