"""GaLore against its algorithm written out in float64."""

from types import SimpleNamespace

import pytest
import torch

from megaswift.config.optimizer import OptimizerConfig
from megaswift.errors import ConfigError
from megaswift.models import nf4
from megaswift.training import galore
from megaswift.training.galore import GaLoreAdamW

LR, DECAY, EPS, BETAS, GAP, RANK, SCALE = 0.05, 0.1, 1e-8, (0.9, 0.95), 3, 2, 0.25


def written_out(weight: torch.Tensor, grads: list[torch.Tensor], *, from_left: bool) -> torch.Tensor:
    """Algorithm 2 of arXiv 2403.03507 with decoupled weight decay; projected from the right it is turned."""
    if not from_left:
        return written_out(weight.T, [grad.T for grad in grads], from_left=True).T
    weight, first, second = weight.double(), 0.0, 0.0
    for step, grad in enumerate(grad.double() for grad in grads):
        if step % GAP == 0:
            p = torch.linalg.svd(grad)[0][:, :RANK]
            p = p * p.gather(0, p.abs().argmax(0, keepdim=True)).sign()  # the paper leaves the sign open
        low = p.T @ grad
        first = BETAS[0] * first + (1 - BETAS[0]) * low
        second = BETAS[1] * second + (1 - BETAS[1]) * low**2
        unbiased = first / (1 - BETAS[0] ** (step + 1)), second / (1 - BETAS[1] ** (step + 1))
        update = SCALE * p @ (unbiased[0] / (unbiased[1].sqrt() + EPS))
        weight = weight - LR * DECAY * weight - LR * update
    return weight


def stepped(
    shape: tuple[int, int], grads: list[torch.Tensor], **settings: object
) -> tuple[GaLoreAdamW, torch.Tensor, torch.Tensor]:
    matrix, vector = (torch.nn.Parameter(torch.ones(size)) for size in (shape, shape[:1]))
    torch.nn.init.normal_(matrix, generator=torch.Generator().manual_seed(5))
    before = matrix.detach().clone()
    group = {"params": [matrix, vector], "lr": LR, "weight_decay": DECAY, "eps": EPS, "betas": BETAS, "is_expert_parallel": False}  # fmt: skip
    chosen = OptimizerConfig(
        use_galore=True, galore_rank=RANK, galore_update_proj_gap=GAP, galore_scale=SCALE, **settings
    )
    optimizer = GaLoreAdamW([group], [matrix], chosen)
    for grad in grads:
        matrix.grad, vector.grad = grad.clone(), grad[:, 0].clone()
        optimizer.step()
    return optimizer, before, matrix.detach()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(galore, "parallel_state", SimpleNamespace(get_data_parallel_group=lambda **_: None))
    monkeypatch.setattr(galore.dist, "broadcast", lambda *args, **kwargs: None)


WIDE, HIGH, SQUARE = (6, 9), (9, 6), (7, 7)


@pytest.mark.parametrize(
    ("proj_type", "shape", "from_left"),
    [
        ("std", WIDE, True),
        ("std", HIGH, False),
        ("std", SQUARE, True),
        ("reverse_std", WIDE, False),
        ("reverse_std", HIGH, True),
        ("left", HIGH, True),
        ("right", WIDE, False),
    ],
)
def test_steps_are_those_of_the_paper(proj_type: str, shape: tuple[int, int], *, from_left: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator) for _ in range(7)]
    optimizer, before, after = stepped(shape, grads, galore_proj_type=proj_type)
    expected = written_out(before, grads, from_left=from_left)
    torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-6)
    (kept,) = optimizer.low_rank.values()
    assert kept.moments is not None
    assert kept.moments[0].shape == ((RANK, shape[1]) if from_left else (shape[0], RANK))


def test_other_parameters_are_stepped_by_adamw() -> None:
    grads = [torch.randn(6, 9, generator=torch.Generator().manual_seed(step)) for step in range(4)]
    optimizer, _, _ = stepped((6, 9), grads)
    vector = torch.nn.Parameter(torch.ones(6))
    plain = torch.optim.AdamW([vector], lr=LR, weight_decay=DECAY, eps=EPS, betas=BETAS)
    for grad in grads:
        vector.grad = grad[:, 0].clone()
        plain.step()
    assert torch.equal(optimizer.param_groups[0]["params"][1], vector)


def test_four_bits_change_the_direction_little_and_are_kept_by_a_checkpoint() -> None:
    grads = [torch.randn(64, 96, generator=torch.Generator().manual_seed(step)) for step in range(4)]
    _, before, exact = stepped((64, 96), grads)
    optimizer, _, rough = stepped((64, 96), grads, galore_quantization=True)
    moved, exactly = (rough - before).flatten(), (exact - before).flatten()
    assert 0.98 < torch.cosine_similarity(moved, exactly, dim=0) < 1
    states = optimizer.low_rank_states()
    other = stepped((64, 96), [], galore_quantization=True)[0]
    other.load_low_rank_states(states)
    (one,), (two,) = optimizer.low_rank.values(), other.low_rank.values()
    assert torch.equal(optimizer._unpacked(one.projector), other._unpacked(two.projector))


def test_four_bits_without_bitsandbytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="galore_quantization=true needs bitsandbytes"):
        stepped((6, 9), [], galore_quantization=True)
