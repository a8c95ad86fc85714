"""Megatron's parallel linears without the bias that its one switch for all of them would give, and with those of experts."""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from megaswift.models.norm import shared_parameter


class UnbiasedColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel linear that never has a bias."""

    def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)


class UnbiasedRowParallelLinear(RowParallelLinear):
    """A row-parallel linear that never has a bias."""

    def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)


class ExpertRowParallelLinear(RowParallelLinear):
    """The last linear of an expert with biases, which Megatron (0.16.1) would change in place and sum over tp once more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # An expert's gradients are summed over its copies, the ranks of tp among them; this mark would sum them again.
        self.bias.sequence_parallel = False
        # Without this one only the first rank of tp counts it in the gradient norm; the weight has it.
        set_tensor_model_parallel_attributes(self.bias, True, 0, 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return (output, bias); Megatron's MLP adds to the output, and autograd forbids that to what a reduction hands on."""
        output, bias = super().forward(*args, **kwargs)
        return output.clone(), bias


class FewerProjectionsLinear(ColumnParallelLinear):
    """Megatron's linear of queries, keys and values without the rows of values, or of keys and values."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, absent: int, **kwargs: Any
    ) -> None:
        """`absent` is 1, or 2."""
        assert config.kv_channels is not None and config.num_query_groups is not None, "filled by the config"
        rows = absent * config.kv_channels * config.num_query_groups
        super().__init__(input_size, output_size - rows, config=config, **kwargs)


class WholeLinear(torch.nn.Module):
    """A linear without a bias that every rank of tp has whole, and applies to its part of the sequence."""

    def __init__(self, config: TransformerConfig, *, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.empty(outputs, inputs, dtype=config.params_dtype, device=torch.cuda.current_device())
        assert config.init_method is not None, "filled by the config"
        config.init_method(weight)
        self.weight = shared_parameter(weight, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., outputs] of [..., inputs]."""
        return torch.nn.functional.linear(x, self.weight)
