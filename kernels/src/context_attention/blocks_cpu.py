"""Attention of segments by torch's CPU flash kernel, which returns the log-sum-exp and takes it back.

Letters: T local queries, N keys at hand, H query heads, G key/value heads, K head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megaswift.kernels.context_attention.partial import Gradients, Inputs, Partial
from megaswift.kernels.context_attention.segments import Pattern, Segment
from megaswift.kernels.merge_attention.ops import merge_attention

_WINDOW_ROWS = 256  # least queries of one masked call; its mask has at most (rows + window) columns


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of the kernel: rows of queries and keys, and what hides keys."""

    queries: slice
    keys: slice
    square: bool = False  # causal, with as many queries as keys
    first_distance: int | None = None  # of query 0 and key 0, where a window hides keys


def attend(partial: Partial, inputs: Inputs, segments: tuple[Segment, ...], pattern: Pattern) -> None:
    """Merge the attention of `segments` into `partial`."""
    for segment in segments:
        for call in _calls(segment, pattern):
            query, key, value = _rows(inputs, call)
            out_1HTK, lse_1HT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query,
                key,
                value,
                0.0,
                call.square,
                attn_mask=_mask(call, pattern, query),
                scale=pattern.scale,
            )
            rows = call.queries
            partial.out_THK[rows], partial.lse_TH[rows] = merge_attention(
                partial.out_THK[rows],
                partial.lse_TH[rows],
                out_1HTK[0].transpose(0, 1),
                lse_1HT[0].transpose(0, 1),
            )


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
    for segment in segments:
        for call in _calls(segment, pattern):
            query, key, value = _rows(inputs, call)
            of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(grad_out_THK[call.queries]), query, key, value,
                _heads_first(out_THK[call.queries]), lse_TH[call.queries].transpose(0, 1)[None],
                0.0, call.square, attn_mask=_mask(call, pattern, query), scale=pattern.scale,
            )  # fmt: skip
            grads.query_THK[call.queries] += of_query[0].transpose(0, 1)
            grads.key_NGK[call.keys] += of_key[0].transpose(0, 1)
            grads.value_NGK[call.keys] += of_value[0].transpose(0, 1)


def _rows(inputs: Inputs, call: _Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        _heads_first(inputs.query_THK[call.queries]),
        _heads_first(inputs.key_NGK[call.keys]),
        _heads_first(inputs.value_NGK[call.keys]),
    )


def _heads_first(x_THK: torch.Tensor) -> torch.Tensor:
    return x_THK.transpose(0, 1)[None]


def _calls(segment: Segment, pattern: Pattern) -> Iterator[_Call]:
    """Cut a segment into calls without empty rows or columns: the kernel (torch 2.13) dies of them."""
    skipped = max(0, -segment.offset) if pattern.causal else 0  # queries before every key
    first, q_len, offset = segment.q_start + skipped, segment.q_len - skipped, segment.offset + skipped
    keys = slice(segment.k_start, segment.k_start + segment.k_len)
    if q_len <= 0:
        return
    if pattern.window is not None and offset + q_len > pattern.window:
        yield from _window_calls(first, q_len, segment.k_start, segment.k_len, offset, pattern.window)
    elif not pattern.causal or offset >= segment.k_len - 1:
        yield _Call(queries=slice(first, first + q_len), keys=keys)
    else:
        if offset:
            yield _Call(queries=slice(first, first + q_len), keys=slice(keys.start, keys.start + offset))
        diagonal = min(q_len, segment.k_len - offset)
        start = keys.start + offset
        yield _Call(queries=slice(first, first + diagonal), keys=slice(start, start + diagonal), square=True)
        if diagonal < q_len:
            yield _Call(queries=slice(first + diagonal, first + q_len), keys=slice(start, keys.stop))


def _window_calls(
    first: int, q_len: int, k_start: int, k_len: int, offset: int, window: int
) -> Iterator[_Call]:
    q_len = min(q_len, k_len - 1 + window - offset)  # queries behind these see no key
    rows = max(window, _WINDOW_ROWS)
    for start in range(0, q_len, rows):
        stop = min(start + rows, q_len)
        k_from, k_to = max(0, start + offset - window + 1), min(k_len, stop + offset)
        yield _Call(
            queries=slice(first + start, first + stop),
            keys=slice(k_start + k_from, k_start + k_to),
            first_distance=start + offset - k_from,
        )


def _mask(call: _Call, pattern: Pattern, query: torch.Tensor) -> torch.Tensor | None:
    if call.first_distance is None or pattern.window is None:
        return None
    queries = torch.arange(call.queries.stop - call.queries.start) + call.first_distance
    distance = queries[:, None] - torch.arange(call.keys.stop - call.keys.start)
    hidden = (distance < 0) | (distance >= pattern.window)
    return torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
