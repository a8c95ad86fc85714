"""Spread attention on gloo ranks against its definition in float64, and the bytes that it sends."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megaswift.kernels.context_attention.index import rank_tokens
from megaswift.kernels.context_attention.ops import Keys, context_attention
from megaswift.kernels.context_attention.plan import make_plan
from megaswift.kernels.context_attention.reference import attention
from megaswift.kernels.context_attention.segments import Pattern
from tests.harness.distributed import run_distributed


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One pack and one way to spread it."""

    lengths: tuple[int, ...]
    ring: int = 1
    inner: int = 1
    keys: Keys = Keys.RING
    heads: int = 4
    groups: int = 2
    key_size: int = 8
    value_size: int = 8
    causal: bool = True
    window: int | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def pattern(self) -> Pattern:
        """Who sees whom."""
        return Pattern(causal=self.causal, window=self.window, scale=self.key_size**-0.5)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What one rank computed and sent."""

    tensors: dict[str, Any]  # numpy: pipes carry it without sharing memory
    forward_bytes: int
    backward_bytes: int


def make_inputs(case: AttentionCase) -> dict[str, torch.Tensor]:
    """Return the whole pack's inputs and the gradient of the output, float32 or as the case says."""
    tokens, generator = sum(case.lengths), torch.Generator().manual_seed(len(case.lengths))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    made = {
        "query": random(tokens, case.heads, case.key_size),
        "key": random(tokens, case.groups, case.key_size),
        "value": random(tokens, case.groups, case.value_size),
        "grad": random(tokens, case.heads, case.value_size),
    }
    return {**made, "sinks": random(case.heads)} if case.sinks else made


def spread_worker(rank: int, world_size: int, cases: list[AttentionCase]) -> list[Spread]:
    """Compute every case on this rank; cp is the whole world."""
    made: dict[tuple[int, int], tuple[Any, Any]] = {}
    results = []
    for case in cases:
        shape = (case.ring, case.inner)
        if shape not in made:
            made[shape] = _groups(rank, *shape)
        results.append(_spread(case, rank, *made[shape]))
    return results


def _groups(rank: int, ring: int, inner: int) -> tuple[Any, Any]:
    """Return the ring group and the inner group of `rank`; every rank makes all of them."""
    rings = [
        dist.new_group([ring_rank * inner + place for ring_rank in range(ring)]) for place in range(inner)
    ]
    inners = [
        dist.new_group([ring_rank * inner + place for place in range(inner)]) for ring_rank in range(ring)
    ]
    return rings[rank % inner] if ring > 1 else None, inners[rank // inner] if inner > 1 else None


def _spread(case: AttentionCase, rank: int, ring_group: Any, inner_group: Any) -> Spread:
    plan = make_plan(case.lengths, ring=case.ring, inner=case.inner)
    tokens = rank_tokens(plan, rank, torch.device("cpu"))
    inputs = make_inputs(case)
    local = {name: x[tokens] if name != "sinks" else x for name, x in inputs.items()}
    leaves = {name: x.requires_grad_() for name, x in local.items() if name != "grad"}
    with count_bytes() as forward:
        out = context_attention(
            leaves["query"], leaves["key"], leaves["value"], plan, pattern=case.pattern,
            ring_group=ring_group, inner_group=inner_group, keys=case.keys, sinks_H=leaves.get("sinks"),
        )  # fmt: skip
    with count_bytes() as backward:
        grads = torch.autograd.grad(out, list(leaves.values()), local["grad"])
    tensors = {
        "out": out.detach(),
        **{f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)},
    }
    return Spread(
        tensors={name: x.float().numpy() for name, x in tensors.items()},
        forward_bytes=sum(forward),
        backward_bytes=sum(backward),
    )


@contextmanager
def count_bytes() -> Iterator[list[int]]:
    """Collect the bytes that this rank sends to other ranks."""
    sent: list[int] = []
    shift, gather, exchange = dist.batch_isend_irecv, dist.all_gather_into_tensor, dist.all_to_all_single

    def counted_shift(operations: list[Any]) -> Any:
        sent.extend(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return shift(operations)

    def counted_gather(output: torch.Tensor, tensor: torch.Tensor, **options: Any) -> Any:
        sent.append(output.nbytes - tensor.nbytes)
        return gather(output, tensor, **options)

    def counted_exchange(output: torch.Tensor, tensor: torch.Tensor, **options: Any) -> Any:
        ranks = dist.get_world_size(options["group"])
        sent.append(tensor.nbytes // ranks * (ranks - 1))
        return exchange(output, tensor, **options)

    with (
        patch.object(dist, "batch_isend_irecv", counted_shift),
        patch.object(dist, "all_gather_into_tensor", counted_gather),
        patch.object(dist, "all_to_all_single", counted_exchange),
    ):
        yield sent


@functools.lru_cache(maxsize=256)
def true_attention(case: AttentionCase) -> dict[str, torch.Tensor]:
    """Return output and gradients of the whole pack, float64."""
    inputs = {name: x.double() for name, x in make_inputs(case).items()}
    grad = inputs.pop("grad")
    for x in inputs.values():
        x.requires_grad_()
    out = attention(
        inputs["query"], inputs["key"], inputs["value"], list(case.lengths), case.pattern, inputs.get("sinks")
    )
    grads = torch.autograd.grad(out, list(inputs.values()), grad)
    return {"out": out.detach(), **{f"grad {name}": x for name, x in zip(inputs, grads, strict=True)}}


def errors(cases: list[AttentionCase]) -> list[dict[str, float]]:
    """Return, for every case, the largest errors, relative to the largest value (at least 1)."""
    ranks = {case.ring * case.inner for case in cases}
    (world_size,) = ranks
    per_rank = run_distributed(spread_worker, world_size, cases)
    found = []
    for place, case in enumerate(cases):
        plan = make_plan(case.lengths, ring=case.ring, inner=case.inner)
        truth = true_attention(replace(case, ring=1, inner=1, keys=Keys.RING))
        whole = {name: torch.zeros_like(x) for name, x in truth.items()}
        for rank in range(world_size):
            for name, x in per_rank[rank][place].tensors.items():
                rows = slice(None) if name == "grad sinks" else rank_tokens(plan, rank, torch.device("cpu"))
                whole[name][rows] += torch.from_numpy(x).double()
        found.append(
            {
                name: float((whole[name] - x).abs().max() / x.abs().max().clamp_min(1.0))
                if x.numel()
                else 0.0
                for name, x in truth.items()
            }
        )
    return found
