"""Megatron's optimizer that keeps its state in host memory, with what it lacks for float32 weights and for CPU ranks."""

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


class OffloadedOptimizer(HybridDeviceOptimizer):
    """HybridDeviceOptimizer as of 0.16-0.19."""

    def __init__(self, params: Any, **settings: Any) -> None:
        groups = list(params)
        for group in groups:
            for param in group["params"]:
                if not param.is_leaf:
                    # The distributed optimizer's shard of a float32 weight is a view that autograd follows, which torch
                    # takes as a parameter only if it keeps its gradient; detached it would be another tensor.
                    param.retain_grad()
        super().__init__(groups, **settings)

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple[Any, ...]:
        """Return the groups that are stepped on the host, those that are not, and which weight each copy belongs to.

        Upstream tells the two apart by `param.is_cuda`, of which a CPU rank has none, and then finds no copy to update.
        There the copy is one more tensor in the same memory.
        """
        if torch.cuda.is_available():
            return tuple(super()._get_sub_optimizer_param_groups(offload_fraction))
        left = offload_fraction * sum(
            param.numel() for group in self.param_groups for param in group["params"]
        )
        groups: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        copies: dict[torch.Tensor, torch.Tensor] = {}
        masters: dict[torch.Tensor, torch.Tensor] = {}
        for group in self.param_groups:
            stepped: dict[bool, list[torch.Tensor]] = {True: [], False: []}
            for param in group["params"]:
                on_host = left > 0
                inner = param.detach().clone() if on_host else param
                left -= param.numel()
                if self.param_update_in_fp32 and param.dtype is not torch.float32:
                    inner = masters[param] = param.detach().float()
                if on_host:
                    copies[param] = inner
                stepped[on_host].append(inner)
            for on_host, params in stepped.items():
                if params:
                    groups[on_host].append({**group, "params": params})
        return groups[True], groups[False], copies, {inner: param for param, inner in copies.items()}, masters

    def _set_sub_optimizer_grads(self) -> None:
        super()._set_sub_optimizer_grads()
        # Upstream forgets float32 weights that are not offloaded: their gradient is where only the copies' is looked for.
        for param, inner in self.param_to_inner_param.items():
            if inner is param:
                param.grad = getattr(param, "decoupled_grad", param.grad)
