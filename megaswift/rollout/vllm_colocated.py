"""vLLM inside the ranks of the trainer as a RolloutEngine: they share devices, and weights move without leaving them.

Each rank holds one worker. `vllm_tensor_parallel_size` neighbouring ranks form an engine: they are given the same prompts and
schedule them alike (vLLM calls this an external launcher). vLLM uses the world of torch.distributed that is there and makes
groups of its own.
"""

import importlib.util
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megaswift.config.vllm import SamplerConfig, VllmConfig
from megaswift.config.vllm_rules import BESIDE_THE_TRAINER, room_for_rank
from megaswift.errors import ConfigError
from megaswift.launch.environment import vllm_logging_level
from megaswift.metadata.meta import ModelMeta
from megaswift.rollout.engine import ADAPTER, Answer, Prompt, Sampling, Weights, seed_of


class ColocatedEngine:
    """This rank's part of an engine."""

    def __init__(
        self,
        meta: ModelMeta,
        chosen: VllmConfig,
        sampler: SamplerConfig,
        *,
        dtype: str,
        local_rank: int,
        trust_remote_code: bool = False,
        tells_experts: bool = False,
        lora_rank: int = 0,
    ) -> None:
        """Start vLLM without weights; every rank of the world calls it. Raises ConfigError.

        With a `lora_rank` it will answer with an adapter, of at most this rank, beside the weights.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "use_vllm=true with vllm_mode=colocate needs vLLM beside this program, and it is not installed. Install vllm, or "
                "start servers where it is with `megaswift rollout` and give --vllm_mode server."
            )
        self._level, self._has_cache, self.adapts = sampler.sleep_level, True, lora_rank > 0
        share = chosen.vllm_gpu_memory_utilization
        arguments = {
            "model": str(meta.folder),
            "dtype": dtype,
            "load_format": "dummy",  # the trainer's weights follow
            "distributed_executor_backend": "external_launcher",
            "tensor_parallel_size": chosen.vllm_tensor_parallel_size,
            "gpu_memory_utilization": BESIDE_THE_TRAINER if share is None else share,
            "max_model_len": chosen.vllm_max_model_len,
            "enable_prefix_caching": chosen.vllm_enable_prefix_caching,
            "enforce_eager": chosen.vllm_enforce_eager,
            "enable_sleep_mode": self._level > 0,
            "logprobs_mode": "processed_logprobs",  # of the distribution that is drawn from
            "skip_tokenizer_init": True,
            "worker_extension_cls": "megaswift.rollout.vllm_worker.WeightReceiver",
            "trust_remote_code": trust_remote_code,
            "seed": 0,  # alike on the ranks of an engine; every request has its own
            **({} if chosen.vllm_max_num_seqs is None else {"max_num_seqs": chosen.vllm_max_num_seqs}),
            **({"enable_return_routed_experts": True} if tells_experts else {}),
            **({"enable_lora": True, "max_lora_rank": room_for_rank(lora_rank)} if lora_rank else {}),
            **chosen.vllm_engine_kwargs,
        }
        # vLLM reads these when it starts; the address of the world, which exists already, it only looks for.
        surroundings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "RANK": str(dist.get_rank()),
            "LOCAL_RANK": str(local_rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            "VLLM_LOGGING_LEVEL": vllm_logging_level(),
        }
        with _trainer_untouched(), _environment(surroundings):
            self._llm = _start(arguments)
        _forget_names()

    def load(self, weights: Weights, adapter: str | None = None) -> None:
        """Copy the weights into vLLM's own parameters, or take an adapter."""
        if not self._has_cache:
            torch.cuda.empty_cache()  # what the trainer's allocator keeps for itself is not there for vLLM's
            self._llm.wake_up(tags=["weights"])
        if adapter is None:
            self._llm.collective_rpc("megaswift_take", args=(weights,))
        else:
            try:
                self._llm.collective_rpc("megaswift_adapt", args=(adapter, weights))
            except ValueError as error:  # of its checks: modules that it adapts under other names, or not at all
                raise ConfigError(
                    f"vLLM does not take the adapter: {error}. Leave out --vllm_enable_lora, and it gets merged weights."
                ) from error
        self._llm.reset_prefix_cache()

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """Return one completion of each prompt; all ranks of an engine call it alike."""
        from vllm import SamplingParams  # an optional package
        from vllm.lora.request import LoRARequest

        if not self._has_cache:
            self._llm.wake_up(tags=["kv_cache"])
            self._has_cache = True
        settings = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=max(sampling.top_k, 0),
                max_tokens=sampling.max_tokens,
                repetition_penalty=sampling.repetition_penalty,
                stop_token_ids=list(sampling.stop_ids),
                seed=seed_of(prompt),
                logprobs=0,  # of no token beside the one that was drawn
                detokenize=False,
            )
            for prompt in prompts
        ]
        asked = [{"prompt_token_ids": prompt.ids.tolist()} for prompt in prompts]
        adapter = LoRARequest(ADAPTER, 1, ADAPTER) if self.adapts else None  # it is there: no path is read
        found = self._llm.generate(asked, settings, use_tqdm=False, lora_request=adapter)
        return [_answer(one.outputs[0]) for one in found]

    def rest(self) -> None:
        """Give up what --sleep_level says."""
        if self._level:
            self._llm.sleep(level=self._level)
            self._has_cache = False


def _answer(output: Any) -> Answer:
    ids = list(output.token_ids)
    logps = [each[token].logprob for each, token in zip(output.logprobs, ids, strict=True)]
    experts = getattr(output, "routed_experts", None)  # vLLM 0.14 or later, on the first rank of an engine
    return Answer(ids=ids, stopped=output.finish_reason == "stop", logps=logps, experts=experts)


def _start(arguments: dict[str, Any]) -> Any:
    from vllm import LLM  # an optional package, and seconds to import

    try:
        llm = LLM(**arguments)
    except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"vLLM does not start: {error}. Its settings are the --vllm_... flags; --vllm_mode server runs it elsewhere."
        ) from error
    # vLLM 0.32 (v1/engine/core_client.py) destroys the world of torch.distributed when its engine ends, which is the trainer's here.
    ending = getattr(llm.llm_engine.engine_core, "_finalizer", None)
    if ending is not None:
        ending.detach()
    return llm


def _forget_names() -> None:
    """Take the names off the shared memory of vLLM's groups, which all ranks have opened: it goes with the last of them.

    On CPUs vLLM 0.32 gives that of every engine in a trainer's ranks the same names (distributed/device_communicators/cpu_communicator.py),
    and does not start where some have stayed.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    name = getattr(getattr(group.device_communicator, "dist_module", None), "group_name", None)
    if name is not None:
        Path("/dev/shm", f"{name.lstrip('/')}_{group.rank_in_group}").unlink(missing_ok=True)


@contextmanager
def _trainer_untouched() -> Iterator[None]:
    """Put back what vLLM changes of the process while it starts: random states, and on CPUs how many threads torch uses."""
    states, threads, set_threads = (
        (random.getstate(), np.random.get_state()),
        torch.get_num_threads(),
        torch.set_num_threads,
    )
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_num_threads = set_threads
    torch.set_num_threads(threads)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for as long as vLLM starts: later ones mean something to this program."""
    before = dict(os.environ)
    os.environ.update(values)
    yield
    for name in values:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
