"""Half-precision products that add up in float32."""

import copy

import pytest
import torch

from megaswift.models.product import _Float32Product, has_half_products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_and_gradients_are_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(shape, generator=generator) for shape in ((7, 900), (5, 900), (7, 5)))
    x, w, grad = (tensor.to(dtype) for tensor in (x, w, grad))
    x.requires_grad_(), w.requires_grad_()
    output = _Float32Product.apply(x, w)
    output.backward(grad)
    exact = [tensor.detach().double() for tensor in (x, w, grad)]
    expected = exact[0] @ exact[1].t(), exact[2] @ exact[1], exact[2].t() @ exact[0]
    half_a_step = torch.finfo(dtype).eps / 2
    for found, wanted in zip((output, x.grad, w.grad), expected, strict=True):
        assert found.dtype == dtype
        # Half a step of the dtype, and the rounding of 900 float32 additions of numbers of size 1.
        torch.testing.assert_close(found.double(), wanted, rtol=half_a_step * 1.001, atol=1e-4)


def test_a_frozen_weight_has_no_gradient_and_keeps_no_input() -> None:
    x, w = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(2, 4).bfloat16()
    output = copy.deepcopy(_Float32Product.apply)(x, w)
    assert output.grad_fn.saved_tensors[0] is None
    output.sum().backward()
    assert x.grad is not None and w.grad is None


def test_float32_is_never_converted() -> None:
    assert has_half_products(torch.float32)
