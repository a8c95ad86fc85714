"""Every Triton kernel against its reference: on the GPU if there is one, else in Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch

from megaswift.kernels.dispatch import Implementation, choose
from tests.harness.kernel_cases import CASES, Case, Sizes, Tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = {
    "odd": Sizes(lengths=[5, 0, 33, 1, 0], heads=3, dim=10, vocabulary=67),
    "round": Sizes(lengths=[64, 64], heads=4, dim=64, vocabulary=256),
    "empty documents": Sizes(lengths=[0, 0], heads=2, dim=8, vocabulary=16),
    "no document": Sizes(lengths=[], heads=2, dim=8, vocabulary=16),
}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """Whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def run(
    case: Case, implementation: Implementation, inputs: Tensors
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    inputs = tuple(
        x.detach().clone().requires_grad_(place < case.differentiable) for place, x in enumerate(inputs)
    )
    outputs = case.run(implementation, *inputs)
    if not case.differentiable:
        return list(outputs), []
    seeds = [torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out) for out in outputs]
    return list(outputs), list(torch.autograd.grad(outputs, inputs[: case.differentiable], seeds))


def assert_near(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    if tolerance == 0.0:
        assert torch.equal(got, wanted)
        return
    finite = wanted.isfinite()
    assert torch.equal(got.isfinite(), finite) and torch.equal(got.isnan(), wanted.isnan())
    got, wanted = got[finite].double(), wanted[finite].double()
    if wanted.numel():
        assert (got - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton_agrees_with_the_reference(case: Case, dtype: torch.dtype, size: str) -> None:
    assert choose(case.name, torch.device(DEVICE), Implementation.TRITON) is Implementation.TRITON
    inputs = case.make(SIZES[size], dtype, DEVICE)
    got, wanted = run(case, Implementation.TRITON, inputs), run(case, Implementation.REFERENCE, inputs)
    for mine, theirs in zip(got[0] + got[1], wanted[0] + wanted[1], strict=True):
        assert_near(mine, theirs, case.tolerance[dtype])
