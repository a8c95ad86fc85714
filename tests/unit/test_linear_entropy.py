"""The entropy of an output layer against the sum that defines it."""

import math

import pytest
import torch

from megaswift.kernels.linear_divergence.ops import OutputLayer
from megaswift.kernels.linear_entropy.ops import linear_entropy


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_tokens", [3, 512])
def test_entropy_is_that_of_the_softmax(softcap: float | None, chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 5, generator=generator, dtype=torch.float64) for size in (7, 13))
    layer = OutputLayer(hidden=hidden, weight=weight, softcap=softcap)
    found = linear_entropy(layer, vocab_size=11, chunk_tokens=chunk_tokens)
    for entropy, logits in zip(found.tolist(), (hidden @ weight[:11].T).tolist(), strict=True):
        logits = logits if softcap is None else [softcap * math.tanh(one / softcap) for one in logits]
        total = sum(map(math.exp, logits))
        chances = [math.exp(one) / total for one in logits]
        assert entropy == pytest.approx(-sum(one * math.log(one) for one in chances), abs=1e-12)


def test_no_tokens_have_no_entropy_and_equal_chances_the_most() -> None:
    layer = OutputLayer(hidden=torch.zeros(2, 5), weight=torch.ones(8, 5))
    assert linear_entropy(layer, vocab_size=8).tolist() == pytest.approx([math.log(8)] * 2)
    assert (
        len(linear_entropy(OutputLayer(hidden=torch.zeros(0, 5), weight=torch.ones(8, 5)), vocab_size=8)) == 0
    )
