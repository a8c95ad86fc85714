"""Every plan passes Megatron-Core's own validation: 200 drawn models and clusters."""

import random

import pytest
import torch

from megaswift.config.parse import parse
from megaswift.config.run import RunConfig
from megaswift.mcore.configs import transformer_config
from megaswift.parallel.layout import Layout
from megaswift.planner.flags import flags_of
from megaswift.planner.job import Job
from megaswift.planner.plan import Plan
from megaswift.platforms.platform import Platform
from tests.harness.planning import MODELS, devices, found_for, golden_job

GPUS = ("H100", "A100-40G", "RTX4090", "GB200", "H200", "A100-PCIe-80G")
DRAWS = 200
# What a GPU rank with Transformer Engine says of itself; nothing is computed.
GPU_RANK = Platform(
    name="cuda", backend="nccl", device=torch.device("meta"), transformer_engine=True, apex=False, fp8=False
)
# Of the optimizer, of the base of adapters, or not built here.
NOT_A_CONFIG = {"optimizer_cpu_offload", "quant_method", "quant_bits", "fp8_format", "fp8_recipe"}


def run_of(plan: Plan, job: Job) -> RunConfig:
    """Return the run that a plan's flags ask for."""
    flags = {name: value for name, value in flags_of(plan, job).items() if name not in NOT_A_CONFIG}
    words = [word for name, value in flags.items() for word in (f"--{name}", *value.split())]
    return parse("sft", [*words, "--torch_dtype", "bfloat16", "--tuner_type", job.trained]).config


def draw(number: int) -> tuple[Job, str, int]:
    """Return a model with a batch, and a cluster."""
    random_state = random.Random(number)
    gpu = random_state.choice(GPUS)
    node = 72 if gpu == "GB200" else 8
    count = random_state.choice([1, 2, 4, 8, *(node * nodes for nodes in (2, 3, 8))])
    job = golden_job(
        random_state.choice(MODELS),
        seq_len=random_state.choice([1024, 4096, 8192, 32768]),
        global_batch=count * random_state.choice([1, 2, 8, 24]),
        trained=random_state.choice(["full", "full", "lora"]),
    )
    return job, gpu, count


@pytest.mark.parametrize("tens", range(DRAWS // 10))
def test_plans_construct_megatrons_config(tens: int) -> None:
    checked = 0
    for number in range(10 * tens, 10 * tens + 10):
        job, gpu, count = draw(number)
        for plan in found_for(job, devices(gpu, count)).plans[:5]:
            layout = plan.candidate.layout
            config = transformer_config(job.meta, run_of(plan, job), layout, GPU_RANK)
            assert config.tensor_model_parallel_size == layout.tp
            assert config.virtual_pipeline_model_parallel_size == (layout.vpp if layout.vpp > 1 else None)
            assert config.num_layers_in_first_pipeline_stage == layout.pp_first
            assert config.recompute_granularity == {"none": None}.get(
                plan.candidate.recompute, plan.candidate.recompute
            )
            checked += 1
    assert checked > 0, "nothing fits in ten draws: the draws are wrong"


def test_megatron_refuses_what_the_planner_never_emits() -> None:
    job = golden_job("llama-3.1-8b")
    plan = found_for(job, devices("H100", 8)).plans[0]
    broken = Layout(world=6, tp=2, pp=3, pp_first=5, sequence_parallel=True)  # 27 layers for two stages
    with pytest.raises(ValueError, match="divisible by"):
        transformer_config(job.meta, run_of(plan, job), broken, GPU_RANK)
