"""What stands in place of the output layer: the head of a reward model or a classifier, or nothing, for embeddings.

Letters: S sequence, B batch, D model size, O scores of a token.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


def score_head(config: Any, *, outputs: int, seed: int) -> "ScoreHead | HiddenStates":
    """Return a head of so many scores; none leaves the hidden states as they are."""
    return ScoreHead(config, outputs=outputs, seed=seed) if outputs else HiddenStates(config)


class HiddenStates(torch.nn.Module):
    """Gives every tensor-parallel rank the hidden states of all tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._gathers = bool(config.sequence_parallel)

    def forward(self, hidden_SBD: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Return (states [S, B, D], no bias), as Megatron's output layer does; hidden_SBD is [S/tp, B, D] in sequence parallel."""
        if self._gathers:
            # All tp ranks compute the same from all tokens: the gradient is only split, not summed.
            hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=False)
        return hidden_SBD, None

    def sharded_state_dict(self, prefix: str = "", *_: Any, **__: Any) -> dict[str, ShardedObject]:
        """Return an empty object in place of the weight that Megatron asks every output layer for (language_module.py, 0.16.1)."""
        return {f"{prefix}weight": ShardedObject(f"{prefix}weight", None, (1,), (0,))}


class ScoreHead(torch.nn.Module):
    """A linear layer D -> O that every tensor-parallel rank holds whole and computes alike.

    Initialised from N(0, 1 / (D + 1)): Stiennon et al. 2020 (arXiv 2009.01325), appendix B.1. The numbers depend on the seed alone.
    """

    def __init__(self, config: Any, *, outputs: int, seed: int) -> None:
        super().__init__()
        weight = torch.randn(outputs, config.hidden_size, generator=torch.Generator().manual_seed(seed))
        weight = weight / math.sqrt(config.hidden_size + 1)
        self.weight = torch.nn.Parameter(weight.to(config.params_dtype))
        self._states = HiddenStates(config)

    def forward(self, hidden_SBD: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Return (scores [S, B, O], no bias)."""
        return F.linear(self._states(hidden_SBD)[0], self.weight), None
