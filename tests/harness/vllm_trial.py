"""vLLM itself against the embedded engine, in the environment that `make vllm` builds: prints what each says as JSON.

    python -m tests.harness.vllm_trial MODEL OTHER [--server URL]

Every engine gets the weights of MODEL, answers, gets those of OTHER, a model of the same shape, and answers again.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megaswift.config.vllm import SamplerConfig, VllmConfig
from megaswift.metadata.read import get_model_meta
from megaswift.rollout.engine import Prompt, RolloutEngine, Sampling
from megaswift.rollout.generate import EmbeddedEngine
from megaswift.rollout.vllm_colocated import ColocatedEngine
from megaswift.rollout.vllm_server import ServedEngine

ROOM, LONGEST, STOPS = 64, 12, tuple(range(20, 50))  # many stops, so that some completions end by themselves
GREEDY = Sampling(temperature=1.0, top_p=1.0, top_k=1, max_tokens=LONGEST, stop_ids=STOPS)
SAMPLED = Sampling(temperature=0.7, top_p=1.0, top_k=-1, max_tokens=LONGEST, stop_ids=STOPS)


def prompts() -> list[Prompt]:
    """Eight prompts of different lengths, three completions of each."""
    draws = np.random.default_rng(0)
    found = [draws.integers(50, 300, size=3 + 2 * number).astype(np.int32) for number in range(8)]
    return [Prompt(ids=ids, key=(7, number, copy)) for number, ids in enumerate(found) for copy in range(3)]


def weights_of(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    yield from load_file(model / "model.safetensors").items()


def said(engine: RolloutEngine, model: Path) -> dict[str, Any]:
    """Return the answers of an engine once it has the weights of a model, and how wrong its log-probabilities are."""
    engine.load(weights_of(model))
    greedy, sampled = (engine.complete(prompts(), sampling) for sampling in (GREEDY, SAMPLED))
    engine.rest()
    truth = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    faults = []
    for prompt, answer in zip(prompts(), sampled, strict=True):
        if answer.logps is None:
            continue
        ids = torch.tensor([*prompt.ids.tolist(), *answer.ids])
        with torch.no_grad():
            logits = truth(ids[None]).logits[0, len(prompt.ids) - 1 : -1] / SAMPLED.temperature
        mine = logits.log_softmax(-1).gather(1, ids[len(prompt.ids) :, None])[:, 0]
        faults.append(float((mine - torch.tensor(answer.logps)).abs().max()))
    return {
        "greedy": [(answer.ids, answer.stopped) for answer in greedy],
        "sampled": [(answer.ids, answer.stopped) for answer in sampled],
        "logp_fault": max(faults, default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs=2, type=Path)
    parser.add_argument("--server")
    given = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    meta = get_model_meta(given.models[0])
    vllm = VllmConfig(
        vllm_max_model_len=ROOM,
        vllm_enforce_eager=True,
        vllm_engine_kwargs={"kv_cache_memory_bytes": 2**27},
    )
    engines: dict[str, RolloutEngine] = {
        "embedded": EmbeddedEngine(meta, pad_id=0),
        "colocated": ColocatedEngine(meta, vllm, SamplerConfig(), dtype="float32", local_rank=0),
    }
    if given.server:
        engines["served"] = ServedEngine([given.server], timeout_s=300, room=ROOM, weights_port=None)
    found = {name: [said(engine, model) for model in given.models] for name, engine in engines.items()}
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
