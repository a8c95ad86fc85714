"""Whether this project can run a plan: its flags go through the rules of `megaswift sft`, beside the run's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from megaswift.config.parse import with_flags
from megaswift.config.rules import resolve
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError
from megaswift.metadata.meta import ModelMeta
from megaswift.planner.ask import Question
from megaswift.planner.flags import flags_of
from megaswift.planner.job import Job
from megaswift.planner.machine import Machine
from megaswift.planner.plan import Plan
from megaswift.planner.search import Found, search
from megaswift.planner.software import Software

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Axes that models and settings forbid as a whole (config/context_rules.py, layout_rules.py): where rules refuse all of the
# best plans, what is found without them is the next best.
WITHOUT: tuple[dict[str, object], ...] = ({}, {"cp": 1}, {"pp": 1}, {"cp": 1, "pp": 1})


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What a search found, and why rules refuse a plan or not, one entry a plan."""

    found: Found
    refusals: tuple[str | None, ...]

    @property
    def best(self) -> Plan | None:
        """The best plan that can run."""
        pairs = zip(self.found.plans, self.refusals, strict=True)
        return next((plan for plan, refused in pairs if refused is None), None)


def search_runnable(
    question: Question,
    run: RunConfig,
    machine: Machine,
    *,
    software: Software,
    flags: Callable[[Plan, Job], dict[str, str]] = flags_of,
) -> Tried:
    """Search, and where rules refuse all of the best plans, search again without the axes that some of them forbid.

    `flags` are those of a plan that go to the run. Where nothing that is found can run, the answer is the first search's.
    """
    job, space = question.job, question.space
    first: Tried | None = None
    for axes in WITHOUT:
        one = replace(space, fixed={**axes, **space.fixed})
        found = search(job, machine, software=software, space=one)
        plans = tuple((plan, flags(plan, job)) for plan in found.plans)
        tried = Tried(
            found=found, refusals=tuple(refusal(run, plan, some, job, machine) for plan, some in plans)
        )
        first = first or tried
        if tried.best is not None:
            return tried
        if not first.found.plans:
            break
    assert first is not None, WITHOUT
    return first


def refusal(run: RunConfig, plan: Plan, flags: Mapping[str, str], job: Job, machine: Machine) -> str | None:
    """Return why `megaswift sft` would refuse a run with the plan's flags; None where it takes them.

    A run that no layout would save is judged by the planner's flags alone: its own error is told by who starts it.
    """
    own = _without_layout(run, plan, job)
    if _broken_rule(own, job.meta, machine) is not None:
        plain = RunConfig()
        plain = replace(plain, tuner=replace(plain.tuner, tuner_type=job.trained))
        own = _without_layout(plain, plan, job)
    elif "global_batch_size" not in flags:
        own = replace(own, training=run.training)
    return _broken_rule(
        with_flags(own, {name: value.split() for name, value in flags.items()}), job.meta, machine
    )


def _without_layout(run: RunConfig, plan: Plan, job: Job) -> RunConfig:
    """Return a run in which every rank is a replica, with what the plan takes for granted where the run does not say it."""
    dtype = run.model.torch_dtype or DTYPES.get(plan.candidate.precision, "bfloat16")
    length = run.data.max_length or (None if run.data.packing_length else job.max_length)
    return replace(
        run,
        model=replace(run.model, model=run.model.model or "planned", torch_dtype=dtype),
        data=replace(run.data, dataset=run.data.dataset or ["planned.jsonl"], max_length=length),
        training=replace(run.training, global_batch_size=None, gradient_accumulation_steps=None),
        parallel=replace(
            run.parallel, tp=1, pp=1, vpp=None, cp=1, ep=1, etp=None, pp_first=None, pp_last=None
        ),
    )


def _broken_rule(run: RunConfig, meta: ModelMeta, machine: Machine) -> str | None:
    try:
        resolve(run, meta, machine.num_devices, "cpu" if machine.device.generation == "cpu" else "cuda")
    except ConfigError as error:
        return str(error)
    return None
