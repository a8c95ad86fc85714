"""The CPU core attention against brute force."""

import inspect
import itertools
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import varlen

from megaswift.models import attention, flash
from megaswift.models.attention import CoreAttention, packed_documents

CPU = torch.device("cpu")


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
    packed = packed_documents(cu_seqlens, max(lengths), device=CPU)
    out = core(window, softcap=softcap)(q, k, v, packed_seq_params=packed)
    pieces = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    expected = torch.cat([brute_force(*piece, window, softcap) for piece in pieces])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)  # fp32 against fp64
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v), retain_graph=True)
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def varlen_attn(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What torch's kernel is documented to do (torch 2.13, torch/nn/attention/varlen.py), which no CPU runs."""
    bound = inspect.signature(varlen.varlen_attn).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    q, k, v, cu_seqlens = given["query"], given["key"], given["value"], given["cu_seq_q"]
    assert given["enable_gqa"] == (q.shape[1] != k.shape[1])
    assert given["max_q"] == given["max_k"] == int(cu_seqlens.diff().max())
    assert torch.equal(cu_seqlens, given["cu_seq_k"])
    left, right = given["window_size"]
    assert right == 0, "causal"
    pieces = zip(*(x.split(cu_seqlens.diff().tolist()) for x in (q, k, v)), strict=True)
    window = None if left == -1 else left + 1  # left of a query, and the query itself
    return torch.cat([brute_force(*piece, window) for piece in pieces]).view_as(q)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_a_flash_kernel_is_asked_for_the_same(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(30, heads, 8) for heads in (4, 2, 2))
    packed = packed_documents(torch.tensor([0, 1, 9, 30], dtype=torch.int32), 21, device=CPU)
    ours = core(window)(q, k, v, packed_seq_params=packed)
    monkeypatch.setattr(attention, "has_flash", lambda query, value: True)
    asked = Mock(side_effect=varlen_attn)
    monkeypatch.setattr(flash, "_kernel", lambda: asked)
    torch.testing.assert_close(core(window)(q, k, v, packed_seq_params=packed).float(), ours)
    asked.assert_called_once()
    core(window, softcap=0.7)(q, k, v, packed_seq_params=packed)  # which the kernel does not know
    asked.assert_called_once()


def test_this_torch_has_a_flash_kernel_that_no_cpu_runs() -> None:
    q = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    assert flash._kernel() is varlen.varlen_attn
    assert not flash.has_flash(q, q)


def test_batches_equal_the_same_documents_packed() -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(6, 3, heads, 8) for heads in (4, 2, 2))  # [S, B, heads, K]
    batched = core(4)(q, k, v)
    cu_seqlens = torch.tensor([0, 6, 12, 18], dtype=torch.int32)
    flat = [x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)]
    packed = core(4)(*flat, packed_seq_params=packed_documents(cu_seqlens, 6, device=CPU))
    torch.testing.assert_close(batched.transpose(0, 1).flatten(0, 1), packed, rtol=1e-5, atol=1e-6)
