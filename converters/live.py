"""The parameters of a live model beside its plan, and stripes as views of torch tensors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

from megaswift.converters.plan import FILE_BUFFERS, Parameter, plan_chunk
from megaswift.converters.spelling import is_adapter, local_spelling
from megaswift.converters.stripes import Stripe
from megaswift.errors import WeightsError, listing
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout, coordinates

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class LiveParameter:
    """A parameter of the model, its place in the plan, and the module that owns it."""

    planned: Parameter
    numbers: Callable[[], torch.Tensor]
    chunk: torch.nn.Module
    name: str  # in the chunk, as its own layer spec spells it
    in_fp8: torch.Tensor | None = (
        None  # Transformer Engine's tensor, whose codes and scales have no rows of numbers
    )

    def settle(self) -> None:
        """Quantise what was written to `weight` where the model keeps the parameter in FP8."""
        if self.in_fp8 is not None:
            self.in_fp8.copy_(self.weight.view(self.in_fp8.shape))
            parameter: Any = self.chunk.get_parameter(self.name)
            if hasattr(parameter, "get_high_precision_init_val"):
                # Megatron's optimizer begins with what Transformer Engine kept of the initial values, not with the codes
                # (distrib_optimizer.py, 0.16.1; transformer_engine/pytorch/module/base.py).
                parameter._high_precision_init_val = self.weight.detach().view(parameter.shape).cpu()

    @property
    def weight(self) -> torch.Tensor:
        """The parameter in its planned shape: a view of its memory, its values in FP8, or what its four bits stand for now."""
        return self.numbers().view(self.planned.shape)

    @property
    def holder(self) -> torch.Tensor:
        """What the chunk holds under the name: a parameter, or a buffer."""
        module_name, _, kind = self.name.rpartition(".")
        held: torch.Tensor = getattr(self.chunk.get_submodule(module_name), kind)
        return held

    @property
    def adapted_module(self) -> Any | None:
        """The linear whose weight this is, if it has a LoRA adapter (lora_a, lora_b and lora_scale)."""
        module_name, _, kind = self.name.rpartition(".")
        module = self.chunk.get_submodule(module_name)
        return module if kind == "weight" and hasattr(module, "lora_scale") else None


def live_parameters(
    chunks: Sequence[torch.nn.Module], meta: ModelMeta, layout: Layout, *, rank: int
) -> list[LiveParameter]:
    """Return this rank's parameters in the order of the plan; raises WeightsError unless plan and model hold the same ones."""
    found: list[LiveParameter] = []
    faults: list[str] = []
    at = coordinates(layout, rank)
    assert len(chunks) == layout.vpp, f"{len(chunks)} chunks for vpp={layout.vpp}"
    for vp_rank, chunk in enumerate(chunks):
        weights = {local_spelling(name): (name, weight) for name, weight in _base_parameters(chunk)}
        for planned in plan_chunk(meta, layout, at, vp_rank=vp_rank):
            if planned.name not in weights:
                faults.append(f"{planned.name} is not in the model")
                continue
            name, weight = weights.pop(planned.name)
            codes = weight.dtype is torch.uint8  # models/nf4.py
            four_bits: Any = chunk.get_submodule(name.rpartition(".")[0]).product if codes else None
            shape = four_bits.shape if four_bits else weight.shape
            if _without_ones(shape) != _without_ones(planned.shape):
                faults.append(
                    f"{planned.name} is {list(shape)} in the model, {list(planned.shape)} by its table"
                )
                continue
            in_fp8 = None
            if four_bits:
                numbers = partial(four_bits.dequantised, weight.data)
            else:
                in_fp8 = weight.data if is_float8tensor(weight.data) else None
                values = weight.data if in_fp8 is None else dequantize_fp8_tensor(in_fp8).contiguous()
                numbers = partial(_itself, values)
            found.append(
                LiveParameter(planned=planned, numbers=numbers, chunk=chunk, name=name, in_fp8=in_fp8)
            )
        faults += [f"{name} has no row in the table, it would stay unfilled" for name in weights]
    if faults:
        raise WeightsError(
            f"rank {rank}: the Megatron model and the table of the family {meta.family} differ: {listing(faults)}. "
            "Nothing was read or written."
        )
    return found


def _base_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, weight) for name, weight in chunk.named_parameters() if not is_adapter(name))
    yield from (
        (name, buffer) for name, buffer in chunk.named_buffers() if name.rpartition(".")[2] in FILE_BUFFERS
    )


def _itself(values: torch.Tensor) -> torch.Tensor:
    return values


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def rows_of(matrix_NC: torch.Tensor, stripe: Stripe) -> torch.Tensor:
    """Return the stripe of a matrix whose rows may lie apart, as a view [runs, width, C]."""
    row, column = matrix_NC.stride()
    size = (stripe.runs, stripe.width, matrix_NC.shape[1])
    return matrix_NC.as_strided(
        size, (stripe.pitch * row, row, column), matrix_NC.storage_offset() + stripe.start * row
    )


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """Return a contiguous parameter as a matrix [dim 0, the rest], a view."""
    return weight.view(weight.shape[0], -1)
