"""Attention of segments by torch's own flash kernel on GPUs: all documents of a step in one call.

Letters: T local queries, N keys at hand, C chosen rows, H query heads, G key/value heads, K head size.
"""

import functools
from dataclasses import dataclass

import torch

from megaswift.errors import ConfigError
from megaswift.kernels.context_attention.partial import Gradients, Inputs, Partial
from megaswift.kernels.context_attention.segments import Pattern, Segment
from megaswift.kernels.merge_attention.ops import merge_attention


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Segments of one call, their rows laid one behind another."""

    query_rows_C: torch.Tensor
    key_rows_C: torch.Tensor
    cu_queries: torch.Tensor  # int32
    cu_keys: torch.Tensor  # int32
    longest_query: int
    longest_key: int
    causal: bool  # aligned at the bottom right, as the kernel does


def attend(partial: Partial, inputs: Inputs, segments: tuple[Segment, ...], pattern: Pattern) -> None:
    """Merge the attention of `segments` into `partial`."""
    for batch in _batches(segments, pattern, inputs.query_THK.device):
        out_CHK, lse_HC = flash_forward(*_rows(inputs, batch), batch, pattern)
        rows = batch.query_rows_C
        merged = merge_attention(
            partial.out_THK[rows], partial.lse_TH[rows], out_CHK, lse_HC.t().contiguous()
        )
        partial.out_THK[rows], partial.lse_TH[rows] = merged


def attend_backward(
    grads: Gradients,
    inputs: Inputs,
    grad_out_THK: torch.Tensor,
    out_THK: torch.Tensor,
    lse_TH: torch.Tensor,
    segments: tuple[Segment, ...],
    pattern: Pattern,
) -> None:
    """Add the gradients of `segments`; out and lse are those over all keys."""
    for batch in _batches(segments, pattern, inputs.query_THK.device):
        rows = batch.query_rows_C
        lse_HC = lse_TH[rows].t().contiguous()
        of_rows = flash_backward(
            grad_out_THK[rows], *_rows(inputs, batch), out_THK[rows], lse_HC, batch, pattern
        )
        grads.query_THK.index_add_(0, rows, of_rows[0].float())
        grads.key_NGK.index_add_(0, batch.key_rows_C, of_rows[1].float())
        grads.value_NGK.index_add_(0, batch.key_rows_C, of_rows[2].float())


def flash_forward(
    query_CHK: torch.Tensor, key_CGK: torch.Tensor, value_CGK: torch.Tensor, batch: Batch, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out [C, H, K], lse [H, C]) of documents that lie one behind another."""
    left, right = _window(pattern)
    out_CHK, lse_HC, *_ = torch.ops.aten._flash_attention_forward(
        query_CHK, key_CGK, value_CGK, batch.cu_queries, batch.cu_keys,
        batch.longest_query, batch.longest_key, 0.0, batch.causal, False, scale=pattern.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out_CHK, lse_HC


def flash_backward(
    grad_out_CHK: torch.Tensor,
    query_CHK: torch.Tensor,
    key_CGK: torch.Tensor,
    value_CGK: torch.Tensor,
    out_CHK: torch.Tensor,
    lse_HC: torch.Tensor,
    batch: Batch,
    pattern: Pattern,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values."""
    left, right = _window(pattern)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query_CHK.device)  # the random state, not read
    return torch.ops.aten._flash_attention_backward(
        grad_out_CHK, query_CHK, key_CGK, value_CGK, out_CHK, lse_HC, batch.cu_queries, batch.cu_keys,
        batch.longest_query, batch.longest_key, 0.0, batch.causal, no_dropout, no_dropout[:0],
        scale=pattern.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip


def _rows(inputs: Inputs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        inputs.query_THK[batch.query_rows_C],
        inputs.key_NGK[batch.key_rows_C],
        inputs.value_NGK[batch.key_rows_C],
    )


def _window(pattern: Pattern) -> tuple[int | None, int | None]:
    return (None, None) if pattern.window is None else (pattern.window - 1, 0)


@functools.lru_cache(maxsize=256)  # every layer asks for the same ones
def _batches(segments: tuple[Segment, ...], pattern: Pattern, device: torch.device) -> tuple[Batch, ...]:
    """Return one batch of segments without a mask and one with the kernel's own mask, where there are any."""
    windowed = pattern.window is not None
    plain = [segment for segment in segments if not windowed and (segment.full or not pattern.causal)]
    masked = [segment for segment in segments if segment not in plain]
    if not all(segment.bottom_right for segment in masked):
        raise ConfigError(
            f"cp_comm_type=p2p cannot carry a sliding window of {pattern.window} on a GPU. Its attention kernel "
            "aligns the last query with the last key of a block, which a ring's blocks are not. "
            "Choose all_gather or a2a."
        )
    return tuple(
        _batch(group, causal=causal, device=device)
        for group, causal in ((plain, False), (masked, True))
        if group
    )


def _batch(segments: list[Segment], *, causal: bool, device: torch.device) -> Batch:
    def rows(starts: list[int], lengths: list[int]) -> torch.Tensor:
        every = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        return torch.cat(every).to(device, non_blocking=True)

    def offsets(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32, non_blocking=True)

    q_lens, k_lens = [segment.q_len for segment in segments], [segment.k_len for segment in segments]
    return Batch(
        query_rows_C=rows([segment.q_start for segment in segments], q_lens),
        key_rows_C=rows([segment.k_start for segment in segments], k_lens),
        cu_queries=offsets(q_lens),
        cu_keys=offsets(k_lens),
        longest_query=max(q_lens),
        longest_key=max(k_lens),
        causal=causal,
    )
