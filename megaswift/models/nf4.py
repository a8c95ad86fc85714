"""A frozen base in four bits: linears multiply by what is dequantised for the moment (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

Blocks of 64 numbers share a scale (section 3; quantisation and kernels are those of bitsandbytes). A rank quantises its own
shard. A block lies in one row where a shard has a multiple of 64 columns, and then its values do not depend on the layout;
with double quantisation the scales of 256 blocks are quantised together, which does.

Letters: T tokens, D inputs, F outputs.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megaswift.config.tuner import TunerConfig
from megaswift.errors import ConfigError
from megaswift.models.product import has_half_products, replace_product

BLOCK = 64


def require_bitsandbytes(flag: str) -> None:
    """Raise ConfigError where bitsandbytes, which `flag` needs, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{flag} needs bitsandbytes. Install it (pip install 'megaswift[qlora]'), or leave the flag out."
        )


class QuantisedProduct:
    """The product of one linear whose weight is kept as codes, [N, 1] of uint8; see models/product.py."""

    def __init__(self, state: Any) -> None:
        self.state = state  # bitsandbytes.functional.QuantState

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, [F, D]."""
        shape: torch.Size = self.state.shape
        return shape

    def dequantised(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weight [F, D] in the dtype that it had."""
        from bitsandbytes.functional import dequantize_4bit

        weight: torch.Tensor = dequantize_4bit(codes, self.state)
        return weight

    def __call__(self, x_TD: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return x w^T; the dequantised weight lives for one product."""
        output: torch.Tensor = _Product.apply(x_TD, codes, self)
        return output


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, codes: torch.Tensor, product: QuantisedProduct) -> torch.Tensor:
        ctx.product = product
        ctx.save_for_backward(codes)
        return (_summable(x_TD) @ _summable(product.dequantised(codes)).t()).to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight_FD = ctx.product.dequantised(*ctx.saved_tensors)
        return (_summable(grads[0]) @ _summable(weight_FD)).to(grads[0].dtype), None, None


def _summable(x: torch.Tensor) -> torch.Tensor:
    """Return x in a dtype that its device multiplies fast."""
    return x if x.is_cuda or has_half_products(x.dtype) else x.float()


@torch.no_grad()
def quantise_base(chunks: Sequence[torch.nn.Module], tuner: TunerConfig, *, device: torch.device) -> None:
    """Keep the decoder's frozen matrices in four bits, and move the chunks to `device`, where they have not been whole.

    Embedding, output layer, router and norms stay as they are. The weights must be loaded. Raises ConfigError without
    bitsandbytes.
    """
    for chunk in chunks:
        for module in chunk.decoder.modules():
            if (
                not isinstance(module, ColumnParallelLinear | RowParallelLinear)
                or module.weight.requires_grad
            ):
                continue
            codes, product = _quantise(module.weight.data.to(device), tuner)
            module.weight = torch.nn.Parameter(codes, requires_grad=False)
            replace_product(module, product)
        chunk.to(device)


def quantisation_error(weight_FD: torch.Tensor, tuner: TunerConfig) -> torch.Tensor:
    """Return what quantise_base takes from a matrix, float32 [F, D]. Raises ConfigError without bitsandbytes."""
    codes, product = _quantise(weight_FD, tuner)
    return weight_FD.float() - product.dequantised(codes).float()


def _quantise(weight_FD: torch.Tensor, tuner: TunerConfig) -> tuple[torch.Tensor, QuantisedProduct]:
    """Return the codes of a matrix, on its device, and the product that reads them."""
    require_bitsandbytes("quant_bits=4")
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        weight_FD.contiguous(),
        blocksize=BLOCK,
        compress_statistics=tuner.bnb_4bit_use_double_quant,
        quant_type=tuner.bnb_4bit_quant_type,
    )
    return codes, QuantisedProduct(state)


def whole_weight(linear: Any) -> torch.Tensor:
    """Return the weight [F, D] of one of Megatron's linears as numbers."""
    product = getattr(linear, "product", None)
    weight: torch.Tensor = linear.weight
    return product.dequantised(weight) if isinstance(product, QuantisedProduct) else weight
