"""What the device of this rank is, and what it can do."""

import importlib.util
import os
from dataclasses import dataclass
from datetime import timedelta

import torch

from megaswift.errors import ConfigError
from megaswift.platforms.gloo import share_gloo_devices


@dataclass(frozen=True, kw_only=True)
class Platform:
    """The device back end of one rank."""

    name: str  # "cuda" or "cpu"
    backend: str  # "nccl" or "gloo"
    device: torch.device
    transformer_engine: bool  # layers come from Transformer Engine's spec
    apex: bool  # apex's extension for fused gradient accumulation is there: apex itself may be built without
    fp8: bool  # compute capability 8.9 or newer, and Transformer Engine


def select_platform(name: str = "auto", *, local_rank: int = 0) -> Platform:
    """Return the platform `name` and make Megatron-Core ready for it.

    "auto" is cuda where torch sees a GPU, otherwise cpu. On a CPU this installs the redirection of
    platforms/cpu.py, once for the process. Raises ConfigError for cuda without a GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return _cuda(local_rank)
    from megaswift.platforms.cpu import (
        redirect_cuda_to_cpu,
    )  # imports Megatron-Core: seconds that a GPU rank need not pay

    redirect_cuda_to_cpu()
    return Platform(
        name="cpu",
        backend="gloo",
        device=torch.device("cpu"),
        transformer_engine=False,
        apex=False,
        fp8=False,
    )


def _cuda(local_rank: int) -> Platform:
    if not torch.cuda.is_available():
        raise ConfigError(
            "platform=cuda but torch sees no GPU. A CUDA build of torch and a visible device are needed; use --platform cpu here."
        )
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local_rank={local_rank} but this node shows {torch.cuda.device_count()} GPUs. Start one rank a GPU "
            "(--nproc_per_node), or check CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(local_rank)
    transformer_engine = importlib.util.find_spec("transformer_engine") is not None
    return Platform(
        name="cuda",
        backend="nccl",
        device=torch.device("cuda", local_rank),
        transformer_engine=transformer_engine,
        apex=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        fp8=transformer_engine and torch.cuda.get_device_capability(local_rank) >= (8, 9),
    )


def init_distributed(
    platform: Platform, *, rank: int, world_size: int, master: str, timeout_min: float
) -> None:
    """Join the world; every rank calls it. `master` is host:port of rank 0's store."""
    if platform.backend == "gloo" and world_size > 1 and master.split(":")[0] in ("127.0.0.1", "localhost"):
        # gloo asks the resolver for this host's name, which a laptop or a container may not know.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    share_gloo_devices()
    torch.distributed.init_process_group(
        platform.backend,
        init_method=f"tcp://{master}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=timeout_min),
    )
