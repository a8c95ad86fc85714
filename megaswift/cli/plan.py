"""`megaswift plan`: the fastest layout that fits, before anything is started; why the others lost; what to type."""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megaswift.cli.help import sections_help
from megaswift.config.field import declared
from megaswift.config.parse import parse, split_flags, take_flags
from megaswift.config.plan import HardwareConfig, PlanConfig
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError
from megaswift.launch.profile import (
    HardwareProfile,
    choices_of,
    profile_here,
    profile_of_name,
    profile_of_partition,
)
from megaswift.metadata.hub import Files
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta, meta_from_config
from megaswift.planner.ask import Question, ask, beside_vllm, software_on
from megaswift.planner.costs import Costs
from megaswift.planner.explain import reasons
from megaswift.planner.flags import flags_of
from megaswift.planner.job import Job
from megaswift.planner.machine import GIGA, Machine
from megaswift.planner.plan import Plan, evaluate, memory_limit, rates
from megaswift.planner.rescue import nothing_fits
from megaswift.planner.search import Found
from megaswift.planner.software import Software
from megaswift.planner.trainable import search_runnable

HELP = """\
usage: megaswift plan --model MODEL [--gpu H100-80G --num_gpus 64] [--max_length 8192] [--global_batch_size 256]
                      [flags of `megaswift sft`] [flags below]

MODEL is a hub id, a folder or a config.json. Parallel flags that are given are kept; the others are chosen. Nothing is
started and nothing but the model's config is read.
"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A question, what was found, and the best plan again with FP8 GEMMs where nobody asked for them."""

    question: Question
    found: Found
    profile: HardwareProfile
    software: Software
    eight_bits: Plan | None
    refusals: tuple[str | None, ...]  # why `megaswift sft` cannot run a plan; one entry a plan

    @property
    def job(self) -> Job:
        """What is to be trained."""
        return self.question.job

    @property
    def machine(self) -> Machine:
        """What it is to be trained on."""
        return self.profile.machine

    @property
    def runnable(self) -> Plan | None:
        """The best plan that this version of megaswift can run."""
        pairs = zip(self.found.plans, self.refusals, strict=True)
        return next((plan for plan, refused in pairs if refused is None), None)


def run(argv: list[str]) -> int:
    """Run the command and return its exit code; raises UserError where nothing can be planned."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP + sections_help(PlanConfig()))
        return 0
    config, rest = take_flags(PlanConfig(), argv)
    settings = parse("rlhf" if "rlhf_type" in split_flags(rest) else "sft", rest).config
    answer = find_answer(config, settings, given=_given(rest))
    if config.answer.json:
        json.dump(as_json(answer), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        from megaswift.cli.plan_tables import show  # rich, which --json does not need

        show(answer, top=config.answer.top, model=settings.model.model or "")
    if config.answer.plot is not None:
        from megaswift.planner.picture import draw  # matplotlib, which nothing else needs

        best, path = answer.found.plans[0], Path(config.answer.plot)
        draw(best, answer.job, answer.machine, answer.software, path)
    return 0


def find_answer(config: PlanConfig, settings: RunConfig, *, given: frozenset[str]) -> Answer:
    """Return the plans for what the flags ask; raises UserError where nothing fits."""
    meta = read_model(settings)
    profile = find_hardware(config.hardware)
    profile = replace(profile, machine=beside_vllm(settings, profile.machine))
    machine, software = profile.machine, software_on(profile.device)
    question = ask(
        settings,
        meta,
        machine,
        given=given,
        precision=config.search.precision,
        document_len=config.search.document_length,
        offload=config.search.offload,
    )
    tried = search_runnable(question, settings, machine, software=software)
    found = tried.found
    if not found.plans:
        raise nothing_fits(question.job, machine, found, software=software, space=question.space)
    eight_bits = None
    narrow = next((name for name in ("mxfp8", "fp8") if name in machine.device.peak_flops), None)
    if config.search.precision == "auto" and narrow is not None:
        costs = Costs(question.job, machine, software)
        eight_bits = evaluate(costs, replace(found.plans[0].candidate, precision=narrow))
    return Answer(
        question=question,
        found=found,
        profile=profile,
        software=software,
        eight_bits=eight_bits,
        refusals=tried.refusals,
    )


def as_json(answer: Answer) -> dict[str, Any]:
    """Return an answer as plain values: bytes, seconds and flags."""
    job, machine = answer.job, answer.machine
    return {
        "model": {"parameters": job.parts.total, "layers": job.meta.num_layers},
        "job": {"max_length": job.max_length, "global_batch_size": job.global_batch, "trained": job.trained},
        "machine": {**asdict(machine), "origin": answer.profile.origin},
        "memory_limit_bytes": memory_limit(machine),
        "assumed": list(answer.question.assumed),
        "choices": [asdict(choice) for choice in choices_of(answer.profile)],
        "plans": [
            {**_plan_json(plan, job, machine), "refused": refused}
            for plan, refused in zip(answer.found.plans, answer.refusals, strict=True)
        ],
        "with_fp8": None if answer.eight_bits is None else _plan_json(answer.eight_bits, job, machine),
        "others": [asdict(reason) for reason in reasons(answer.found, machine)],
        "tried": answer.found.tried,
    }


def _plan_json(plan: Plan, job: Job, machine: Machine) -> dict[str, Any]:
    return {
        "candidate": asdict(plan.candidate),
        "dp": plan.candidate.layout.dp,
        "micro_batches": plan.candidate.micro_batches(job),
        "flags": flags_of(plan, job),
        "fits": plan.fits,
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "step_time_s": {**asdict(plan.time), "total": plan.time.total},
        **asdict(rates(plan, job, machine)),
    }


def read_model(settings: RunConfig) -> ModelMeta:
    """Return the facts about the model: of a config.json, a folder or an id; raises UserError."""
    model = settings.model.model
    if model is None:
        raise ConfigError("model is missing. Give --model with a hub id, a folder or a config.json.")
    path = Path(model).expanduser()
    if path.suffix == ".json":
        try:
            return meta_from_config(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"model={model} cannot be read as JSON: {error}.") from None
    return get_model_meta(
        model,
        revision=settings.model.model_revision,
        use_hf=settings.model.use_hf,
        trust_remote_code=settings.model.trust_remote_code,
        files=Files.FACTS,
        token=settings.model.hub_token,
    )


def find_hardware(asked: HardwareConfig) -> HardwareProfile:
    """Return the profile that the flags name; raises LaunchError."""
    if asked.partition is not None:
        from megaswift.launch import slurm  # subprocess

        known = slurm.partitions()
        partition = slurm.choose_partition(
            known, asked.partition, nodes=asked.nodes or 1, gpus=asked.gpus_per_node
        )
        profile = profile_of_partition(partition, nodes=asked.nodes)
    elif asked.gpu is None or asked.gpu.lower() == "cpu":
        none = () if asked.gpu is not None else None
        profile = profile_here(nodes=asked.nodes or 1, ranks=asked.num_gpus, gpus=none)
    else:
        profile = profile_of_name(
            asked.gpu, num_gpus=asked.num_gpus, nodes=asked.nodes, per_node=asked.gpus_per_node
        )
    device = profile.device
    if asked.network_gbit is not None:
        device = replace(device, network_bytes_s=asked.network_gbit / 8 * GIGA)
    if asked.gpu_memory_gib is not None:
        device = replace(device, memory_gib=asked.gpu_memory_gib)
    return replace(profile, machine=replace(profile.machine, device=device))


def _given(argv: list[str]) -> frozenset[str]:
    """Return the flags of `megaswift sft` that were written, by their first names."""
    names = {alias: one.flag for one in declared(RunConfig).values() for alias in (one.flag, *one.aliases)}
    return frozenset(names[name] for name in split_flags(argv) if name in names)
