"""Megatron's parallel linears without the bias that its one switch for all of them would give, and with those of experts."""

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig


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


class QueryKeyLinear(ColumnParallelLinear):
    """Megatron's linear of queries, keys and values for layers whose values are their keys: it has no rows of values."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        assert config.kv_channels is not None and config.num_query_groups is not None, "filled by the config"
        values = config.kv_channels * config.num_query_groups
        super().__init__(input_size, output_size - values, config=config, **kwargs)
