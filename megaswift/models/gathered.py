"""Weights that are read without a call of the module that holds them."""

import torch


def gathered(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module when its weights are there: with overlap_param_gather Megatron's hook waits for them in a call only
    (megatron-core 0.16.1, distributed_data_parallel.py), and without one nobody would.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    return module
