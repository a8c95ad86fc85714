"""Block FP8 and MXFP4 by numpy: the bits that torch and transformers get."""

import numpy as np
import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megaswift.converters.block_floats import decode_fp8, decode_mxfp4, encode_fp8, scales_of
from megaswift.kernels.block_fp8 import reference


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().view(f"u{tensor.element_size()}")


def bfloat16(halves: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(halves).view(torch.bfloat16)


def random_fp8(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every kind of byte, NaN included, and scales of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (rows, cols), generator=generator, dtype=torch.uint8)
    scales = torch.randn(-(-rows // 128), -(-cols // 128), generator=generator).exp() * 1e-3
    return values.view(torch.float8_e4m3fn), scales


@pytest.mark.parametrize(("rows", "cols"), [(256, 384), (128, 128)])
def test_fp8_is_read_as_transformers_reads_it(rows: int, cols: int) -> None:
    values, scales = random_fp8(rows, cols)
    expected = Fp8Dequantize(None)._dequantize_one(values, scales, output_dtype=torch.bfloat16)
    found = decode_fp8(bits(values), scales.numpy(), (0, rows), (0, cols))
    torch.testing.assert_close(bfloat16(found), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "cols"), [(576, 320), (1, 7), (130, 129), (0, 128)])
def test_odd_edges_are_read_as_transformers_differentiates_them(rows: int, cols: int) -> None:
    # Fp8Dequantize refuses sizes that 128 does not divide, or takes a smaller block; the backward pass knows them.
    values, scales = random_fp8(rows, cols)
    expected = _dequantize_fp8_weight(values, scales, [128, 128], torch.float32).bfloat16()
    found = decode_fp8(bits(values), scales.numpy(), (0, rows), (0, cols))
    torch.testing.assert_close(bfloat16(found), expected, rtol=0, atol=0, equal_nan=True)


def test_a_part_of_an_fp8_matrix_is_that_part() -> None:
    values, scales = random_fp8(300, 400)
    whole = decode_fp8(bits(values), scales.numpy(), (0, 300), (0, 400))
    for rows, cols in [
        ((3, 5), (1, 399)),
        ((100, 290), (120, 260)),
        ((128, 256), (128, 256)),
        ((7, 7), (0, 9)),
    ]:
        part = decode_fp8(bits(values), scales.numpy(), rows, cols)
        assert np.array_equal(part, whole[slice(*rows), slice(*cols)])


@pytest.mark.parametrize(("rows", "cols"), [(256, 128), (130, 200), (5, 3)])
def test_fp8_is_written_as_torch_rounds(rows: int, cols: int) -> None:
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)).exp() ** 3
    matrix[0, 0], matrix[-1, -1], matrix[0, 1] = 0.0, torch.nan, -1e-9
    values, scales = encode_fp8(matrix.numpy())
    expected, expected_scales = reference.quantise(
        matrix, block_rows=128, block_columns=128, dtype=torch.float8_e4m3fn, power_of_two=False
    )
    assert np.array_equal(scales, expected_scales.numpy())
    assert np.array_equal(values, bits(expected))


def test_every_bfloat16_rounds_to_the_fp8_of_torch() -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    within = every[every.abs() <= 448].reshape(1, -1)
    from megaswift.converters.block_floats import _round_to_e4m3

    assert np.array_equal(_round_to_e4m3(within.numpy()), bits(within.to(torch.float8_e4m3fn)))
    beyond = np.array([[449, 1e30, np.inf, -np.inf]], np.float32)
    assert _round_to_e4m3(beyond).tolist() == [[0x7E, 0x7E, 0x7E, 0xFE]]


def test_a_block_of_zeros_has_scale_one() -> None:
    values, scales = encode_fp8(np.zeros((3, 3), np.float32))
    assert scales.tolist() == [[1.0]] and not values.any()


def test_what_is_written_in_fp8_comes_back_within_half_a_step() -> None:
    matrix = torch.randn(256, 384, generator=torch.Generator().manual_seed(2)).bfloat16()
    values, scales = encode_fp8(matrix.float().numpy())
    back = bfloat16(decode_fp8(values, scales, (0, 256), (0, 384))).float()
    block = scales.repeat(128, 0).repeat(128, 1)
    # Half of 2^-3 for 3 bits of mantissa, or half the smallest number, and the rounding of bfloat16.
    allowed = torch.maximum(matrix.float().abs() * 2**-4, torch.from_numpy(block) * 2**-10) * (1 + 2**-7)
    assert ((back - matrix.float()).abs() <= allowed).all() and not torch.equal(back, matrix.float())


def test_mxfp4_is_read_as_transformers_reads_it() -> None:
    # All bytes with all scales, those that overflow and underflow included; 255 is no number.
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).repeat(1, 16)
    expected = convert_moe_packed_tensors(blocks[None], scales[None])[0].T  # transformers keeps [in, out]
    found = decode_mxfp4(blocks.numpy(), scales.numpy())
    torch.testing.assert_close(bfloat16(found), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0", "BF16", "F32"])
def test_scales_of_every_dtype(dtype: str) -> None:
    exact = torch.tensor([[0.25, 4.0]])
    raw = {
        "U8": np.array([[125, 129]], np.uint8),
        "F8_E8M0": np.array([[125, 129]], np.uint8),
        "BF16": bits(exact.bfloat16()),
        "F32": bits(exact),
    }[dtype]
    assert np.array_equal(scales_of(raw, dtype), exact.numpy())
