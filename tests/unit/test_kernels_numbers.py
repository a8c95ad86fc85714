"""What the references compute: against cases worked by hand, other libraries and finite differences."""

import pytest
import torch

from megaswift.kernels.block_fp8.ops import Block, dequantise, quantise, round_trip
from megaswift.kernels.dispatch import Implementation, choose
from megaswift.kernels.document_layout.ops import document_layout
from megaswift.kernels.gather_rows.ops import gather_rows
from megaswift.kernels.merge_attention.ops import merge_attention
from megaswift.kernels.packing.ops import pack, unpack
from megaswift.kernels.rotary.ops import RotaryTable, axes_in_blocks, axes_in_turn, rotary, rotary_table

BOTH = pytest.mark.parametrize("how", list(Implementation), ids=lambda how: how.value)


@BOTH
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_copying_kernels_serve_every_dtype(dtype: torch.dtype, how: Implementation) -> None:
    padded = torch.arange(12).reshape(3, 4).remainder(5).to(dtype)
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    packed = pack(padded, offsets, implementation=how)
    assert torch.equal(packed.to(torch.float64), torch.tensor([0, 1, 3, 4, 0]).to(dtype).to(torch.float64))
    restored = unpack(packed, offsets, seq_len=3, padding=1, implementation=how)
    wanted = torch.tensor([[0, 1, 1], [1, 1, 1], [3, 4, 0]]).to(dtype)
    assert torch.equal(restored.to(torch.float64), wanted.to(torch.float64))
    rows = gather_rows(packed, torch.tensor([4, -1, 2]), fill=1, implementation=how)
    assert torch.equal(rows.to(torch.float64), torch.tensor([0, 1, 3]).to(dtype).to(torch.float64))


@BOTH
def test_layout_of_documents_by_hand(how: Implementation) -> None:
    layout = document_layout(
        torch.tensor([3, 0, 4]),
        tokens=9,
        prompt_lengths_N=torch.tensor([2, 0, 0]),
        weights_N=torch.tensor([0.5, 9.0, 2.0]),
        implementation=how,
    )
    assert layout.cu_seqlens.tolist() == [0, 3, 3, 7] and layout.cu_seqlens.dtype == torch.int32
    assert layout.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert layout.loss_weights_T.tolist() == [0.0, 0.5, 0.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0]


def test_rotary_is_what_transformers_computes() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions = torch.tensor([0, 1, 2, 0, 1000])
    table = rotary_table(positions, 1e4 ** -(torch.arange(4) / 4))
    query, key = torch.randn(5, 3, 8), torch.randn(5, 2, 8)
    cos, sin = (torch.cat([half, half], dim=-1)[None] for half in (table.cos_TR, table.sin_TR))
    wanted = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    for mine, theirs in zip((rotary(query, table), rotary(key, table)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs[0].transpose(0, 1))


def test_interleaved_pairs_are_half_pairs_in_another_order() -> None:
    table = rotary_table(torch.arange(6), torch.tensor([1.0, 0.3, 0.01]))
    x = torch.randn(6, 2, 8)
    order = torch.tensor([0, 2, 4, 1, 3, 5, 6, 7])
    assert torch.equal(rotary(x, table, interleaved=True)[..., order], rotary(x[..., order], table))


def test_mrope_axes_follow_transformers() -> None:
    assert axes_in_blocks([2, 1, 1]).tolist() == [0, 0, 1, 2]
    # Qwen3-VL: axes 1 and 2 take every third frequency up to thrice their section; axis 0 keeps the rest.
    sections = [24, 20, 20]
    wanted = torch.zeros(64, dtype=torch.int64)
    for axis in (1, 2):
        wanted[axis : 3 * sections[axis] : 3] = axis
    assert torch.equal(axes_in_turn(sections), wanted)


@BOTH
def test_gradients_are_those_of_finite_differences(how: Implementation) -> None:
    torch.manual_seed(0)
    table = rotary_table(torch.arange(3), torch.tensor([1.0, 0.1]))
    offsets, index = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([2, -1, 0])

    def checked(function, *shapes: tuple[int, ...]) -> None:
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        assert torch.autograd.gradcheck(
            function, inputs, eps=1e-2, atol=2e-3, rtol=1e-2
        )  # float32 differences

    checked(lambda x: rotary(x, table, implementation=how), (3, 2, 6))
    checked(lambda x: pack(x, offsets, implementation=how), (2, 3, 2))
    checked(lambda x: unpack(x, offsets, seq_len=3, implementation=how), (3, 2))
    checked(lambda x: gather_rows(x, index, implementation=how), (3, 2))
    checked(lambda *parts: merge_attention(*parts, implementation=how), (3, 2, 4), (3, 2), (3, 2, 4), (3, 2))


def test_merged_halves_are_attention_over_all_keys() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(5, 4).double(), torch.randn(9, 4).double(), torch.randn(9, 3).double()

    def attend(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scores = query @ key[keys].t()
        return (scores.softmax(-1) @ value[keys])[:, None].float(), scores.logsumexp(-1)[:, None].float()

    out, lse = merge_attention(*attend(slice(0, 4)), *attend(slice(4, 9)))
    wanted_out, wanted_lse = attend(slice(0, 9))
    torch.testing.assert_close(out, wanted_out)
    torch.testing.assert_close(lse, wanted_lse)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@BOTH
def test_every_fp8_code_survives(how: Implementation, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = codes[codes.float().isfinite()].float()
    largest = torch.finfo(dtype).max
    for factor in (1.0, 2.0**-20):
        x = torch.zeros(1, 128 * 3)
        x[0, : len(finite)] = finite
        x[0, ::128] = largest  # one in every block, so that its scale is the factor
        quantised = quantise(x * factor, block=Block.ROW, dtype=dtype, implementation=how)
        assert quantised.scales_PQ.tolist() == [[factor] * 3]
        assert torch.equal(dequantise(quantised, torch.float32, implementation=how), x * factor)


@BOTH
def test_fp8_rounds_as_torch_does_and_keeps_nan(how: Implementation) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = (
        torch.rand(200, 300, generator=generator) * 30 - 22
    )  # down into and below the subnormal numbers
    x = torch.randn(200, 300, generator=generator) * 2**exponents
    x[3, 5] = float("nan")
    quantised = quantise(x, block=Block.SQUARE, power_of_two=True, implementation=how)
    assert quantised.scales_PQ.shape == (2, 3)
    assert torch.equal(quantised.scales_PQ.log2().frac(), torch.zeros(2, 3))
    scales = quantised.scales_PQ.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    wanted = (x / scales).to(torch.float8_e4m3fn)
    assert torch.equal(quantised.values_MN.view(torch.uint8), wanted.view(torch.uint8))
    assert quantised.values_MN.float().isnan().nonzero().tolist() == [[3, 5]]


@BOTH
def test_fp8_round_trip_errs_by_half_a_step_and_passes_gradients(how: Implementation) -> None:
    x = (torch.rand(130, 140) + 0.5).requires_grad_()  # within one binade of the largest: normal codes only
    restored = round_trip(x, block=Block.ROW, implementation=how)
    assert ((restored - x).abs() / x).max() <= 2**-4
    (grad,) = torch.autograd.grad(restored, x, torch.full_like(x, 3.0))
    assert torch.equal(grad, torch.full_like(x, 3.0))


def test_an_implementation_that_cannot_run_is_named_in_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for _ in range(2):
        assert choose("a kernel", torch.device("cpu"), Implementation.TRITON) is Implementation.REFERENCE
    assert [record.message for record in caplog.records] == [
        "a kernel: the reference runs in place of the Triton kernel, because triton is not installed"
    ]
    assert choose("a kernel", torch.device("cpu")) is Implementation.REFERENCE


def test_kernels_work_under_recompute_and_compile() -> None:
    table = rotary_table(torch.arange(4), torch.tensor([1.0, 0.1]))
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32)

    def function(x: torch.Tensor) -> torch.Tensor:
        turned = rotary(x, RotaryTable(cos_TR=table.cos_TR, sin_TR=table.sin_TR))
        merged, _ = merge_attention(turned, turned.sum(-1), x, x.sum(-1))
        padded = unpack(merged, offsets, seq_len=3)
        return gather_rows(
            round_trip(pack(padded, offsets, tokens=4).flatten(1), block=Block.ROW), torch.tensor([3, 1])
        )

    x = torch.randn(4, 2, 4, requires_grad=True)
    wanted = torch.autograd.grad(function(x).sum(), x)[0]
    recomputed = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    for other in (recomputed, compiled):
        torch.testing.assert_close(torch.autograd.grad(other.sum(), x)[0], wanted)


@BOTH
def test_fp8_keeps_the_zeros_of_a_block_of_subnormal_numbers(how: Implementation) -> None:
    x = torch.zeros(1, 128)
    x[0, 0] = 1e-44
    for power_of_two in (False, True):
        quantised = quantise(x, block=Block.ROW, power_of_two=power_of_two, implementation=how)
        assert quantised.values_MN.float().isfinite().all() and (quantised.scales_PQ > 0).all()
