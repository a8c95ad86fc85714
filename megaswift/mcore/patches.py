"""The one door for patches of Megatron-Core itself; each states its reason and ends where the upstream fault ends."""

import torch
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer, optimizer_config
from megatron.core.transformer import attention, multi_latent_attention
from megatron.core.transformer.moe import moe_utils

from megaswift.mcore.offload import OffloadedOptimizer
from megaswift.mcore.rotary import apply_rotary


def apply_patches() -> None:
    """Apply every patch that this version of Megatron-Core still needs; a second call changes nothing."""
    _define_missing_te_gemm()
    _deny_missing_te_linear()
    _turn_in_one_pass()
    _offload_float32_too()


def _define_missing_te_gemm() -> None:
    # 0.16.1: without Transformer Engine moe_utils never defines te_general_gemm, which RouterGatingLinearFunction tests
    # against None (transformer/moe/moe_utils.py, the import guard names it only in its first branch).
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _deny_missing_te_linear() -> None:
    # 0.16.1: importing Transformer Engine's wrappers succeeds without it, so that HAVE_TE is true, but they are no classes
    # and isinstance(module, TELinear) fails (transformer/multi_latent_attention.py); 0.19 asks the wrappers' own HAVE_TE.
    if not isinstance(getattr(multi_latent_attention, "TELinear", None), type):
        multi_latent_attention.HAVE_TE = False


def _turn_in_one_pass() -> None:
    # 0.16-0.19: without Transformer Engine a query is copied several times to be turned, in the type of the weights.
    attention.apply_rotary_pos_emb = apply_rotary


def _offload_float32_too() -> None:
    # The reasons are in mcore/offload.py; both modules have bound the class by name.
    optimizer.HybridDeviceOptimizer = distrib_optimizer.HybridDeviceOptimizer = OffloadedOptimizer
    if not torch.cuda.is_available():
        # 0.16-0.19: the settings compare Transformer Engine's version where there is none.
        optimizer_config.is_te_min_version = lambda version: False
