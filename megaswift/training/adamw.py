"""AdamW for all parameters but some, which have a step of their own."""

from collections.abc import Iterable
from typing import Any

import torch


class AdamWForTheRest(torch.optim.AdamW):
    """Steps Megatron's parameter groups, of which a subclass steps those of the weights `apart` that it has."""

    def __init__(self, groups: list[dict[str, Any]], apart: Iterable[torch.Tensor]) -> None:
        super().__init__(groups)
        own = {parameter for group in groups for parameter in group["params"]}
        self.apart = dict.fromkeys(weight for weight in apart if weight in own)  # a set that keeps its order
        for weight in self.apart:
            self.state[weight] = {}  # so that a checkpoint finds its float32 master

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loss is computed
        """Step all parameters; those apart are hidden from AdamW's own step."""
        assert closure is None, "Megatron gives none"
        hidden = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.apart and parameter.grad is not None:
                    hidden.append((group, parameter, parameter.grad))
                    parameter.grad = None
        super().step()
        for _, parameter, gradient in hidden:
            parameter.grad = gradient
        self.step_apart([(group, parameter) for group, parameter, _ in hidden])

    def step_apart(self, pairs: list[tuple[dict[str, Any], torch.Tensor]]) -> None:
        """Step weights, which have their gradients, by the settings of their groups."""
        raise NotImplementedError
