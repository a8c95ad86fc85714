"""The head of a reward model or a classifier: a few numbers for every token, in place of the output layer.

Letters: S sequence, B batch, D model size, O scores of a token.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


class ScoreHead(torch.nn.Module):
    """A linear layer D -> O that every tensor-parallel rank holds whole and computes alike.

    Initialised from N(0, 1 / (D + 1)): Stiennon et al. 2020 (arXiv 2009.01325), appendix B.1. The numbers depend on the seed alone.
    """

    def __init__(self, config: Any, *, outputs: int, seed: int) -> None:
        super().__init__()
        weight = torch.randn(outputs, config.hidden_size, generator=torch.Generator().manual_seed(seed))
        weight = weight / math.sqrt(config.hidden_size + 1)
        self.weight = torch.nn.Parameter(weight.to(config.params_dtype))
        self._gathers = bool(config.sequence_parallel)

    def forward(self, hidden_SBD: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Return (scores [S, B, O], no bias), as Megatron's output layer does; hidden_SBD is [S/tp, B, D] in sequence parallel."""
        if self._gathers:
            # All tp ranks compute the same from all tokens: the gradient is only split, not summed.
            hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=False)
        return F.linear(hidden_SBD, self.weight), None
