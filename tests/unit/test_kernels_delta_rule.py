"""The gated delta rule in chunks against the rule token by token: outputs and gradients, packed or not."""

import pytest
import torch

from megaswift.kernels.gated_delta_rule import reference
from megaswift.kernels.gated_delta_rule.ops import document_ids, gated_delta_rule

TOLERANCE = 1e-5  # float32; the sums run in another order

# batch, length, bounds of packed documents
CASES = {
    "one token": (2, 1, None),
    "less than a chunk": (2, 30, None),
    "several chunks": (2, 150, None),
    "documents across and at chunk borders": (1, 200, [0, 5, 64, 65, 130, 200]),
    "an empty document": (1, 64, [0, 20, 20, 64]),
}


@pytest.mark.parametrize("case", CASES)
def test_chunks_equal_the_rule_token_by_token(case: str) -> None:
    batch, length, bounds = CASES[case]
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    documents = document_ids(cu_seqlens, batch, length, torch.device("cpu"))
    shapes = [(8,), (8,), (6,), (), ()]
    drawn = [torch.randn(batch, length, 3, *shape, generator=generator) for shape in shapes]
    query, key = (torch.nn.functional.normalize(one, dim=-1) for one in drawn[:2])
    decay, beta = -5 * drawn[3].abs(), drawn[4].sigmoid()  # some heads forget everything within a chunk
    inputs = [one.requires_grad_() for one in (query, key, drawn[2], decay, beta)]
    wanted = torch.randn(batch, length, 3, 6, generator=generator)
    expected = reference.gated_delta_rule(*inputs, documents)
    found = gated_delta_rule(*inputs, cu_seqlens=cu_seqlens)
    theirs = (expected, *torch.autograd.grad((expected * wanted).sum(), inputs))
    ours = (found, *torch.autograd.grad((found * wanted).sum(), inputs))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
