"""Muon for the layers' matrices and AdamW for all else.

Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982, for weight decay and the factor s.
With the gradient G, the momentum M and the rate of weight decay w:

    M <- mu M + (1 - mu) G
    W <- (1 - lr w) W - lr s O,    O = U V^T of M = U S V^T, or of mu M + (1 - mu) G with Nesterov

A Newton-Schulz iteration finds O, roughly: its singular values lie about 1. Both papers add G where this adds (1 - mu) G, which
changes no O. The matrices are those of Megatron-Core 0.16.1 (optimizer/muon.py), whose own step needs a package that is not on
PyPI.

Letters: M rows, N columns of a matrix.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megaswift.checkpoint.state import model_tensors
from megaswift.config.muon import MuonConfig
from megaswift.training.adamw import AdamWForTheRest

TINY = 1e-7  # below which a norm is that of no direction (torch 2.13, optim/_muon.py)
# (a, b, c) of x <- a x + b x^3 + c x^5 on the singular values, step by step.
COEFFICIENTS = {
    "simple": [(3.4445, -4.7750, 2.0315)],  # Jordan et al. 2024
    # leloykun.github.io/ponder/muon-opt-coeffs, as modded-nanogpt (train_gpt_medium.py) has them
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix:
    """A weight, and how it lies on the ranks."""

    weight: torch.Tensor  # as the optimizer steps it: the float32 master where there is one
    dim: int | None = None  # along which it is cut
    group: Any = None  # over these ranks
    widths: tuple[int, ...] = ()  # of a fused qkv: the rows of a key/value group that are of one matrix


class MuonAdamW(AdamWForTheRest):
    """Steps Megatron's parameter groups; of `matrices` those that it has by Muon.

    Where it `deals`, ranks with the same weights share out the matrices: each keeps the momenta of its own, and sends their
    updates to the others. Every rank of these groups and of tp calls step().
    """

    def __init__(
        self, groups: list[dict[str, Any]], matrices: Sequence[Matrix], chosen: MuonConfig, *, deals: bool
    ) -> None:
        super().__init__(groups, [matrix.weight for matrix in matrices])
        self.chosen = chosen
        self.matrices = {one.weight: one for one in matrices if one.weight in self.apart}
        # States that no copy of a weight has but its owner's: checkpoint/state.py.
        self.dealt_states = ("momentum_buffer",) if deals else ()
        self.owners: dict[torch.Tensor, int] = {}
        for group in groups if deals else []:
            own = [weight for weight in group["params"] if weight in self.matrices]
            self.owners |= share_out(own, ranks=_copies(group).size())
        for group in groups:
            for weight in group["params"]:
                if weight in self.matrices and self._steps(group, weight):
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight, dtype=torch.float32)

    def step_apart(self, pairs: list[tuple[dict[str, Any], torch.Tensor]]) -> None:
        """Step matrices; an update takes the place of its gradient, which nobody reads any more."""
        for group, weight in pairs:
            if self._steps(group, weight):
                assert weight.grad is not None, "the base class chose those with one"
                weight.grad.copy_(self._update(weight, weight.grad.float()))
        for group, weight in pairs:
            if self.owners:
                dist.broadcast(weight.grad, group=_copies(group), group_src=self.owners[weight])
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(weight.grad, alpha=-group["lr"])

    def _steps(self, group: dict[str, Any], weight: torch.Tensor) -> bool:
        return not self.owners or self.owners[weight] == _copies(group).rank()

    def _update(self, weight: torch.Tensor, grad_MN: torch.Tensor) -> torch.Tensor:
        """Return s O of this rank's part of a matrix; every rank of tp calls it, and their momenta go round."""
        momentum_MN = self.state[weight]["momentum_buffer"]
        momentum_MN.lerp_(grad_MN, 1 - self.chosen.muon_momentum)
        if self.chosen.muon_use_nesterov:
            momentum_MN = grad_MN.lerp(momentum_MN, self.chosen.muon_momentum)
        matrix = self.matrices[weight]
        if matrix.dim is None or self.chosen.muon_tp_mode == "blockwise":
            return self._scaled(momentum_MN, matrix.widths)
        ranks = matrix.group.size()
        parts = [torch.empty_like(momentum_MN) for _ in range(ranks)]
        dist.all_gather(parts, momentum_MN.contiguous(), group=matrix.group)
        # A rank of linear_fc1 has [gate; up] of its own, so that the gathered rows are in another order than one rank's.
        # O only takes the same order: U V^T of P M is P U V^T for a permutation P.
        whole_MN = self._scaled(torch.cat(parts, dim=matrix.dim), matrix.widths)
        return whole_MN.chunk(ranks, dim=matrix.dim)[matrix.group.rank()]

    def _scaled(self, x_MN: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        if widths:
            grouped = x_MN.unflatten(0, (-1, sum(widths))).split(widths, dim=1)
            return torch.cat(
                [
                    self._scaled(part.flatten(0, 1), ()).unflatten(0, (-1, width))
                    for part, width in zip(grouped, widths, strict=True)
                ],
                dim=1,
            ).flatten(0, 1)
        chosen = self.chosen
        precision = chosen.muon_fp32_matmul_prec if x_MN.is_cuda else "highest"
        stages = COEFFICIENTS[chosen.muon_coefficient_type]
        stages = stages * (chosen.muon_num_ns_steps // len(stages))
        return (
            orthogonal(x_MN, stages, precision=precision)
            * size_of_update(*x_MN.shape, mode=chosen.muon_scale_mode)
            * chosen.muon_extra_scale_factor
        )


def orthogonal(
    x_MN: torch.Tensor, stages: Sequence[tuple[float, float, float]], *, precision: str = "highest"
) -> torch.Tensor:
    """Return about U V^T of x = U S V^T, float32, by one Newton-Schulz step for each (a, b, c); zeros stay zeros.

    `precision` is that of torch.set_float32_matmul_precision, but that "medium" multiplies bfloat16 on any device.
    """
    is_tall = x_MN.shape[0] > x_MN.shape[1]
    x_MN = x_MN.t() if is_tall else x_MN
    x_MN = x_MN / x_MN.norm().clamp_min(TINY)
    with _matmul_precision(precision):
        x_MN = x_MN.bfloat16() if precision == "medium" else x_MN
        for a, b, c in stages:
            gram_MM = x_MN @ x_MN.t()
            x_MN = torch.addmm(x_MN, torch.addmm(gram_MM, gram_MM, gram_MM, beta=b, alpha=c), x_MN, beta=a)
    return (x_MN.t() if is_tall else x_MN).float()


def size_of_update(rows: int, cols: int, *, mode: str) -> float:
    """Return what an orthogonal matrix is multiplied by: config/muon.py has the sources."""
    if mode == "spectral":
        return sqrt(max(rows, cols))
    ratio = rows / cols
    return sqrt(max(1.0, ratio) if mode == "shape_scaling" else ratio)


def share_out(weights: Iterable[torch.Tensor], *, ranks: int) -> dict[torch.Tensor, int]:
    """Return the rank of each weight, so that all have about as many elements: the largest first, each to who has least."""
    loads, owners = [0] * ranks, {}
    for weight in sorted(weights, key=torch.Tensor.numel, reverse=True):
        owners[weight] = loads.index(min(loads))
        loads[owners[weight]] += weight.numel()
    return owners


def layer_matrices(chunks: Iterable[Any], *, split_qkv: bool) -> list[Matrix]:
    """Return the matrices of decoder layers (CausalLM) that train: linears, routers and adapters, each of every expert."""
    return [matrix for chunk in chunks for matrix in _of_chunk(chunk, split_qkv=split_qkv)]


def _of_chunk(chunk: Any, *, split_qkv: bool) -> Iterator[Matrix]:
    # How a weight is cut is read from what a checkpoint says of it: marks on the weight itself are wrong where Transformer
    # Engine's linears leave communication to the experts' dispatcher.
    sharded = {id(one.data): one for one in model_tensors([chunk]).values()}
    for name, parameter in chunk.named_parameters():
        if "decoder.layers." not in name or parameter.ndim != 2 or not parameter.requires_grad:
            continue
        one = sharded[id(parameter)]
        shard: Any = one.build()[0] if isinstance(one, ShardedTensorFactory) else one
        whole = shard.global_shape[shard.prepend_axis_num :]
        cut = [dim for dim, (size, own) in enumerate(zip(whole, parameter.shape, strict=True)) if size != own]
        group = (
            parallel_state.get_expert_tensor_parallel_group()
            if ".experts." in name
            else parallel_state.get_tensor_model_parallel_group()
        )
        assert all(whole[dim] == parameter.shape[dim] * group.size() for dim in cut) and len(cut) < 2, name
        is_qkv = name.endswith("self_attention.linear_qkv.weight")
        yield Matrix(
            weight=getattr(parameter, "main_param", parameter),
            dim=cut[0] if cut else None,
            group=group,
            widths=_widths(chunk.get_submodule(name.removesuffix(".linear_qkv.weight")), whole[0])
            if is_qkv and split_qkv
            else (),
        )


def _widths(attention: Any, rows: int) -> tuple[int, ...]:
    """Return the rows of queries, of their gates, of keys and of values in one key/value group, of those that there are."""
    config = attention.config
    queries = config.num_attention_heads // config.num_query_groups
    heads, rest = divmod(rows, config.num_query_groups * config.kv_channels)
    of_queries = [queries] * (2 if config.attention_output_gate else 1)
    assert rest == 0 and 0 <= heads - sum(of_queries) <= 2, (rows, heads, of_queries)
    return tuple(width * config.kv_channels for width in (*of_queries, *[1] * (heads - sum(of_queries))))


def _copies(group: dict[str, Any]) -> Any:
    """Return the ranks that hold the same weights of a parameter group."""
    if group["is_expert_parallel"]:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


@contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
