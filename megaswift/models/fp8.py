"""FP8 training rehearsed without a GPU for it: linears multiply what FP8 would have kept of their operands.

Each of the three products of a linear reads its operands quantised by the recipe's own scaling and dequantised again to
float32; only the sums differ from the hardware's, which are float32 there too. Recipes as in Transformer Engine 2.8
(common/recipe/__init__.py).

Letters: T tokens, D inputs, F outputs, M rows and N columns of a matrix.
"""

import enum
from collections import deque
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megaswift.config.precision import PrecisionConfig
from megaswift.kernels.block_fp8.ops import Block, round_trip
from megaswift.models.causal_lm import CausalLM
from megaswift.models.product import replace_product

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Operand(enum.Enum):
    """What a matrix is to a linear."""

    INPUT = "input"
    WEIGHT = "weight"
    GRADIENT = "gradient"  # of the output


class Scaling(Protocol):
    """What a recipe makes of the operands of one linear; all return float32."""

    def along_columns(self, x_MN: torch.Tensor, operand: Operand) -> torch.Tensor:
        """Return x for a product that sums over its columns."""
        ...

    def along_rows(self, x_MN: torch.Tensor, operand: Operand) -> torch.Tensor:
        """Return x for a product that sums over its rows."""
        ...

    def is_symmetric(self, operand: Operand) -> bool:
        """Say whether both are the same."""
        ...


class Tensorwise:
    """One scale a tensor, from the tensor itself (Float8CurrentScaling)."""

    def __init__(self, types: dict[Operand, torch.dtype]) -> None:
        self.types = types

    def along_columns(self, x_MN: torch.Tensor, operand: Operand) -> torch.Tensor:
        """Return x as FP8 keeps it."""
        amax = float(x_MN.abs().amax()) if x_MN.numel() else 0.0
        return scaled_round_trip(x_MN, self.types[operand], scale_of(amax, self.types[operand], before=1.0))

    along_rows = along_columns

    def is_symmetric(self, operand: Operand) -> bool:
        """Return true: one scale holds for every direction."""
        return True


class Delayed:
    """One scale a tensor, from the largest values of earlier micro batches over all ranks (DelayedScaling)."""

    def __init__(self, types: dict[Operand, torch.dtype], *, history: int, most_recent: bool) -> None:
        self.types, self.most_recent = types, most_recent
        self.scales = dict.fromkeys(Operand, 1.0)
        self.histories: dict[Operand, deque[float]] = {one: deque(maxlen=history) for one in Operand}

    def along_columns(self, x_MN: torch.Tensor, operand: Operand) -> torch.Tensor:
        """Return x as FP8 keeps it with the scale that was known before."""
        return scaled_round_trip(x_MN, self.types[operand], self.scales[operand])

    along_rows = along_columns

    def is_symmetric(self, operand: Operand) -> bool:
        """Return true: one scale holds for every direction."""
        return True

    def learn(self, tensors: dict[Operand, torch.Tensor]) -> None:
        """Remember the largest values and scale the next tensors by them; every rank of tp, cp and dp calls it."""
        amax = torch.stack(
            [x.detach().abs().amax().float() if x.numel() else torch.zeros(()) for x in tensors.values()]
        )
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
        for operand, value in zip(tensors, amax.tolist(), strict=True):
            history = self.histories[operand]
            history.append(value)
            known = value if self.most_recent else max(history)
            self.scales[operand] = scale_of(known, self.types[operand], before=self.scales[operand])


class Blocks:
    """One scale a block: 128 x 128 of weights and 128 tokens or features of the rest (Float8BlockScaling), or 32 of all (MXFP8)."""

    def __init__(self, types: dict[Operand, torch.dtype], *, block: Block, weight_block: Block) -> None:
        self.types, self.blocks = types, dict.fromkeys(Operand, block) | {Operand.WEIGHT: weight_block}

    def along_columns(self, x_MN: torch.Tensor, operand: Operand) -> torch.Tensor:
        """Return x with blocks along its rows; scales are powers of two in both recipes."""
        return round_trip(
            x_MN.float(), block=self.blocks[operand], dtype=self.types[operand], power_of_two=True
        )

    def along_rows(self, x_MN: torch.Tensor, operand: Operand) -> torch.Tensor:
        """Return x with blocks along its columns."""
        return self.along_columns(x_MN.t(), operand).t()

    def is_symmetric(self, operand: Operand) -> bool:
        """Say whether the blocks are squares."""
        return self.blocks[operand] is Block.SQUARE


def scale_of(amax: float, dtype: torch.dtype, *, before: float) -> float:
    """Return the factor that maps `amax` to the largest number of `dtype`; the one before where there is none."""
    return torch.finfo(dtype).max / amax if 0.0 < amax < float("inf") else before


def scaled_round_trip(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Return x as `dtype` keeps x * scale, float32; what is too large becomes the largest number."""
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp_(-largest, largest).to(dtype).float().div_(scale)


def scaling_of(precision: PrecisionConfig) -> Scaling:
    """Return the scaling of one linear."""
    types = {one: E4M3 for one in Operand}
    if precision.fp8_format == "hybrid":
        types[Operand.GRADIENT] = E5M2
    if precision.fp8_recipe == "tensorwise":
        return Tensorwise(types)
    if precision.fp8_recipe == "blockwise":
        return Blocks(types, block=Block.ROW, weight_block=Block.SQUARE)
    if precision.fp8_recipe == "mxfp8":
        return Blocks(types, block=Block.MX, weight_block=Block.MX)
    return Delayed(
        types,
        history=precision.fp8_amax_history_len,
        most_recent=precision.fp8_amax_compute_algo == "most_recent",
    )


def emulate_fp8(model: CausalLM, precision: PrecisionConfig, *, num_layers: int) -> None:
    """Let the linears of the decoder multiply as in FP8; embedding, router and output layer stay as they are."""
    first, last = 0, num_layers
    if precision.first_last_layers_bf16:
        first, last = precision.num_layers_at_start_in_bf16, num_layers - precision.num_layers_at_end_in_bf16
    for layer in model.decoder.layers:
        if not first <= layer.layer_number - 1 < last:
            continue
        for module in layer.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                replace_product(module, FP8Product(scaling_of(precision)))


class FP8Product:
    """The product of one linear; see models/product.py."""

    def __init__(self, scaling: Scaling) -> None:
        self.scaling = scaling

    def __call__(self, x_TD: torch.Tensor, w_FD: torch.Tensor) -> torch.Tensor:
        """Return x w^T, and let a scaling that follows from earlier values see these."""
        output: torch.Tensor = _Multiply.apply(x_TD, w_FD, self.scaling)
        if isinstance(self.scaling, Delayed) and torch.is_grad_enabled():
            self.scaling.learn({Operand.INPUT: x_TD, Operand.WEIGHT: w_FD})
        return output


def _turned(
    along_columns: torch.Tensor, x_MN: torch.Tensor, operand: Operand, scaling: Scaling
) -> torch.Tensor:
    """Return x for a product over its rows, given what it is for one over its columns."""
    return along_columns if scaling.is_symmetric(operand) else scaling.along_rows(x_MN, operand)


class _Multiply(torch.autograd.Function):
    """x_TD @ w_FD^T, and the two products of its gradient."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, w_FD: torch.Tensor, scaling: Scaling) -> torch.Tensor:
        ctx.scaling, ctx.dtype = scaling, x_TD.dtype
        needs_x, needs_w, _ = ctx.needs_input_grad
        x, w = scaling.along_columns(x_TD, Operand.INPUT), scaling.along_columns(w_FD, Operand.WEIGHT)
        ctx.save_for_backward(
            _turned(x, x_TD, Operand.INPUT, scaling) if needs_w else None,
            _turned(w, w_FD, Operand.WEIGHT, scaling) if needs_x else None,
        )
        return (x @ w.t()).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_TF,), (x_TD, w_FD) = grads, ctx.saved_tensors
        grad_x = grad_w = None
        grad = ctx.scaling.along_columns(grad_TF, Operand.GRADIENT)
        if w_FD is not None:
            grad_x = (grad @ w_FD).to(ctx.dtype)
        if x_TD is not None:
            grad_w = (_turned(grad, grad_TF, Operand.GRADIENT, ctx.scaling).t() @ x_TD).to(ctx.dtype)
        if isinstance(ctx.scaling, Delayed):
            ctx.scaling.learn({Operand.GRADIENT: grad_TF})
        return grad_x, grad_w, None
