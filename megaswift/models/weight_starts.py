"""Adapters that start from their weight: PiSSA (Meng et al. 2024, arXiv 2404.02948), OLoRA (Büyükakyüz 2024, arXiv 2406.01775) and
LoftQ (Li et al. 2023, arXiv 2310.08659).

PiSSA: W = U S V^T; the first R of each give B_0 = U sqrt(S / s), A_0 = sqrt(S / s) V^T (eqs. 2 and 3, with LoRA's scale s) and the
residual W - s B_0 A_0 (eq. 4). OLoRA: W = Q R; the first columns of Q are B_0, the first rows of R are A_0. What is trained is
then W - s B_0 A_0 + s B A. The residual is not formed: the base stays W, and the adapter is s (B A - B_0 A_0), in models/lora.py.

LoftQ: the base is Q, W in four bits, and s B_0 A_0 is the best approximation of W - Q, decomposed as PiSSA does (algorithm 1 with T = 1,
and peft's replace_lora_weights_loftq for s = 1; later rounds would quantise what no user of bitsandbytes gets from the file).
What is trained is Q + s B A. Its adapter belongs to a base in four bits, as any that was trained beside one.

Letters: D input size, F output size, R adapter rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megaswift.config.tuner import TunerConfig
from megaswift.errors import ConfigError
from megaswift.models.lora import AdaptedLinear
from megaswift.models.nf4 import quantisation_error, whole_weight


@torch.no_grad()
def start_from_weights(
    chunks: Sequence[torch.nn.Module], tuner: TunerConfig, *, device: torch.device, seed: int
) -> None:
    """Fill A, B and their starts from the weights, which are loaded, and for LoftQ not quantised yet; every rank of the world calls it.

    One rank of the copies of a linear decomposes it, on `device`. Raises ConfigError where a matrix has no such rank, or without
    bitsandbytes where it is needed.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, AdaptedLinear):
                _start(module, tuner, device, seed)


def _start(module: Any, tuner: TunerConfig, device: torch.device, seed: int) -> None:
    weight_FD = whole_weight(module).to(device)
    start_FD = quantisation_error(weight_FD, tuner) if tuner.init_weights == "loftq" else weight_FD
    whole_FD = gathered(module, start_FD.float(), dim=1 if module.lora_is_row else 0)
    rank, (outputs, inputs) = module.lora_a.weight.shape[0], whole_FD.shape
    if rank > min(outputs, inputs):
        raise ConfigError(
            f"init_weights={tuner.init_weights} has lora_rank={rank}, and a linear has at most rank {min(outputs, inputs)}. "
            "Choose a smaller --lora_rank."
        )
    a_RD, b_FR = whole_FD.new_empty(rank, inputs), whole_FD.new_empty(outputs, rank)
    if is_first(module):
        if tuner.init_weights == "olora":
            q_FK, r_KD = torch.linalg.qr(whole_FD)
            a_RD.copy_(r_KD[:rank]), b_FR.copy_(q_FK[:, :rank])
        else:
            a, b = principal_part(whole_FD, rank, iterations=tuner.pissa_iterations, seed=seed)
            root = module.lora_scale**-0.5
            a_RD.copy_(a * root), b_FR.copy_(b * root)
    share(module, a_RD, b_FR)
    if tuner.subtracts_start:
        keep_as_start(module)


def gathered(module: Any, shard: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Return a matrix that a linear's ranks of tensor parallelism have cut along `dim`; they all call it."""
    shards = [
        torch.empty_like(shard, memory_format=torch.contiguous_format)
        for _ in range(module.lora_group.size())
    ]
    dist.all_gather(shards, shard.contiguous(), group=module.lora_group)
    return torch.cat(shards, dim=dim)


def is_first(module: Any) -> bool:
    """Say whether this rank decides for all that hold a linear: a shard of it, or a copy."""
    return bool(module.lora_group.rank() == 0 and _copies(module).rank() == 0)


def share(module: Any, a_RD: torch.Tensor, b_FR: torch.Tensor) -> None:
    """Fill the adapter with the first rank's whole A and B, contiguous ones; all ranks that hold the linear call it.

    Vectors of a decomposition have no sign, and their last bits depend on the processor: no rank has its own.
    """
    group = module.lora_group
    for matrix in (a_RD, b_FR):
        dist.broadcast(matrix, group=_copies(module), group_src=0)
        dist.broadcast(matrix, group=group, group_src=0)
    own_a, own_b = (
        (part.chunk(group.size(), dim=cut)[group.rank()] if is_cut else part)
        for part, cut, is_cut in ((a_RD, 1, module.lora_is_row), (b_FR, 0, not module.lora_is_row))
    )
    module.lora_a.weight.copy_(own_a)
    module.lora_b.weight.copy_(own_b)


def keep_as_start(module: Any) -> None:
    """Let the adapter be nothing as it is now: what it is from here on is B A - B_0 A_0."""
    module.lora_a.start.copy_(module.lora_a.weight)
    module.lora_b.start.copy_(-module.lora_b.weight)


def _copies(module: Any) -> Any:
    """Return the group of ranks that hold the same shard of a linear."""
    if module.lora_is_expert:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def principal_part(
    weight_FD: torch.Tensor, rank: int, *, iterations: int | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [R, D] and B [F, R] whose product is the best approximation of rank R, each with a root of the singular values.

    With `iterations` the subspace is found by so many power iterations (Halko et al. 2009, algorithm 4.4; torch.svd_lowrank).
    """
    if iterations is None:
        u_FK, s_K, vt_KD = torch.linalg.svd(weight_FD, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            u_FK, s_K, v_DK = torch.svd_lowrank(weight_FD, q=rank, niter=iterations)
        vt_KD = v_DK.t()
    root_R = s_K[:rank].sqrt()
    return root_R[:, None] * vt_KD[:rank], u_FK[:, :rank] * root_R
