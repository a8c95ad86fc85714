"""Triton: position ids and loss weights, programs share the blocks of a document.

Letters: N documents, T packed tokens.
"""

import torch
import triton
import triton.language as tl

BLOCK = 512
MAX_PROGRAMS = 64  # for one document


@triton.jit
def layout_kernel(offsets, prompt_lengths, weights, positions_out, weights_out, N, T, BLOCK: tl.constexpr):
    """Write every num_programs(1)-th block of document program_id(0); document N is the padding behind."""
    document = tl.program_id(0).to(tl.int64)
    padding = document == N
    start = tl.load(offsets + document).to(tl.int64)
    stop = tl.where(padding, T, tl.load(offsets + document + 1, mask=document < N, other=0))
    prompt = tl.load(prompt_lengths + document, mask=document < N, other=0)
    weight = tl.load(weights + document, mask=document < N, other=0.0)
    for first in range(tl.program_id(1) * BLOCK, stop - start, tl.num_programs(1) * BLOCK):
        position = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = position < stop - start
        carries = (position >= prompt - 1) & (position < stop - start - 1)
        tl.store(positions_out + start + position, position, mask=inside)
        tl.store(weights_out + start + position, tl.where(carries, weight, 0.0), mask=inside)


def positions_and_weights(
    offsets: torch.Tensor, prompt_lengths_N: torch.Tensor, weights_N: torch.Tensor, *, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.positions_and_weights."""
    positions_T = torch.empty(tokens, dtype=torch.int64, device=offsets.device)
    weights_T = torch.empty(tokens, dtype=torch.float32, device=offsets.device)
    documents = weights_N.shape[0]
    programs = min(MAX_PROGRAMS, max(1, triton.cdiv(tokens, BLOCK)))
    layout_kernel[(documents + 1, programs)](
        offsets, prompt_lengths_N, weights_N, positions_T, weights_T, documents, tokens, BLOCK=BLOCK
    )
    return positions_T, weights_T
