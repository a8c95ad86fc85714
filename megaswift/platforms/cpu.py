"""Let Megatron-Core's own code run on CPU ranks: the one place where torch.cuda is redirected.

Megatron-Core 0.16-0.19 names torch.cuda in some 585 places. Every redirection below gives the call its CPU meaning and
says why it is needed; nothing is emulated that a CPU run does not reach. torch.cuda.is_available() stays False.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")


def redirect_cuda_to_cpu() -> None:
    """Install every redirection; a second call changes nothing."""
    if getattr(torch.cuda.current_device, "redirected", False):
        return
    _redirect_device()
    _redirect_factories()
    _redirect_random_state()
    _redirect_streams()
    _redirect_type_names()
    _fill_gaps_of_gloo()
    skip_compilation()


def _redirect_device() -> None:
    # `device=torch.cuda.current_device()` is how Megatron places buffers and weights.
    def current_device() -> torch.device:
        return CPU

    current_device.redirected = True  # type: ignore[attr-defined]  # the mark that makes a second call a no-op
    cuda: Any = torch.cuda
    cuda.current_device = current_device
    cuda.set_device = lambda device: None
    cuda.device_count = lambda: 1
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="cpu", total_memory=0, multi_processor_count=1, major=0, minor=0
    )
    cuda.get_device_capability = lambda device=None: (0, 0)
    # The optimizer reports memory at start (distrib_optimizer, bf16 path) and empties the cache between phases.
    cuda.memory_allocated = cuda.max_memory_allocated = cuda.memory_reserved = lambda device=None: 0
    cuda.empty_cache = cuda.synchronize = lambda device=None: None
    cuda.is_current_stream_capturing = lambda: False


def _redirect_factories() -> None:
    # `with torch.device(...)` knows the factories by identity and looks them up once: before they are replaced. Otherwise
    # transformers, which builds models on the meta device, would read weights into memory that nobody has set.
    _device_constructors()
    # Schedules, clip_grads and optimizers write torch.zeros(..., device="cuda").
    for name in (
        "empty",
        "zeros",
        "ones",
        "full",
        "tensor",
        "arange",
        "empty_like",
        "zeros_like",
        "ones_like",
        "rand",
        "randn",
        "randint",
    ):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    # optimizer.load_state_dict and offload paths write .to("cuda").
    original_to = torch.Tensor.to

    @functools.wraps(original_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        elif _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original_to(self, *args, **kwargs)

    tensor.to = to


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # pinned memory needs a CUDA driver
        return factory(*args, **kwargs)

    return create


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _redirect_random_state() -> None:
    # tensor_parallel.random keeps one "cuda" generator state a parallel region; on a CPU it is torch's own generator.
    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    original_seed = torch.random.default_generator.manual_seed
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: original_seed(int(seed))
    # torch.manual_seed calls manual_seed_all before it seeds the CPU generator itself: nothing to add.
    cuda.manual_seed_all = cuda.random.manual_seed_all = lambda seed: None

    import megatron.core.tensor_parallel.random as megatron_random  # after current_device is redirected

    # Its fork() warns when the CPU generator moved inside: here that is the one it forked.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.msg
    )
    # It reaches into torch.cuda.default_generators, which is empty here (0.16.1, tensor_parallel/random.py).
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )


class _Stream:
    """A stream on a device that runs everything in order; it also serves as the event."""

    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    wait_event = wait_stream

    def record(self, stream: Any = None) -> None:
        pass

    wait = record

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def _redirect_streams() -> None:
    # Pipeline p2p, the MoE dispatcher and overlapped gradient reduction order work with streams and events.
    cuda: Any = torch.cuda
    only = _Stream()
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: only
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.set_stream = lambda stream: None
    cuda.nvtx = SimpleNamespace(
        range_push=lambda message: 0,
        range_pop=lambda: 0,
        range=lambda message: contextlib.nullcontext(),
        mark=lambda message: None,
    )


def _redirect_type_names() -> None:
    # The optimizer sorts parameters by tensor.type() == "torch.cuda.FloatTensor" (optimizer.py, distrib_optimizer.py,
    # clip_grads.py; 0.16.1), so a dense CPU tensor has to answer with the CUDA name.
    original_type = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original_type(self, dtype, *args, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_  # type: ignore[assignment,method-assign]


def _fill_gaps_of_gloo() -> None:
    original_all_to_all = dist.all_to_all_single
    original_all_gather = dist.all_gather

    def all_to_all_single(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **kwargs: Any
    ) -> Any:
        # The MoE dispatcher hands tensors or numpy arrays; gloo wants lists of ints.
        return original_all_to_all(
            output, input, _ints(output_split_sizes), _ints(input_split_sizes), **kwargs
        )

    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        # gloo refuses shapes that differ between ranks (expert tensor parallelism gathers unequal token counts).
        if len({piece.shape for piece in tensor_list}) == 1:
            return original_all_gather(tensor_list, tensor, group=group, async_op=async_op)
        rows = max(piece.shape[0] for piece in tensor_list)
        padded = [tensor.new_empty(rows, *tensor.shape[1:]) for _ in tensor_list]
        original_all_gather(
            padded,
            torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])]),
            group=group,
        )
        for piece, source in zip(tensor_list, padded, strict=True):
            piece.copy_(source[: piece.shape[0]])
        return None

    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> None:
        # The transpose of the above: gloo has no reduce_scatter for unequal pieces.
        total = torch.cat([piece.reshape(-1) for piece in input_list])
        dist.all_reduce(total, op=op, group=group)
        output.copy_(
            total.split([piece.numel() for piece in input_list])[dist.get_rank(group)].view_as(output)
        )

    dist.all_to_all_single = all_to_all_single
    dist.all_gather = all_gather
    dist.reduce_scatter = reduce_scatter


def _ints(sizes: Any) -> list[int] | None:
    return None if sizes is None else [int(size) for size in sizes]


def skip_compilation() -> None:
    """Make torch.compile leave functions as they are; called before Megatron-Core is imported it saves a third of the start.

    Megatron-Core decorates small fused functions with it. On a CPU each would cost a C++ build and win nothing, and the
    decorator alone imports the compiler: 3 of 11 CPU seconds until the first step (torch 2.13, one rank).
    """
    torch.compile = _as_it_is  # type: ignore[assignment]
    if "torch._dynamo" in sys.modules:  # what was decorated before
        sys.modules["torch._dynamo"].config.disable = True


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    return (lambda decorated: decorated) if function is None else function
