"""RMSNorm against autograd through the plain formula."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megaswift.models.norm import RMSNorm


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("shape", [(5, 2, 12), (7, 12), (0, 12)])
def test_output_and_gradients_equal_the_formula(shape: tuple[int, ...], zero_centered: bool) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=12, num_attention_heads=2)
    norm = RMSNorm(config, 12, eps=1e-5, zero_centered=zero_centered)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(shape, requires_grad=True)
    plain = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (norm.weight + zero_centered)
    out = norm(x)
    torch.testing.assert_close(out, plain)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (x, norm.weight), grad)
    theirs = torch.autograd.grad(plain, (x, norm.weight), grad)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
