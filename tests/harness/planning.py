"""Models, machines and jobs for tests of the planner."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from megaswift.launch.profile import profile_of_name
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import meta_from_config
from megaswift.planner.ask import software_on
from megaswift.planner.job import Job, job_of
from megaswift.planner.machine import Machine
from megaswift.planner.search import Found, Space, search

CONFIGS = Path(__file__).parent.parent / "golden" / "model_configs"
MODELS = sorted(path.stem for path in CONFIGS.glob("*.json"))


@cache
def golden_meta(name: str) -> ModelMeta:
    """Return the facts of one of the published configs."""
    content = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return meta_from_config(content.get("config", content))


def golden_job(name: str, *, seq_len: int = 4096, global_batch: int = 256, **job: Any) -> Job:
    """Return the job of training one of the published models."""
    return job_of(golden_meta(name), seq_len=seq_len, global_batch=global_batch, **job)


def devices(gpu: str, count: int) -> Machine:
    """Return so many GPUs in their usual nodes."""
    return profile_of_name(gpu, num_gpus=count).machine


def found_for(job: Job, machine: Machine, **space: object) -> Found:
    """Search with the software of the machine's devices."""
    return search(job, machine, software=software_on(machine.device), space=Space(**space))  # type: ignore[arg-type]
