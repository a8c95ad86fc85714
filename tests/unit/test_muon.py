"""Muon against its papers written out in float64, and against torch's own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megaswift.config.muon import MuonConfig
from megaswift.training import muon
from megaswift.training.muon import COEFFICIENTS, Matrix, MuonAdamW, orthogonal, share_out

LR, DECAY, EPS, BETAS, MOMENTUM = 0.05, 0.1, 1e-8, (0.9, 0.95), 0.95
SHAPES = [(6, 9), (9, 6), (7, 7)]


def written_out(weight: torch.Tensor, grads: list[torch.Tensor], *, nesterov: bool) -> torch.Tensor:
    """Jordan et al. 2024 with weight decay and the factor 0.2 sqrt(max(A, B)) of arXiv 2502.16982, equation 4."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for grad in (grad.double() for grad in grads):
        momentum = MOMENTUM * momentum + grad
        ahead = grad + MOMENTUM * momentum if nesterov else momentum
        x = ahead / ahead.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        weight = weight - LR * (0.2 * max(weight.shape) ** 0.5 * x + DECAY * weight)
    return weight


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chosen(**settings: Any) -> MuonConfig:
    return MuonConfig(
        **{
            "muon_momentum": MOMENTUM,
            "muon_coefficient_type": "simple",
            "muon_extra_scale_factor": 0.2,
            **settings,
        }
    )


def stepped(
    grads: list[torch.Tensor], settings: MuonConfig, **geometry: Any
) -> tuple[MuonAdamW, torch.Tensor, torch.Tensor]:
    """Return the optimizer of a matrix and a vector, the matrix before, and after a step with each gradient."""
    before = drawn(*grads[0].shape, seed=5)
    matrix, vector = torch.nn.Parameter(before.clone()), torch.nn.Parameter(torch.ones(len(before)))
    group = {"params": [matrix, vector], "lr": LR, "weight_decay": DECAY, "eps": EPS, "betas": BETAS, "is_expert_parallel": False}  # fmt: skip
    optimizer = MuonAdamW([group], [Matrix(weight=matrix, **geometry)], settings, deals=False)
    for grad in grads:
        matrix.grad, vector.grad = grad.clone(), grad[:, 0].clone()
        optimizer.step()
    return optimizer, before, matrix.detach()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_the_papers(shape: tuple[int, int], steps: int, nesterov: bool) -> None:
    grads = [drawn(*shape, seed=step) for step in range(steps)]
    _, before, after = stepped(grads, chosen(muon_use_nesterov=nesterov))
    expected = written_out(before, grads, nesterov=nesterov)
    torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("mode", "factor", "adjust"),
    [("spectral", 0.2, "match_rms_adamw"), ("shape_scaling", 1.0, "original")],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torch(
    shape: tuple[int, int], mode: str, factor: float, adjust: str, nesterov: bool
) -> None:
    grads = [drawn(*shape, seed=step) for step in range(10)]
    settings = chosen(muon_scale_mode=mode, muon_extra_scale_factor=factor, muon_use_nesterov=nesterov)
    _, before, after = stepped(grads, settings)
    theirs = torch.nn.Parameter(before.clone())
    optimizer = torch.optim.Muon(
        [theirs], lr=LR, weight_decay=DECAY, momentum=MOMENTUM, nesterov=nesterov, adjust_lr_fn=adjust
    )
    for grad in grads:
        theirs.grad = grad.clone()
        optimizer.step()
    # Torch iterates in bfloat16, whose eight bits are 0.004 of a number; a wrong factor or momentum is some 0.1 away.
    moved, expected = after - before, theirs.detach() - before
    assert float((moved - expected).norm()) < 0.01 * float(expected.norm())


def test_other_parameters_are_stepped_by_adamw() -> None:
    grads = [drawn(6, 9, seed=step) for step in range(4)]
    optimizer, _, _ = stepped(grads, chosen())
    vector = torch.nn.Parameter(torch.ones(6))
    plain = torch.optim.AdamW([vector], lr=LR, weight_decay=DECAY, eps=EPS, betas=BETAS)
    for grad in grads:
        vector.grad = grad[:, 0].clone()
        plain.step()
    assert torch.equal(optimizer.param_groups[0]["params"][1], vector)


@pytest.mark.parametrize(("kind", "most"), [("quintic", 0.12), ("simple", 0.35)])
def test_singular_values_come_close_to_one_and_vectors_stay(kind: str, most: float) -> None:
    u, _, vt = torch.linalg.svd(drawn(24, 40, seed=0).double(), full_matrices=False)
    values = torch.logspace(0, -1.5, 24, dtype=torch.float64)
    stages = COEFFICIENTS[kind] * (5 // len(COEFFICIENTS[kind]))
    found = u.T @ orthogonal((u * values @ vt).float(), stages).double() @ vt.T
    # How near 1 a polynomial comes is a property of its coefficients: simple's leave 0.68 to 1.13 (Jordan et al. 2024).
    assert float((found.diagonal() - 1).abs().max()) < most
    assert float((found - found.diagonal().diag()).abs().max()) < 1e-5


def test_bfloat16_products_change_little_and_the_precision_of_others_not() -> None:
    before = torch.get_float32_matmul_precision()
    x = drawn(24, 40, seed=0)
    exact, rough = (orthogonal(x, COEFFICIENTS["quintic"], precision=name) for name in ("highest", "medium"))
    assert torch.get_float32_matmul_precision() == before
    assert rough.dtype is torch.float32
    assert 1e-4 < float((rough - exact).norm() / exact.norm()) < 0.02  # eight bits, 0.004


@pytest.mark.parametrize(
    ("mode", "expected"), [("spectral", 3.0), ("shape_scaling", 1.5), ("unit_rms_norm", 1.5)]
)
def test_factors_of_high_matrices(mode: str, expected: float) -> None:
    assert muon.size_of_update(9, 4, mode=mode) == expected


@pytest.mark.parametrize(
    ("mode", "expected"), [("spectral", 3.0), ("shape_scaling", 1.0), ("unit_rms_norm", 2 / 3)]
)
def test_factors_of_wide_matrices(mode: str, expected: float) -> None:
    assert muon.size_of_update(4, 9, mode=mode) == pytest.approx(expected)


def test_queries_keys_and_values_are_stepped_as_matrices_of_their_own() -> None:
    """Two groups of [2 2 1 1] rows, as queries, gates, keys and values lie."""
    kinds = torch.tensor([0, 0, 1, 1, 2, 3] * 2)
    grads = [drawn(12, 5, seed=step) for step in range(3)]
    _, before, after = stepped(grads, chosen(), widths=(2, 2, 1, 1))
    for kind in range(4):
        rows = kinds == kind
        expected = written_out(before[rows], [grad[rows] for grad in grads], nesterov=False)
        torch.testing.assert_close(after[rows].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_matrix_without_gradient_only_decays() -> None:
    _, before, after = stepped([torch.zeros(4, 6)] * 2, chosen())
    torch.testing.assert_close(after, before * (1 - LR * DECAY) ** 2)


def test_matrices_are_shared_out_by_size() -> None:
    sizes = [4, 9, 1, 3, 2, 5]
    weights = [torch.zeros(size, 1) for size in sizes]
    owners = share_out(weights, ranks=3)
    loads = [
        sum(size for size, weight in zip(sizes, weights, strict=True) if owners[weight] == rank)
        for rank in range(3)
    ]
    assert loads == [9, 8, 7]


def test_widths_are_read_from_the_attention() -> None:
    config = {"num_attention_heads": 8, "num_query_groups": 2, "kv_channels": 16}
    attention = SimpleNamespace(config=SimpleNamespace(**config, attention_output_gate=False))
    assert muon._widths(attention, 2 * (4 + 2) * 16) == (64, 16, 16)
    assert muon._widths(attention, 2 * (4 + 1) * 16) == (64, 16)  # whose values are its keys
    assert muon._widths(attention, 2 * 4 * 16) == (64,)  # which takes those of another layer
    attention.config.attention_output_gate = True
    assert muon._widths(attention, 2 * (8 + 2) * 16) == (64, 64, 16, 16)
