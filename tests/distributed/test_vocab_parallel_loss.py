"""The fused output layer and cross-entropy with its vocabulary spread over tp ranks, against one rank."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megaswift.kernels.dispatch import Implementation
from megaswift.kernels.linear_cross_entropy.ops import linear_cross_entropy
from megaswift.kernels.linear_cross_entropy.reference import linear_cross_entropy as full_logits
from tests.harness.distributed import run_distributed

TOKENS, DIM = 40, 12


def make(vocabulary: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(vocabulary)
    hidden_TD = torch.randn(TOKENS, DIM, generator=generator)
    weight_VD = torch.randn(vocabulary, DIM, generator=generator)
    labels_T, places_T = torch.randint(0, vocabulary, (TOKENS,), generator=generator), torch.arange(TOKENS)
    labels_T = torch.where(places_T % 2 == 0, (hidden_TD @ weight_VD.t()).argmax(1), labels_T)
    labels_T = labels_T.masked_fill(places_T % 5 == 0, -100)
    return hidden_TD, weight_VD, labels_T, torch.rand(TOKENS, generator=generator)


def worker(
    rank: int, world_size: int, vocabulary: int, rows: int, implementation: Implementation | None
) -> dict[str, Any]:
    hidden_TD, weight_VD, labels_T, weights_T = make(vocabulary)
    padded_VD = torch.full((rows * world_size, DIM), float("nan"))  # padding must not be read
    padded_VD[:vocabulary] = weight_VD
    mine_VD = padded_VD[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    hidden_TD.requires_grad_()
    right_T = torch.empty(TOKENS, dtype=torch.bool)
    losses_T = linear_cross_entropy(
        hidden_TD, mine_VD, labels_T, loss_weights_T=weights_T, group=dist.group.WORLD, ignore_index=-100,
        vocab_size=vocabulary, right_T=right_T, chunk_tokens=16, implementation=implementation,
    )  # fmt: skip
    (losses_T * weights_T).sum().backward()
    assert hidden_TD.grad is not None and mine_VD.grad is not None
    dist.all_reduce(hidden_TD.grad)
    return {
        "losses": losses_T.detach().numpy(),
        "right": right_T.tolist(),
        "hidden": hidden_TD.grad.numpy(),
        "weight": mine_VD.grad.numpy(),
    }


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("ranks", "vocabulary", "rows", "implementation"),
    [(2, 66, 33, None), (2, 61, 33, None), (4, 61, 32, None), (4, 61, 32, Implementation.TRITON)],
    ids=["even", "padded", "two ranks of padding alone", "two ranks of padding alone, triton"],
)
def test_shards_of_the_vocabulary_give_the_loss_of_the_whole(
    ranks: int, vocabulary: int, rows: int, implementation: Implementation | None
) -> None:
    hidden_TD, weight_VD, labels_T, weights_T = make(vocabulary)
    hidden_TD.requires_grad_(), weight_VD.requires_grad_()
    losses_T = full_logits(hidden_TD, weight_VD, labels_T, ignore_index=-100)
    (losses_T * weights_T).sum().backward()
    results = run_distributed(worker, ranks, vocabulary, rows, implementation)
    likeliest_T = (hidden_TD @ weight_VD.t()).argmax(1)
    assert 15 < (likeliest_T == labels_T).sum() < TOKENS // 2
    assert all(result["right"] == (likeliest_T == labels_T).tolist() for result in results)
    weight_grad = torch.cat([torch.from_numpy(result["weight"]) for result in results])
    assert torch.equal(weight_grad[vocabulary:], torch.zeros_like(weight_grad[vocabulary:]))
    for got, wanted in [
        *((torch.from_numpy(result["losses"]), losses_T.detach()) for result in results),
        *((torch.from_numpy(result["hidden"]), hidden_TD.grad) for result in results),
        (weight_grad[:vocabulary], weight_VD.grad),
    ]:
        assert wanted is not None
        torch.testing.assert_close(
            got, wanted, rtol=1e-5, atol=1e-5
        )  # float32 sums of 12 and 66 terms, in another order
