"""One rank's part of a micro batch whose sequences are spread over several: every tensor is cut by the same index.

Letters: B rows of a micro batch, S tokens of a row, T tokens of one cp rank = B * S / cp.
"""

from dataclasses import replace

import torch

from megaswift.data.batches import MicroBatch
from megaswift.kernels.context_attention.index import rank_tokens
from megaswift.kernels.context_attention.plan import make_plan

# What a micro batch holds of every token [B, S, ...]
PER_TOKEN = (
    "input_ids",
    "labels",
    "loss_mask",
    "position_ids",
    "old_logps",
    "reference_logps",
    "sampler_logps",
    "experts",
    "channels",
    "noise_keys",
    "noise_scales",
    "teacher_ids",
    "teacher_logps",
)


def spread(batch: MicroBatch, *, rank: int, ring: int, inner: int) -> MicroBatch:
    """Return what cp rank `rank` of ring * inner holds of a micro batch: tensors [1, T] and the plan of all documents.

    Every document is cut so that attention work is even, whatever its length (kernels/context_attention/plan.py). Padded
    rows become documents of S tokens: attention is causal, so that their padding stays out of sight.
    """
    rows, seq_len = batch.input_ids.shape
    documents = [seq_len] * rows if batch.cu_seqlens is None else batch.cu_seqlens.diff().tolist()
    plan = make_plan(documents, ring=ring, inner=inner)
    tokens_T = rank_tokens(plan, rank, torch.device("cpu"))
    return replace(
        batch,
        **{
            name: values.flatten(0, 1)[tokens_T][None]
            for name in PER_TOKEN
            if (values := getattr(batch, name)) is not None
        },
        cu_seqlens=torch.tensor([0, *plan.lengths]).cumsum(0).to(torch.int32),
        plan=plan,
        mismatched=None
        if batch.mismatched is None
        else spread(batch.mismatched, rank=rank, ring=ring, inner=inner),
    )
