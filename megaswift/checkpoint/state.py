"""What a checkpoint keeps of a run, under names that depend on the model alone.

Weights have Megatron's names. Optimizer tensors are named "optimizer.<state>.<weight>": "master" is the float32 copy of a
bfloat16 or float16 weight, "exp_avg", "exp_avg_sq" and "momentum_buffer" are torch's. A rank of the distributed optimizer
holds a flat range of a weight; the range is cut into boxes, which are shards like any other. So a checkpoint is written
without gathering anything, and can be read under another layout, with or without the distributed optimizer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

STARTS = (".lora_a.start", ".lora_b.start")  # of adapters that do not start at zero: models/weight_starts.py
RENEWED_EVERY = "renewed_every"  # updates until the state of a parameter group begins anew: training/lisa.py
STATES = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
EVERY_STATE = tuple(name for names in STATES.values() for name in names)  # Muon's are some of both


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangular part of a tensor, and where its elements begin in the flat range it was cut from."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int


def model_tensors(chunks: Sequence[Any]) -> dict[str, ShardedBase]:
    """Return the sharded weights of this rank's chunks (CausalLM): all of them, or those that train, with adapters' starts.

    Buffers that are saved with a model belong to it as long as all of it trains. Transformer Engine's FP8 history is left
    out: it is rebuilt within some steps.
    """
    tensors: dict[str, ShardedBase] = {}
    for number, chunk in enumerate(chunks):
        # Megatron stacks the same parameter of all layers into one tensor, unless each has a name of its own.
        names = {} if chunk.layers_alike else {"non_homogeneous_layers": True}
        for name, value in chunk.sharded_state_dict(metadata=names).items():
            if isinstance(value, ShardedTensor | ShardedTensorFactory) and (
                chunk.all_trains or value.data.requires_grad or name.endswith(STARTS)
            ):
                tensors[f"{number}.{name}"] = _whatever_its_padding(name, value)
    return tensors


def _whatever_its_padding(name: str, value: ShardedBase) -> ShardedBase:
    """Return an attention matrix such that a layout with more or fewer padded heads reads it too.

    Padded heads come last and are zero (parallel/layout.py, padded_kv_heads); Megatron leaves out what is too much and fills
    with zeros what is missing, as it does for the padding of the vocabulary.
    """
    if isinstance(value, ShardedTensor) and {"linear_qkv", "linear_proj"} & set(name.split(".")):
        return replace(value, allow_shape_mismatch=True)
    return value


def optimizer_tensors(optimizer: Any, model: dict[str, ShardedBase]) -> dict[str, ShardedBase]:
    """Return the sharded state of Megatron's `optimizer` for the weights `model`, as views of the state itself."""
    tensors: dict[str, ShardedBase] = {}
    for name, weight in model.items():
        parameter: Any = weight.data
        owned = owned_by(optimizer, parameter) if parameter.requires_grad else None
        if owned is None:
            continue
        shards = weight.build() if isinstance(weight, ShardedTensorFactory) else [weight]
        for state, flat in owned.states.items():
            held = replace(owned, alone=owned.alone or state in owned.dealt)
            for number, shard in enumerate(_pieces(shards, parameter, held, flat, f"optimizer.{state}")):
                tensors[f"{state}.{name}.{number}"] = shard
    return tensors


def states_of_the_rank(optimizer: Any) -> dict[str, ShardedBase]:
    """Return this rank's random states, and its optimizer's state in subspaces of its shards; only the same layout can use them."""
    states: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    own: dict[str, Any] = {"random": states}
    subspaces = [part.low_rank_states() for part in _in_subspaces(optimizer)]
    if subspaces:
        own["subspaces"] = subspaces
    world, rank = (dist.get_world_size(),), (dist.get_rank(),)
    return {name: ShardedObject(name, value, world, rank) for name, value in own.items()}


def restore_states_of_the_rank(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Set what states_of_the_rank() returned."""
    states = loaded["random"]
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    for part, subspace in zip(_in_subspaces(optimizer), loaded.get("subspaces", ()), strict=True):
        part.load_low_rank_states(subspace)


def _in_subspaces(optimizer: Any) -> list[Any]:
    """Return the optimizers that keep some state in subspaces: training/galore.py."""
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    return [one for one in inner if hasattr(one, "low_rank_states")]


def allocate_states(optimizer: Any, *, updates: int) -> None:
    """Give an optimizer that has not stepped yet its state tensors, so that they can be read into."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:
            continue
        config, names = part.config, _moments(part.config)
        host = part.optimizer if isinstance(part.optimizer, HybridDeviceOptimizer) else None
        for inner in host.sub_optimizers if host else [part.optimizer]:
            counts_by_tensor = isinstance(inner, torch.optim.Adam)  # AdamW is one too
            for group in inner.param_groups:
                done = updates % group[RENEWED_EVERY] if RENEWED_EVERY in group else updates
                for parameter in group["params"]:
                    if parameter in getattr(inner, "apart", ()):  # has its own state from the start
                        continue
                    state = inner.state[parameter]
                    for name in names:
                        state[name] = torch.zeros_like(parameter, dtype=torch.float32)
                    if counts_by_tensor:
                        state["step"] = torch.tensor(float(done), device=parameter.device)
                if config.optimizer == "adam" and not counts_by_tensor:
                    group["step"] = done  # apex and Transformer Engine count in the group
        if host:
            host._sync_sub_optimizers_state_to_hdo()


def renew_host_copies(optimizer: Any) -> None:
    """Let an optimizer in host memory take over the float32 weights that were read; it reads masters of others in place."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            for weight, copy in part.optimizer.param_to_inner_param.items():
                if copy is not weight and weight.dtype is torch.float32:
                    copy.data.copy_(weight.data)


def loss_scale(optimizer: Any) -> dict[str, float] | None:
    """Return float16's dynamic loss scale and its counters; None in other precisions."""
    scaler = getattr(optimizer.chained_optimizers[0], "grad_scaler", None)
    if scaler is None:
        return None
    return {name: float(value) for name, value in scaler.state_dict().items()}


def restore_loss_scale(optimizer: Any, stored: dict[str, float] | None) -> None:
    """Set what loss_scale() returned."""
    for part in optimizer.chained_optimizers:
        scaler = getattr(part, "grad_scaler", None)
        if scaler is not None and stored:
            counters = {name: int(value) for name, value in stored.items()}
            scaler.load_state_dict({**counters, "scale": torch.tensor([stored["scale"]])})


def local_bytes(tensors: dict[str, ShardedBase]) -> int:
    """Return the bytes of the shards that this rank answers for."""
    total = 0
    for value in tensors.values():
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and is_main_replica(value.replica_id):
            total += value.data.numel() * value.data.element_size()
    return total


@dataclass(frozen=True, kw_only=True)
class Owned:
    """The part of a weight whose optimizer state lives on this rank: a range of its flat elements."""

    start: int
    stop: int
    alone: bool  # no data-parallel replica holds the same range
    dealt: tuple[str, ...] = ()  # states that no replica has either
    states: dict[str, torch.Tensor]  # flat, stop - start elements each


def owned_by(optimizer: Any, parameter: torch.Tensor) -> Owned | None:
    """Return what this rank holds of the optimizer's state of a parameter; None: nothing."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:
            continue
        if isinstance(part, DistributedOptimizer):
            if parameter not in part.model_param_gbuf_map:
                continue
            buffer, dtype, bucket = part.model_param_gbuf_map[parameter]
            held = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
            group, order = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][order]
            return Owned(start=held.start, stop=held.end, alone=True, states=_states(part, parameter, main))
        # Float16OptimizerWithFloat16Params keeps the master beside its weight; the float32 optimizer has none.
        main = getattr(parameter, "main_param", parameter)
        if main in part.optimizer.state:
            states, dealt = _states(part, parameter, main), getattr(part.optimizer, "dealt_states", ())
            return Owned(start=0, stop=parameter.numel(), alone=False, states=states, dealt=dealt)
    return None


def state_names(optimizer: Any, parameter: torch.Tensor) -> tuple[str, ...]:
    """Return the names of the state tensors that some rank holds of a parameter."""
    moments = _moments(optimizer.chained_optimizers[0].config)
    return moments if parameter.dtype is torch.float32 else (*moments, "master")


def _moments(config: Any) -> tuple[str, ...]:
    return STATES[config.optimizer] if config.optimizer != "sgd" or config.sgd_momentum else ()


def _states(part: Any, parameter: torch.Tensor, main: torch.Tensor) -> dict[str, torch.Tensor]:
    state = part.optimizer.state[main]
    tensors = {name: state[name] for name in EVERY_STATE if name in state}
    if parameter.dtype is not torch.float32:
        # An optimizer in host memory has the weight itself in its groups, and the master in its state.
        tensors["master"] = state.get("master_param", main).detach()
    return {name: tensor.view(-1) for name, tensor in tensors.items()}


def _pieces(
    shards: list[ShardedTensor], parameter: torch.Tensor, owned: Owned, flat: torch.Tensor, prefix: str
) -> Iterator[ShardedTensor]:
    """Yield the shards of one state tensor, for the owned range of a weight that consists of `shards`."""
    for shard in shards:
        data: Any = shard.data
        assert data.is_contiguous(), f"{shard.key} is cut along a dim that is not its first"
        first = data.storage_offset() - parameter.storage_offset()  # of the shard in the flat weight
        start, stop = max(owned.start, first), min(owned.stop, first + data.numel())
        replica: Any = shard.replica_id
        if owned.alone:  # Megatron's replica ids end with the data-parallel rank
            replica = (*replica[:-1], 0)
        for box in boxes(tuple(data.shape), start - first, stop - first):
            begin = start - owned.start + box.start
            piece = flat[begin : begin + prod(box.size)]
            prepended = shard.prepend_axis_num
            size = (1,) * prepended + box.size
            own_offset = (0,) * prepended + box.offset
            yield ShardedTensor(
                key=f"{prefix}.{shard.key}",
                data=piece.view(size),
                dtype=piece.dtype,
                local_shape=size,
                global_shape=shard.global_shape,
                global_offset=tuple(a + b for a, b in zip(shard.global_offset, own_offset, strict=True)),
                axis_fragmentations=None,  # boxes of several ranks need not form a grid
                replica_id=replica,
                allow_shape_mismatch=shard.allow_shape_mismatch,
            )


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut the flat range [start, stop) of a row-major tensor into the fewest boxes, in flat order."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [Box(offset=(start,), size=(stop - start,), start=0)]
    row = prod(shape[1:])
    found: list[Box] = []
    position = start
    while position < stop:
        index, inside = divmod(position, row)
        whole_rows = (stop - position) // row
        if inside == 0 and whole_rows:
            found.append(
                Box(
                    offset=(index, *[0] * (len(shape) - 1)),
                    size=(whole_rows, *shape[1:]),
                    start=position - start,
                )
            )
            position += whole_rows * row
            continue
        end = min(stop, (index + 1) * row)
        found += [
            Box(offset=(index, *part.offset), size=(1, *part.size), start=position - start + part.start)
            for part in boxes(shape[1:], inside, end - index * row)
        ]
        position = end
    return found
