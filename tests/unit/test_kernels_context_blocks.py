"""The GPU's block of spread attention without a GPU: rows and masks on a stand-in, its call on meta tensors."""

from dataclasses import replace

import pytest
import torch

from megaswift.errors import ConfigError
from megaswift.kernels.context_attention import blocks_cpu, blocks_cuda
from megaswift.kernels.context_attention.blocks_cuda import Batch
from megaswift.kernels.context_attention.index import rank_tokens
from megaswift.kernels.context_attention.partial import HeadSizes, Partial
from megaswift.kernels.context_attention.plan import make_plan
from megaswift.kernels.context_attention.segments import Pattern, Segment, gathered_segments, ring_segments

LENGTHS = [9, 1, 0, 3, 23]  # 36 tokens
SIZES = HeadSizes(groups=2, key=8, value=8)
CPU = torch.device("cpu")
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) as flash-attention defines its masks: the last query is the last key."""
    copies = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhk,nhk->hqn", query, key.repeat_interleave(copies, 1)) * pattern.scale
    distance = torch.arange(len(query))[:, None] + len(key) - len(query) - torch.arange(len(key))
    hidden = (distance < 0) & causal
    if pattern.window is not None:
        hidden |= (distance >= pattern.window) | (distance < 0)
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum(
        "hqn,nhk->qhk", scores.softmax(-1), value.repeat_interleave(copies, 1)
    ), scores.logsumexp(-1)


def stand_in_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    q_lens, k_lens = batch.cu_queries.diff().tolist(), batch.cu_keys.diff().tolist()
    assert (batch.longest_query, batch.longest_key) == (max(q_lens), max(k_lens))
    found = [
        document(*rows, batch.causal, pattern)
        for rows in zip(query.split(q_lens), key.split(k_lens), value.split(k_lens), strict=True)
    ]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found], dim=1)


def steps(
    rank: int, pattern: Pattern, *, ring: bool, row: torch.Tensor
) -> list[tuple[tuple[Segment, ...], torch.Tensor]]:
    plan = make_plan(LENGTHS, ring=4)
    if not ring:
        return [(gathered_segments(plan, pattern, rank), row)]
    return [
        (ring_segments(plan, pattern, rank, source), row[rank_tokens(plan, source, CPU)])
        for source in range(4)
    ]


@pytest.mark.parametrize(
    ("pattern", "ring"),
    [
        (Pattern(scale=0.3), True),
        (Pattern(scale=0.3), False),
        (Pattern(scale=0.3, causal=False), True),
        (Pattern(scale=0.3, window=4), False),
    ],
)
def test_batched_segments_are_the_segments_one_by_one(
    pattern: Pattern, ring: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_cuda, "flash_forward", stand_in_forward)
    torch.manual_seed(0)
    row = torch.randn(36, 2 * 2 * 8)
    for rank in range(4):
        query = torch.randn(9, 4, 8)
        batched, single = Partial.empty(query), Partial.empty(query)
        for segments, at_hand in steps(rank, pattern, ring=ring, row=row):
            blocks_cuda.attend(batched, SIZES.inputs(query, at_hand), segments, pattern)
            blocks_cpu.attend(single, SIZES.inputs(query, at_hand), segments, pattern)
        torch.testing.assert_close(batched.out_THK, single.out_THK)
        torch.testing.assert_close(batched.lse_TH, single.lse_TH)


def test_a_window_over_a_ring_is_refused_on_the_gpu() -> None:
    pattern = Pattern(scale=0.3, window=4)
    segments = ring_segments(make_plan(LENGTHS, ring=4), pattern, 3, 2)
    with pytest.raises(ConfigError, match="Choose all_gather or a2a"):
        blocks_cuda._batches(segments, pattern, CPU)


@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_takes_the_arguments_it_is_given(window: int | None) -> None:
    pattern = Pattern(scale=0.3, window=window)
    plan = make_plan(LENGTHS, ring=4)
    (batch,) = blocks_cuda._batches(
        gathered_segments(plan, replace(pattern, window=4), 1), replace(pattern, window=4), CPU
    )
    queries, keys = int(batch.cu_queries[-1]), int(batch.cu_keys[-1])
    query, key, value = (
        torch.empty(rows, heads, 8, dtype=torch.bfloat16, device="meta")
        for rows, heads in ((queries, 4), (keys, 2), (keys, 2))
    )
    out, lse = blocks_cuda.flash_forward(query, key, value, batch, pattern)
    assert out.shape == query.shape and lse.shape == (4, queries)
    grads = blocks_cuda.flash_backward(out, query, key, value, out, lse, batch, pattern)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]
