"""`megaswift rollout`: start vLLM servers that write completions for a trainer and take their weights from it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from megaswift.cli.help import sections_help
from megaswift.config.parse import take_flags
from megaswift.config.vllm import ServerConfig
from megaswift.config.vllm_rules import IN_A_SERVER, SERVER_LORA_RANK, check_engine, room_for_rank
from megaswift.errors import ConfigError, nearest
from megaswift.launch.devices import num_gpus
from megaswift.launch.environment import visible_gpus
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta

USAGE = """\
usage: megaswift rollout --model MODEL [flags below]

Starts vLLM servers and stays until they end. `megaswift rlhf --rlhf_type grpo --use_vllm true --vllm_mode server` then lets them
write its completions, and sends them its weights before each generation: no file is written.
"""
WORKERS = "megaswift.rollout.vllm_worker.WeightReceiver"


def run(argv: list[str]) -> int:
    """Run the command and return the exit code of the first server that ends; raises UserError."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE + sections_help(ServerConfig()))
        return 0
    chosen, rest = take_flags(ServerConfig(), argv)
    if rest:
        flags = [name for section in (chosen.address, chosen.model, chosen.vllm) for name in vars(section)]
        raise ConfigError(
            f"{rest[0]} is no flag of `megaswift rollout`.{nearest(rest[0].lstrip('-'), flags)}"
        )
    if chosen.model.model is None:
        raise ConfigError("model is not set. Name a folder or a hub id with --model.")
    if chosen.model.new_special_tokens:
        raise ConfigError(
            "new_special_tokens is not for servers. Make a folder that has them with `megaswift export --model M "
            "--new_special_tokens ... --output_dir FOLDER`, and name it with --model."
        )
    check_engine(chosen.vllm)
    meta = get_model_meta(
        chosen.model.model,
        revision=chosen.model.model_revision,
        use_hf=chosen.model.use_hf,
        trust_remote_code=chosen.model.trust_remote_code,
    )
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here. Install vllm in this environment.")
    number = chosen.address.vllm_data_parallel_size
    if number < 1:
        raise ConfigError(f"vllm_data_parallel_size={number} is too small. Give 1 or more.")
    gpus = visible_gpus(os.environ) or [str(place) for place in range(num_gpus())]
    devices = shares_of_devices(gpus, number, chosen.vllm.vllm_tensor_parallel_size)
    servers = [
        subprocess.Popen(
            serve_command(chosen, meta, port=chosen.address.port + place),
            env={**os.environ, **surroundings(own, adapts=chosen.vllm.vllm_enable_lora)},
        )
        for place, own in enumerate(devices)
    ]
    return _wait(servers)


def serve_command(chosen: ServerConfig, meta: ModelMeta, *, port: int) -> list[str]:
    """Return the command line of one server; its flags are those of vLLM 0.32, and much older."""
    vllm = chosen.vllm
    share = vllm.vllm_gpu_memory_utilization
    words: list[str | int | float] = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        str(meta.folder),
    ]
    words += ["--host", chosen.address.host, "--port", port, "--worker-extension-cls", WORKERS]
    words += ["--logprobs-mode", "processed_logprobs"]  # of the distribution that is drawn from
    words += ["--generation-config", "vllm"]  # nothing of the model's own generation_config.json
    words += ["--tensor-parallel-size", vllm.vllm_tensor_parallel_size]
    words += ["--gpu-memory-utilization", IN_A_SERVER if share is None else share]
    words += ["--dtype", chosen.model.torch_dtype or meta.dtype]  # left alone, vLLM makes 16 bits of float32
    words += ["--enable-prefix-caching" if vllm.vllm_enable_prefix_caching else "--no-enable-prefix-caching"]
    if vllm.vllm_max_model_len is not None:
        words += ["--max-model-len", vllm.vllm_max_model_len]
    if vllm.vllm_max_num_seqs is not None:
        words += ["--max-num-seqs", vllm.vllm_max_num_seqs]
    if vllm.vllm_enforce_eager:
        words += ["--enforce-eager"]
    if vllm.vllm_enable_lora:
        rank = vllm.vllm_max_lora_rank or SERVER_LORA_RANK
        words += ["--enable-lora", "--max-lora-rank", room_for_rank(rank)]
    if chosen.model.trust_remote_code:
        words += ["--trust-remote-code"]
    for name, value in vllm.vllm_engine_kwargs.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag if value else "--no-" + flag[2:]]
        else:
            words += [flag, value if isinstance(value, (str, int, float)) else json.dumps(value)]
    return [str(word) for word in words]


def surroundings(devices: Sequence[str], *, adapts: bool = False) -> dict[str, str]:
    """Return the environment of a server on these GPUs, or on none."""
    # The trainer calls methods of the workers, empties the cache of prompts, and changes the adapter.
    own = {"VLLM_SERVER_DEV_MODE": "1", **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if adapts else {})}
    return {**own, "CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else own


def shares_of_devices(gpus: Sequence[str], servers: int, size: int) -> list[Sequence[str]]:
    """Return the GPUs of each server: `size` each, none on a machine without; raises ConfigError where there are too few."""
    if not gpus:
        return [()] * servers
    if servers * size > len(gpus):
        raise ConfigError(
            f"vllm_data_parallel_size={servers} times vllm_tensor_parallel_size={size} is more than the {len(gpus)} GPUs here. "
            "Lower one."
        )
    return [gpus[place * size : place * size + size] for place in range(servers)]


def _wait(servers: list[subprocess.Popen[bytes]]) -> int:
    """Wait until one server ends, end the others, and return its code; what asks this process to end asks them."""

    def end(number: int, frame: FrameType | None) -> None:
        for server in servers:
            server.terminate()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    pid, status = os.waitpid(-1, 0)
    end(signal.SIGTERM, None)
    for server in servers:
        if server.pid != pid:
            server.wait()
    return os.waitstatus_to_exitcode(status)
