"""Every kernel with inputs to run it on: what the tests compare and what gpu-check times."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megaswift.kernels.block_fp8.ops import Block, dequantise, quantise
from megaswift.kernels.dispatch import Implementation
from megaswift.kernels.document_layout.ops import document_layout
from megaswift.kernels.gather_rows.ops import gather_rows
from megaswift.kernels.linear_cross_entropy.ops import linear_cross_entropy
from megaswift.kernels.merge_attention.ops import merge_attention
from megaswift.kernels.packing.ops import pack, unpack
from megaswift.kernels.rotary.ops import RotaryTable, axes_in_turn, rotary, rotary_table

Tensors = tuple[torch.Tensor, ...]
EXACT = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 0.0}
# A few roundings of the type, relative to the largest element: sums are in float32 and rounded once. Triton's
# interpreter (3.7.1, cast_impl) cuts float32 off to bfloat16 instead of rounding: a whole unit of 2^-8.
ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Logits are rounded to the type before the softmax, their gradient again before the products.
TWICE_ROUNDED = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What inputs are made of."""

    lengths: list[int]
    heads: int
    dim: int
    vocabulary: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel: its inputs, the differentiable ones first, and how to run it."""

    name: str
    make: Callable[[Sizes, torch.dtype, str], Tensors]
    run: Callable[..., Tensors]  # (implementation, *inputs) -> outputs
    differentiable: int
    tolerance: dict[torch.dtype, float]


def _random(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _offsets(sizes: Sizes, device: str) -> torch.Tensor:
    return torch.tensor([0, *sizes.lengths], device=device).cumsum(0).to(torch.int32)


def _padded(sizes: Sizes, dtype: torch.dtype, device: str) -> Tensors:
    seq_len = max(sizes.lengths, default=0) + 3
    return _random(len(sizes.lengths), seq_len, sizes.heads, sizes.dim, dtype=dtype, device=device), _offsets(
        sizes, device
    )


def _packed(sizes: Sizes, dtype: torch.dtype, device: str) -> Tensors:
    return _random(sum(sizes.lengths), sizes.heads, sizes.dim, dtype=dtype, device=device), _offsets(
        sizes, device
    )


def _unpack(implementation: Implementation, packed: torch.Tensor, offsets: torch.Tensor) -> Tensors:
    seq_len = max(offsets.diff().tolist(), default=0) + 2
    return (unpack(packed, offsets, seq_len=seq_len, padding=-7.0, implementation=implementation),)


def _indexed(sizes: Sizes, dtype: torch.dtype, device: str) -> Tensors:
    rows = sum(sizes.lengths)
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(rows)).to(device)
    index = torch.cat([index[: rows // 2], index.new_full((3,), -1), index[rows // 2 : rows * 3 // 4]])
    return _random(rows, sizes.heads, sizes.dim, dtype=dtype, device=device), index


def _lengths(sizes: Sizes, dtype: torch.dtype, device: str) -> Tensors:
    lengths = torch.tensor(sizes.lengths, dtype=torch.int64, device=device)
    return (
        lengths,
        lengths // 2,
        torch.rand(len(lengths), device=device),
        torch.tensor(sum(sizes.lengths) + 5),
    )


def _document_layout(
    implementation: Implementation,
    lengths: torch.Tensor,
    prompts: torch.Tensor,
    weights: torch.Tensor,
    tokens: torch.Tensor,
) -> Tensors:
    layout = document_layout(
        lengths,
        tokens=int(tokens),
        prompt_lengths_N=prompts,
        weights_N=weights,
        implementation=implementation,
    )
    return layout.cu_seqlens, layout.position_ids_T, layout.loss_weights_T


def _rotated(rotary_dim: int | None) -> Callable[[Sizes, torch.dtype, str], Tensors]:
    def make(sizes: Sizes, dtype: torch.dtype, device: str) -> Tensors:
        half = (sizes.dim if rotary_dim is None else rotary_dim) // 2
        tokens = sum(sizes.lengths)
        sections = [half - 2 * (half // 3), half // 3, half // 3]
        positions_AT = torch.stack([torch.arange(tokens, device=device) * (axis + 1) for axis in range(3)])
        frequencies_R = 1e4 ** -(torch.arange(half, device=device) / half)
        table = rotary_table(positions_AT, frequencies_R, axes_R=axes_in_turn(sections).to(device))
        return _random(tokens, sizes.heads, sizes.dim, dtype=dtype, device=device), table.cos_TR, table.sin_TR

    return make


def _rotary(interleaved: bool) -> Callable[..., Tensors]:
    def run(
        implementation: Implementation, x_THK: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
    ) -> Tensors:
        table = RotaryTable(cos_TR=cos_TR, sin_TR=sin_TR)
        return (rotary(x_THK, table, interleaved=interleaved, implementation=implementation),)

    return run


def _partial_attentions(sizes: Sizes, dtype: torch.dtype, device: str) -> Tensors:
    tokens = sum(sizes.lengths)
    outs = [_random(tokens, sizes.heads, sizes.dim, dtype=dtype, device=device) * scale for scale in (1, -2)]
    lses = [_random(tokens, sizes.heads, dtype=torch.float32, device=device) * scale for scale in (3.0, -2.0)]
    seen = torch.arange(tokens, device=device) % 4
    lses[0][(seen == 1) | (seen == 3)] = float("-inf")
    lses[1][(seen == 2) | (seen == 3)] = float("-inf")
    outs[0][seen == 1] = float("nan")  # what no key was seen for is not read
    return outs[0], lses[0], outs[1], lses[1]


def _output_layer(sizes: Sizes, dtype: torch.dtype, device: str) -> Tensors:
    tokens = sum(sizes.lengths)
    hidden_TD = _random(tokens, sizes.dim, dtype=dtype, device=device)
    labels_T = torch.arange(tokens, device=device) * 7 % sizes.vocabulary
    return hidden_TD, _random(sizes.vocabulary, sizes.dim, dtype=dtype, device=device), labels_T


def _linear_cross_entropy(
    implementation: Implementation, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor
) -> Tensors:
    return (
        linear_cross_entropy(hidden_TD, weight_VD, labels_T, chunk_tokens=512, implementation=implementation),
    )


def _half_right(sizes: Sizes, dtype: torch.dtype, device: str) -> Tensors:
    hidden_TD, weight_VD, labels_T = _output_layer(sizes, dtype, device)
    likeliest_T = (hidden_TD.float() @ weight_VD.float().t()).argmax(1)
    return hidden_TD, weight_VD, torch.where(labels_T % 2 == 0, likeliest_T, labels_T)


def _likeliest(implementation: Implementation, *output_layer: torch.Tensor) -> Tensors:
    right_T = torch.empty_like(output_layer[-1], dtype=torch.bool)
    linear_cross_entropy(*output_layer, right_T=right_T, chunk_tokens=512, implementation=implementation)
    return (right_T,)


def _matrix(sizes: Sizes, dtype: torch.dtype, device: str) -> Tensors:
    x_MN = _random(sum(sizes.lengths), sizes.heads * sizes.dim, dtype=dtype, device=device)
    scales_M = torch.logspace(-6, 2, x_MN.shape[0], device=device)[
        :, None
    ]  # subnormal codes in square blocks
    return ((x_MN.float() * scales_M).to(dtype),)


def _fp8(block: Block, dtype: torch.dtype, power_of_two: bool) -> Callable[..., Tensors]:
    def run(implementation: Implementation, x_MN: torch.Tensor) -> Tensors:
        quantised = quantise(
            x_MN, block=block, dtype=dtype, power_of_two=power_of_two, implementation=implementation
        )
        restored = dequantise(quantised, torch.float32, implementation=implementation)
        return quantised.values_MN.view(torch.uint8), quantised.scales_PQ, restored

    return run


def _restore(implementation: Implementation, x_MN: torch.Tensor) -> Tensors:
    quantised = quantise(x_MN, block=Block.ROW, implementation=Implementation.REFERENCE)
    return (dequantise(quantised, x_MN.dtype, implementation=implementation),)


def _case(
    name: str, make: Any, run: Any, differentiable: int, tolerance: dict[torch.dtype, float] = EXACT
) -> Case:
    return Case(name=name, make=make, run=run, differentiable=differentiable, tolerance=tolerance)


CASES = [
    _case("pack", _padded, lambda how, x, offsets: (pack(x, offsets, implementation=how),), 1),
    _case("unpack", _packed, _unpack, 1),
    _case(
        "gather_rows",
        _indexed,
        lambda how, x, index: (gather_rows(x, index, fill=-100.0, implementation=how),),
        1,
    ),
    _case("document_layout", _lengths, _document_layout, 0),
    _case("rotary half", _rotated(None), _rotary(False), 1, ROUNDED),
    _case("rotary interleaved", _rotated(None), _rotary(True), 1, ROUNDED),
    _case("rotary partial", _rotated(6), _rotary(False), 1, ROUNDED),
    _case(
        "merge_attention",
        _partial_attentions,
        lambda how, *parts: merge_attention(*parts, implementation=how),
        4,
        ROUNDED,
    ),
    _case("linear_cross_entropy", _output_layer, _linear_cross_entropy, 2, TWICE_ROUNDED),
    _case("linear_cross_entropy likeliest", _half_right, _likeliest, 0),
    _case("block_fp8 128x128 e4m3", _matrix, _fp8(Block.SQUARE, torch.float8_e4m3fn, False), 0),
    _case("block_fp8 1x128 e4m3", _matrix, _fp8(Block.ROW, torch.float8_e4m3fn, True), 0),
    _case("block_fp8 1x128 e5m2", _matrix, _fp8(Block.ROW, torch.float8_e5m2, False), 0),
    _case("block_fp8 dequantise", _matrix, _restore, 0, ROUNDED),
]
