"""Whether this project can run a plan: its flags go through the rules of `megaswift sft`."""

from megaswift.config.parse import parse
from megaswift.config.rules import resolve
from megaswift.errors import ConfigError
from megaswift.planner.flags import flags_of
from megaswift.planner.job import Job
from megaswift.planner.machine import Machine
from megaswift.planner.plan import Plan


def refusal(plan: Plan, job: Job, machine: Machine) -> str | None:
    """Return why `megaswift sft` would refuse the plan's flags; None where it takes them."""
    words = [word for name, value in flags_of(plan, job).items() for word in (f"--{name}", *value.split())]
    words += [
        "--tuner_type",
        job.trained,
        "--max_length",
        str(job.max_length),
        "--torch_dtype",
        DTYPES[_plain(plan)],
    ]
    try:
        config = parse("sft", ["--model", "planned", "--dataset", "planned.jsonl", *words]).config
        resolve(
            config, job.meta, machine.num_devices, "cpu" if machine.device.generation == "cpu" else "cuda"
        )
    except ConfigError as error:
        return str(error)
    return None


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _plain(plan: Plan) -> str:
    return plan.candidate.precision if plan.candidate.precision in DTYPES else "bf16"
