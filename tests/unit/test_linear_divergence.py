"""The divergence of two output layers: against the paper's formula and autograd."""

import math

import pytest
import torch

from megaswift.kernels.linear_divergence import reference
from megaswift.kernels.linear_divergence.ops import Likeliest, OutputLayer, linear_divergence

TOLERANCE = 1e-6  # float64 on both sides; the bound
BETAS = (0.0, 0.1, 0.5, 1.0)


def layers(
    *, tokens: int = 7, vocab: int = 13, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """Return hidden states and weights of a student of size 5 and a teacher of size 6."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, 5), (vocab, 5), (tokens, 6), (vocab, 6))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def paper(student: list[float], teacher: list[float], beta: float) -> float:
    """Agarwal et al. 2023, eq. 1, and its limits."""
    q, p = (
        [math.exp(z) / sum(math.exp(other) for other in logits) for z in logits]
        for logits in (student, teacher)
    )
    if beta in (0.0, 1.0):
        return kl(p, q) if beta == 0 else kl(q, p)
    m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


@pytest.mark.parametrize("beta", BETAS)
def test_the_reference_is_the_paper(beta: float) -> None:
    hidden, weight, teacher_hidden, teacher_weight = layers()
    student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    found = reference.generalised_jsd(student, teacher, beta=beta)
    expected = [paper(q, p, beta) for q, p in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients_are_those_of_full_logits(beta: float, softcap: float | None) -> None:
    hidden, weight, teacher_hidden, teacher_weight = layers()
    hidden.requires_grad_()
    weight.requires_grad_()
    weights = torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    found = linear_divergence(
        OutputLayer(hidden=hidden, weight=weight, softcap=softcap),
        OutputLayer(hidden=teacher_hidden, weight=teacher_weight, softcap=3.0),
        weights, beta=beta, vocab_size=11, chunk_tokens=3,
    )  # fmt: skip
    student, teacher = (hidden @ weight.T)[:, :11], (teacher_hidden @ teacher_weight.T)[:, :11]
    student = student if softcap is None else softcap * torch.tanh(student / softcap)
    losses = reference.generalised_jsd(student, 3.0 * torch.tanh(teacher / 3.0), beta=beta)
    expected = (weights * losses).sum()
    assert float(found) == pytest.approx(float(expected), abs=TOLERANCE)
    for mine, theirs in zip(
        torch.autograd.grad(2 * found, [hidden, weight]),
        torch.autograd.grad(2 * expected, [hidden, weight]),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("top_k", [1, 3, 99])
@pytest.mark.parametrize("beta", BETAS)
def test_the_largest_logits_of_the_teacher_are_compared_by_themselves(beta: float, top_k: int) -> None:
    """Against the paper's divergence of softmaxes over the chosen tokens, with autograd's gradient; one chunk and several."""
    hidden, weight, teacher_hidden, teacher_weight = layers()
    hidden.requires_grad_()
    weight.requires_grad_()
    student, teacher = (hidden @ weight.T)[:, :11], (teacher_hidden @ teacher_weight.T)[:, :11]
    chosen = teacher.topk(min(top_k, 11), dim=1).indices
    losses = reference.generalised_jsd(student.gather(1, chosen), teacher.gather(1, chosen), beta=beta)
    expected = losses.sum()
    for q, p, loss in zip(
        student.gather(1, chosen).tolist(), teacher.gather(1, chosen).tolist(), losses.tolist(), strict=True
    ):
        assert loss == pytest.approx(paper(q, p, beta), abs=TOLERANCE)
    for chunk_tokens in (3, 256):
        found = linear_divergence(
            OutputLayer(hidden=hidden, weight=weight), OutputLayer(hidden=teacher_hidden, weight=teacher_weight),
            torch.ones(7, dtype=torch.float64), beta=beta, vocab_size=11, top_k=top_k, chunk_tokens=chunk_tokens,
        )  # fmt: skip
        assert float(found) == pytest.approx(float(expected), abs=TOLERANCE)
        for mine, theirs in zip(
            torch.autograd.grad(found, [hidden, weight]),
            torch.autograd.grad(expected, [hidden, weight], retain_graph=True),
            strict=True,
        ):
            assert torch.allclose(mine, theirs, rtol=0, atol=TOLERANCE)
            assert top_k == 1 or bool(mine.any()), "a gradient of zero would say little"


def test_no_tokens_and_equal_models_cost_nothing() -> None:
    hidden, weight, _, _ = layers(dtype=torch.float32)
    hidden.requires_grad_()
    layer = OutputLayer(hidden=hidden, weight=weight)
    same = linear_divergence(layer, layer, torch.ones(7), beta=0.5, vocab_size=13)
    assert float(same) == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(same, hidden)
    assert float(gradient.abs().max()) < 1e-6
    empty = OutputLayer(hidden=hidden[:0], weight=weight)
    assert float(linear_divergence(empty, empty, torch.ones(0), beta=0.5, vocab_size=13)) == 0


def test_a_student_without_gradients_of_its_weight_gets_those_of_its_states() -> None:
    hidden, weight, teacher_hidden, teacher_weight = layers()
    hidden.requires_grad_()
    teacher = OutputLayer(hidden=teacher_hidden, weight=teacher_weight)
    found = linear_divergence(
        OutputLayer(hidden=hidden, weight=weight), teacher, torch.ones(7), beta=0.5, vocab_size=13
    )
    (gradient,) = torch.autograd.grad(found, hidden)
    losses = reference.generalised_jsd(hidden @ weight.T, teacher_hidden @ teacher_weight.T, beta=0.5)
    (expected,) = torch.autograd.grad(losses.sum(), hidden)
    assert torch.allclose(gradient, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("top_k", [1, 4, 11])
@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_who_tells_its_likeliest_tokens_teaches_the_same(beta: float, top_k: int) -> None:
    """In any order, and as log-probabilities among all tokens: the loss and both gradients of the one with those logits."""
    hidden, weight, teacher_hidden, teacher_weight = layers()
    hidden.requires_grad_()
    weight.requires_grad_()
    weights = torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    student = OutputLayer(hidden=hidden, weight=weight, softcap=2.0)
    teacher = OutputLayer(hidden=teacher_hidden, weight=teacher_weight)
    logps, ids = (teacher_hidden @ teacher_weight.T)[:, :11].log_softmax(1).topk(top_k, dim=1)
    told = Likeliest(ids=ids.flip(1).int(), logps=logps.flip(1))
    found, expected = (
        linear_divergence(student, one, weights, beta=beta, vocab_size=11, top_k=k, chunk_tokens=3)
        for one, k in ((told, None), (teacher, top_k))
    )
    assert float(found) == pytest.approx(float(expected), abs=TOLERANCE)
    for mine, theirs in zip(
        torch.autograd.grad(found, [hidden, weight]),
        torch.autograd.grad(expected, [hidden, weight]),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=0, atol=TOLERANCE)
        assert top_k == 1 or bool(mine.any()), "a gradient of zero would say little"
