"""Settings: completions by vLLM, beside the trainer or behind HTTP."""

from dataclasses import dataclass, field
from typing import Any

from megaswift.config.field import setting
from megaswift.config.model import ModelConfig

CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Who writes the completions, and what becomes of the difference between his probabilities and the trainer's."""

    use_vllm: bool = setting(False, "let vLLM write the completions; default: the trained model by itself")
    vllm_mode: str = setting(
        "colocate",
        "vLLM inside the ranks of the trainer, on the same devices, or behind HTTP, started by `megaswift rollout`",
        choices=("colocate", "server"),
    )
    vllm_server_host: list[str] = setting(["127.0.0.1"], "machine of each server")
    vllm_server_port: list[str] = setting(["8000"], "its port; prompts are dealt to all servers")
    vllm_server_base_url: list[str] = setting([], "http://host:port of each server, instead of the two")
    vllm_server_timeout: float = setting(240.0, "seconds to wait until the servers are up, a teacher's too")
    vllm_server_group_port: int | None = setting(
        None, "port of rank 0 from which the servers fetch the weights; default: any that is free"
    )
    sleep_level: int = setting(
        0,
        "what vLLM gives up while the trainer trains: 1 its cache, with the weights in host memory, 2 both (colocate, GPUs)",
    )
    offload_model: bool = setting(
        False, "keep the trainer's weights in host memory while completions are written"
    )
    offload_optimizer: bool = setting(False, "keep the optimizer's state in host memory meanwhile")
    rollout_importance_sampling_mode: str | None = setting(
        None,
        "weight each token, or each completion, by its probability under the trainer / under vLLM: at most the threshold, or 0 "
        "above it; none: only log how they differ (ms-swift's default); default: token_truncate, none for loss_type real",
        choices=CORRECTIONS,
    )
    rollout_importance_sampling_threshold: float = setting(2.0, "the greatest such weight")


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """How vLLM runs."""

    vllm_gpu_memory_utilization: float | None = setting(
        None,
        "share of the memory of its device that vLLM may fill; default: 0.9 in a server, 0.3 beside the trainer",
    )
    vllm_tensor_parallel_size: int = setting(1, "devices that share one copy of the model")
    vllm_max_model_len: int | None = setting(
        None, "tokens of a prompt with its completion; default: --max_length, or what the model allows"
    )
    vllm_max_num_seqs: int | None = setting(None, "completions at a time; default: vLLM's")
    vllm_enable_prefix_caching: bool = setting(True, "compute what prompts have in common once")
    vllm_enforce_eager: bool = setting(
        False, "run without compiled graphs: slower, but ready sooner and in less memory"
    )
    vllm_enable_lora: bool = setting(
        False,
        "send vLLM the base model once, and before each generation the adapters alone: less to send, and nothing is rounded by merging",
    )
    vllm_max_lora_rank: int | None = setting(
        None, "the greatest rank of adapters that a server takes; default: 16"
    )
    vllm_engine_kwargs: dict[str, Any] = setting(
        {}, 'further arguments of vLLM\'s engine: {"kv_cache_memory_bytes": 1073741824}'
    )


@dataclass(frozen=True, kw_only=True)
class AddressConfig:
    """Where the servers of `megaswift rollout` listen."""

    host: str = setting(
        "127.0.0.1",
        "address to listen on. Whoever reaches it can replace the weights: keep it to this machine or a private network",
    )
    port: int = setting(8000, "port of the first server; those of others follow")
    vllm_data_parallel_size: int = setting(
        1, "servers, each with GPUs of its own: name all ports to the trainer", aliases=("num_servers",)
    )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The flags of `megaswift rollout`."""

    address: AddressConfig = field(default_factory=AddressConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
