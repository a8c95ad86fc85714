"""`megaswift rollout`: the command lines of its servers, and which GPUs each gets; and what is said where vLLM is not."""

import importlib.util
from pathlib import Path

import pytest

from megaswift.cli.rollout import run, serve_command, shares_of_devices, surroundings
from megaswift.config.parse import take_flags
from megaswift.config.vllm import SamplerConfig, ServerConfig, VllmConfig
from megaswift.errors import ConfigError
from megaswift.rollout.vllm_colocated import ColocatedEngine
from tests.harness.tiny_run import make_tiny_run
from tests.unit.test_config_rules import dense


def command(words: str) -> list[str]:
    chosen, rest = take_flags(ServerConfig(), words.split())
    assert not rest
    return serve_command(chosen, dense(), port=8001)


def test_the_trainer_finds_what_it_needs() -> None:
    words = " ".join(command("--model m"))
    for wanted in (
        "--port 8001",
        "--host 127.0.0.1",
        "--worker-extension-cls megaswift.rollout.vllm_worker.WeightReceiver",
        "--logprobs-mode processed_logprobs",
        "--generation-config vllm",
        "--gpu-memory-utilization 0.9",
        f"--dtype {dense().dtype}",
        "--enable-prefix-caching",
    ):
        assert wanted in words
    assert surroundings([])["VLLM_SERVER_DEV_MODE"] == "1"


def test_flags_reach_vllm_in_its_own_words() -> None:
    words = " ".join(
        command(
            "--model m --vllm_tensor_parallel_size 2 --vllm_max_model_len 512 --vllm_enforce_eager true --torch_dtype float32 "
            '--vllm_enable_prefix_caching false --vllm_engine_kwargs {"kv_cache_memory_bytes":9,"async_scheduling":false}'
        )
    )
    for wanted in (
        "--tensor-parallel-size 2",
        "--max-model-len 512",
        "--enforce-eager",
        "--dtype float32",
        "--no-enable-prefix-caching",
        "--kv-cache-memory-bytes 9",
        "--no-async-scheduling",
    ):
        assert wanted in words


def test_a_server_takes_adapters_when_asked_to() -> None:
    assert "--enable-lora" not in command("--model m")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in surroundings([])
    words = " ".join(command("--model m --vllm_enable_lora true"))
    assert "--enable-lora --max-lora-rank 16" in words
    assert "--max-lora-rank 64" in " ".join(command("--model m --vllm_enable_lora true --vllm_max_lora_rank 40"))
    assert surroundings([], adapts=True)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_each_server_has_gpus_of_its_own() -> None:
    assert shares_of_devices(["4", "5", "6", "7"], 2, 2) == [["4", "5"], ["6", "7"]]
    assert shares_of_devices([], 2, 2) == [(), ()]
    assert surroundings(["4", "5"])["CUDA_VISIBLE_DEVICES"] == "4,5"
    with pytest.raises(ConfigError, match="is more than the 3 GPUs here"):
        shares_of_devices(["0", "1", "2"], 2, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--vllm_max_model_len 5", "model is not set"),
        ("--model m --prot 5", "--prot is no flag of `megaswift rollout`. Did you mean port"),
        ("--model m --vllm_max_num_seqs 0", "vllm_max_num_seqs=0 is too small"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(words.split())
    assert message in str(caught.value)


def test_without_vllm_one_is_told_where_to_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make_tiny_run(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vLLM is not installed here"):
        run(["--model", str(model)])
    with pytest.raises(ConfigError, match="start servers where it is with `megaswift rollout`"):
        ColocatedEngine(dense(), VllmConfig(), SamplerConfig(), dtype="float32", local_rank=0)
