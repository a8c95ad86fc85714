"""The output layer fused with cross-entropy, against the full logits."""

import pytest
import torch

from megaswift.kernels.dispatch import Implementation
from megaswift.kernels.linear_cross_entropy import ops, reference

TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}  # a few roundings of the type, relative to the largest


def make(
    tokens: int, *, rows: int = 131, dim: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    hidden_TD = torch.randn(tokens, dim, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(rows, dim, generator=generator).to(dtype).requires_grad_()
    return hidden_TD, weight_VD, torch.randint(0, rows, (tokens,), generator=generator)


def assert_near(got: torch.Tensor | None, wanted: torch.Tensor | None, tolerance: float) -> None:
    assert got is not None and wanted is not None
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    if wanted.numel():
        assert (got.double() - wanted.double()).abs().max() <= tolerance * max(
            1e-6, float(wanted.double().abs().max())
        )


def compare(
    got_T: torch.Tensor,
    wanted_T: torch.Tensor,
    inputs: tuple[torch.Tensor, ...],
    grad_T: torch.Tensor,
    tolerance: float,
) -> None:
    assert_near(got_T, wanted_T, tolerance)
    leaves = [x for x in inputs if x.requires_grad]
    got, wanted = torch.autograd.grad(got_T, leaves, grad_T), torch.autograd.grad(wanted_T, leaves, grad_T)
    for mine, theirs in zip(got, wanted, strict=True):
        assert_near(mine, theirs, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 7, 100])
def test_chunks_give_the_loss_and_gradients_of_full_logits(tokens: int, dtype: torch.dtype) -> None:
    hidden_TD, weight_VD, labels_T = make(tokens, dtype=dtype)
    got_T = ops.linear_cross_entropy(hidden_TD, weight_VD, labels_T, chunk_tokens=16)
    wanted_T = reference.linear_cross_entropy(hidden_TD, weight_VD, labels_T)
    compare(got_T, wanted_T, (hidden_TD, weight_VD), torch.full((tokens,), 0.25), TOLERANCE[dtype])


@pytest.mark.parametrize("announced", [True, False])
def test_uneven_weights_are_exact_whether_announced_or_not(announced: bool) -> None:
    hidden_TD, weight_VD, labels_T = make(50)
    weights_T = torch.rand(50, generator=torch.Generator().manual_seed(1)) * (torch.arange(50) % 3 > 0)
    hint = weights_T if announced else None
    got_T = ops.linear_cross_entropy(hidden_TD, weight_VD, labels_T, loss_weights_T=hint, chunk_tokens=16)
    wanted_T = reference.linear_cross_entropy(hidden_TD, weight_VD, labels_T)
    compare(got_T, wanted_T, (hidden_TD, weight_VD), weights_T * 0.37, 2e-6)


def test_announced_weights_save_the_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_TD, weight_VD, labels_T = make(50)
    weights_T = torch.rand(50)
    passes = []
    one_pass = ops._pass
    monkeypatch.setattr(ops, "_pass", lambda *args: passes.append(1) or one_pass(*args))
    losses_T = ops.linear_cross_entropy(hidden_TD, weight_VD, labels_T, loss_weights_T=weights_T)
    (losses_T * weights_T / 17).sum().backward()
    assert len(passes) == 1
    ops.linear_cross_entropy(hidden_TD, weight_VD, labels_T).mul(weights_T).sum().backward()
    assert len(passes) == 3


def test_a_weight_that_lies_about_zero_does_not_lose_gradients() -> None:
    hidden_TD, weight_VD, labels_T = make(5)
    got_T = ops.linear_cross_entropy(hidden_TD, weight_VD, labels_T, loss_weights_T=torch.zeros(5))
    compare(
        got_T,
        reference.linear_cross_entropy(hidden_TD, weight_VD, labels_T),
        (hidden_TD, weight_VD),
        torch.ones(5),
        2e-6,
    )


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_the_gradients_that_are_needed_are_made(trained: str) -> None:
    hidden_TD, weight_VD, labels_T = make(40)
    hidden_TD.requires_grad_(trained == "hidden")
    weight_VD.requires_grad_(trained == "weight")
    got_T = ops.linear_cross_entropy(hidden_TD, weight_VD, labels_T, chunk_tokens=16)
    grad_T = torch.rand(40)  # rows of the hidden gradient are scaled afterwards, so any gradient will do
    compare(
        got_T,
        reference.linear_cross_entropy(hidden_TD, weight_VD, labels_T),
        (hidden_TD, weight_VD),
        grad_T,
        2e-6,
    )


def test_ignored_tokens_cost_nothing_and_padding_rows_get_nothing() -> None:
    hidden_TD, weight_VD, labels_T = make(30, rows=40)
    labels_T = (labels_T % 35).masked_fill(torch.arange(30) % 4 == 0, -100)
    got_T = ops.linear_cross_entropy(
        hidden_TD, weight_VD, labels_T, ignore_index=-100, vocab_size=35, chunk_tokens=8
    )
    wanted_T = reference.linear_cross_entropy(
        hidden_TD, weight_VD, labels_T, ignore_index=-100, vocab_size=35
    )
    assert torch.equal(got_T[::4], torch.zeros(8))
    compare(got_T, wanted_T, (hidden_TD, weight_VD), torch.ones(30), 2e-6)


@pytest.mark.parametrize("tokens", [0, 7, 50])
def test_soft_capped_logits_give_the_loss_and_gradients_of_full_ones(tokens: int) -> None:
    hidden_TD, weight_VD, labels_T = make(tokens)
    got_T = ops.linear_cross_entropy(hidden_TD, weight_VD, labels_T, softcap=3.0, chunk_tokens=16)
    wanted_T = reference.linear_cross_entropy(hidden_TD, weight_VD, labels_T, softcap=3.0)
    compare(got_T, wanted_T, (hidden_TD, weight_VD), torch.full((tokens,), 0.25), 2e-6)


@pytest.mark.parametrize("implementation", Implementation)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_right_labels_are_the_likeliest_of_full_logits(
    softcap: float | None, dtype: torch.dtype, implementation: Implementation
) -> None:
    hidden_TD, weight_VD, labels_T = make(90, rows=4500, dtype=dtype)  # several blocks of the kernel
    with torch.no_grad():
        logits_TV = (hidden_TD.float() @ weight_VD.float().t()).to(dtype)[:, :4444]
        if softcap is not None:  # capped logits of few bits may tie where others do not
            logits_TV = torch.tanh(logits_TV / softcap) * softcap
    likeliest_T, places_T = logits_TV.argmax(1), torch.arange(90)
    labels_T = torch.where(places_T % 3 == 0, likeliest_T, labels_T % 4444)
    labels_T = labels_T.masked_fill(places_T % 9 == 0, -100)
    right_T = torch.empty(90, dtype=torch.bool)
    shared = {
        "ignore_index": -100, "vocab_size": 4444, "softcap": softcap, "chunk_tokens": 16, "implementation": implementation,
    }  # fmt: skip
    losses_T = ops.linear_cross_entropy(hidden_TD, weight_VD, labels_T, right_T=right_T, **shared)
    highest_T = logits_TV.gather(1, labels_T.clamp_min(0)[:, None])[:, 0] == logits_TV.amax(1)
    assert torch.equal(right_T, highest_T & (labels_T >= 0))
    assert 15 < right_T.sum() < 30
    plain_T = ops.linear_cross_entropy(hidden_TD, weight_VD, labels_T, **shared)
    assert torch.equal(losses_T, plain_T)
    inputs = (hidden_TD, weight_VD)
    for asked, plain in zip(
        *(torch.autograd.grad(x.sum(), inputs) for x in (losses_T, plain_T)), strict=True
    ):
        assert torch.equal(asked, plain)


@pytest.mark.parametrize("implementation", Implementation)
def test_a_label_that_ties_with_another_token_is_right(implementation: Implementation) -> None:
    hidden_TD, weight_VD = torch.ones(4, 1), torch.tensor([[1.0], [2.0], [2.0], [-1.0]])
    right_T = torch.empty(4, dtype=torch.bool)
    labels_T = torch.arange(4)
    ops.linear_cross_entropy(hidden_TD, weight_VD, labels_T, right_T=right_T, implementation=implementation)
    assert right_T.tolist() == [False, True, True, False]


@pytest.mark.parametrize("implementation", Implementation)
def test_an_ignored_label_is_not_right_where_all_logits_are_negative(implementation: Implementation) -> None:
    hidden_TD, weight_VD, labels_T = torch.ones(2, 1), -torch.ones(3, 1), torch.tensor([-100, 1])
    right_T = torch.empty(2, dtype=torch.bool)
    ops.linear_cross_entropy(
        hidden_TD, weight_VD, labels_T, ignore_index=-100, right_T=right_T, implementation=implementation
    )
    assert right_T.tolist() == [False, True]


def test_a_label_outside_the_vocabulary_stops() -> None:
    hidden_TD, weight_VD, _ = make(3)
    with pytest.raises(RuntimeError, match="outside the vocabulary of 35"):
        ops.linear_cross_entropy(hidden_TD, weight_VD, torch.tensor([1, 35, 2]), vocab_size=35)


def test_recompute_and_compile_give_the_same_gradients() -> None:
    hidden_TD, weight_VD, labels_T = make(20)

    def loss(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return ops.linear_cross_entropy(hidden_TD * 2, weight_VD, labels_T).sum()

    wanted = torch.autograd.grad(loss(hidden_TD, weight_VD), (hidden_TD, weight_VD))
    recomputed = torch.utils.checkpoint.checkpoint(loss, hidden_TD, weight_VD, use_reentrant=False)
    compiled = torch.compile(loss, backend="aot_eager")(hidden_TD, weight_VD)
    for other in (recomputed, compiled):
        for mine, theirs in zip(torch.autograd.grad(other, (hidden_TD, weight_VD)), wanted, strict=True):
            assert torch.equal(mine, theirs)


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    tokens, rows, dim = 2048, 4096, 16
    hidden_TD, weight_VD, labels_T = make(tokens, rows=rows, dim=dim)

    def peak(function) -> int:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            function().mean().backward()
        held = highest = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                highest = max(highest, held)
        return highest

    plain = peak(lambda: reference.linear_cross_entropy(hidden_TD, weight_VD, labels_T))
    chunked = peak(lambda: ops.linear_cross_entropy(hidden_TD, weight_VD, labels_T, chunk_tokens=128))
    assert chunked * 4 <= plain, f"{chunked / 2**20:.1f} MiB against {plain / 2**20:.1f} MiB"
