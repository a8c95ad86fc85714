"""Emulated FP8 against hand-made numbers, and what devices and settings it is refused for."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megaswift.config.precision import PrecisionConfig
from megaswift.errors import ConfigError
from megaswift.models import fp8
from megaswift.models.fp8 import (
    Blocks,
    Delayed,
    Operand,
    Tensorwise,
    _Multiply,
    scaled_round_trip,
    scaling_of,
)
from megaswift.platforms.fp8 import Software, check_fp8, format_for, obstacle

H100 = Software(device="NVIDIA H100", capability=(9, 0), transformer_engine="2.8.0", cuda="12.9")
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def made(recipe: str, fp8_format: str = "hybrid"):
    return scaling_of(PrecisionConfig(fp8_format=fp8_format, fp8_recipe=recipe))


def test_a_tensor_keeps_its_largest_value_and_three_bits_of_the_rest() -> None:
    x = torch.tensor([[448.0, 1.1, -0.3, 0.0]])
    kept = Tensorwise(dict.fromkeys(Operand, torch.float8_e4m3fn)).along_columns(x, Operand.INPUT)
    assert kept.tolist() == [[448.0, 1.125, -0.3125, 0.0]]  # steps of 1/8 above 1, of 1/32 above 1/4


def test_gradients_have_two_bits_in_hybrid_and_three_in_e4m3() -> None:
    x = torch.tensor([[1.0, 1.125, 1.25]])
    hybrid, same = (made("tensorwise", name) for name in ("hybrid", "e4m3"))
    largest = torch.finfo(torch.float8_e5m2).max
    assert hybrid.types[Operand.GRADIENT] is torch.float8_e5m2 and largest == 57344.0
    assert (
        hybrid.along_columns(x, Operand.GRADIENT).unique().numel() == 2
    )  # 1.125 is no neighbour of 1.25 / 2^n
    assert same.types[Operand.GRADIENT] is torch.float8_e4m3fn


def test_delayed_scales_are_those_of_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8.parallel_state, "get_amax_reduction_group", lambda **_: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    for most_recent, expected in ((False, [112.0, 56.0, 56.0, 448.0]), (True, [112.0, 56.0, 448.0, 448.0])):
        scaling = Delayed(dict.fromkeys(Operand, torch.float8_e4m3fn), history=2, most_recent=most_recent)
        assert scaling.scales[Operand.INPUT] == 1.0
        found = []
        for largest in (4.0, 8.0, 1.0, 1.0):
            scaling.learn({Operand.INPUT: torch.tensor([largest, -0.5])})
            found.append(scaling.scales[Operand.INPUT])
        assert found == expected
        scaling.learn({Operand.INPUT: torch.zeros(2)}), scaling.learn({Operand.INPUT: torch.zeros(0)})
        assert scaling.scales[Operand.INPUT] == 448.0  # nothing but zeros teaches nothing
    clipped = scaling.along_columns(torch.tensor([[2.0]]), Operand.INPUT)
    assert clipped.tolist() == [[1.0]]  # larger than anything known before: the largest number


def test_blocks_lie_along_the_sum_of_each_product() -> None:
    x = torch.ones(256, 256)
    x[0, 0] = 2.0**20  # spoils what shares its scale
    small = 2.0**-3
    x[1:, 1:] = small
    scaling = made("blockwise")
    along, across = scaling.along_columns(x, Operand.INPUT), scaling.along_rows(x, Operand.INPUT)
    assert (along[0, 1:128] != 1.0).all() and (along[1:] == x[1:]).all()
    assert (across[1:128, 0] != 1.0).all() and (across[:, 1:] == x[:, 1:]).all()
    square = scaling.along_columns(x, Operand.WEIGHT)
    assert (square[1:128, 1:128] == 0.0).all() and (square[128:, 128:] == small).all()
    fine = made("mxfp8").along_columns(x, Operand.WEIGHT)
    assert (fine[0, 32:] == 1.0).all() and (fine[0, 1:32] != 1.0).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_three_products_read_quantised_operands(recipe: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(40, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    grad = torch.randn(40, 48)
    scaling = made(recipe)
    if isinstance(scaling, Delayed):
        scaling.learn = lambda tensors: None  # type: ignore[method-assign]  # no process group here
    y = _Multiply.apply(x, w, scaling)
    y.backward(grad)
    plain = {"y": x @ w.t(), "x": grad @ w, "w": grad.t() @ x}
    for name, got in (("y", y), ("x", x.grad), ("w", w.grad)):
        error = float((got - plain[name]).norm() / plain[name].norm())
        # Relative rounding errors of 2^-4 at most (e4m3) and 2^-3 (e5m2), uniform: rms below 0.04 and 0.08, two operands each.
        assert 0.005 < error < (0.045 if name == "y" else 0.09), (name, error)
    assert torch.equal(
        y, scaling.along_columns(x, Operand.INPUT) @ scaling.along_columns(w, Operand.WEIGHT).t()
    )


def test_a_round_trip_is_exact_where_the_type_holds_the_number() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    assert torch.equal(scaled_round_trip(every, torch.float8_e4m3fn, 1.0), every)
    assert isinstance(made("mxfp8"), Blocks)


@pytest.mark.parametrize(
    ("recipe", "changes", "words"),
    [
        ("delayed", {"capability": (8, 0)}, "compute capability 8.0, below 8.9"),
        ("mxfp8", {}, "compute capability 9.0, below 10.0"),
        ("blockwise", {"capability": (10, 0)}, "for those below 10.0"),
        ("blockwise", {"cuda": "12.4"}, "CUDA is 12.4, older than 12.9"),
        (
            "tensorwise",
            {"transformer_engine": "2.1.0+abc"},
            "Transformer Engine is 2.1.0\\+abc, older than 2.2",
        ),
        ("delayed", {"transformer_engine": None}, "Transformer Engine is not installed"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_by_name(recipe: str, changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=f"fp8_recipe={recipe} cannot run here: .*{words}"):
        check_fp8(recipe, replace(H100, **changes))


def test_every_recipe_has_a_gpu_that_runs_it() -> None:
    b200 = replace(H100, device="NVIDIA B200", capability=(10, 0))
    runs = Counter(recipe for recipe in RECIPES for gpu in (H100, b200) if obstacle(recipe, gpu) is None)
    assert runs == {"delayed": 2, "tensorwise": 2, "blockwise": 1, "mxfp8": 1}


@pytest.mark.parametrize(
    ("hidden_size", "software", "chosen", "words"),
    [
        (8192, H100, "hybrid", "tensorwise"),
        (2048, H100, "none", "hidden_size=2048 is below 4096"),
        (8192, replace(H100, capability=(8, 0)), "none", "compute capability 8.0"),
        (8192, None, "none", "there is no GPU"),
    ],
)
def test_auto_takes_fp8_where_it_runs_and_pays(hidden_size, software, chosen, words) -> None:
    found, note = format_for("auto", "tensorwise", hidden_size=hidden_size, software=software)
    assert found == chosen and words in note
    assert format_for("e4m3", "tensorwise", hidden_size=1, software=software) == ("e4m3", None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_called_symmetric_is_the_same_in_both_directions(recipe: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 256, generator=generator)
    x *= 2.0 ** torch.randint(-20, 20, (256, 1), generator=generator)  # a block along a column then loses its small numbers
    scaling = made(recipe)
    for operand in Operand:
        same = torch.equal(scaling.along_rows(x, operand), scaling.along_columns(x, operand))
        assert scaling.is_symmetric(operand) == same
