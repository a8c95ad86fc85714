"""The layout of a run that names none: the planner chooses it for the devices there are."""

from dataclasses import dataclass, replace

from megaswift.config.parse import with_flags
from megaswift.config.run import RunConfig
from megaswift.config.training_rules import DEFAULT_GLOBAL_BATCH
from megaswift.errors import LaunchError
from megaswift.launch.profile import profile_here
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout
from megaswift.planner.ask import Question, ask, beside_vllm, software_on
from megaswift.planner.costs import Costs
from megaswift.planner.flags import flags_of
from megaswift.planner.job import Candidate, Job
from megaswift.planner.machine import GIB, Machine
from megaswift.planner.plan import Plan, memory_limit
from megaswift.planner.rescue import nothing_fits
from megaswift.planner.trainable import search_runnable

USUAL_LENGTH = 4096  # tokens of a sample that is planned for where nobody says how long samples are
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
OVERLAP = {"overlap_grad_reduce", "overlap_param_gather"}  # the same numbers, sooner; gloo does not overlap


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the planner adds to a run: flags of `megaswift sft`, and one line that says why."""

    flags: dict[str, str]
    note: str

    def words(self, given: frozenset[str]) -> list[str]:
        """Return the flags as they are typed, but for those that the user has `given`."""
        return [word for name, values in self._others(given).items() for word in (f"--{name}", *values)]

    def adopt(self, run: RunConfig, given: frozenset[str]) -> RunConfig:
        """Return `run` with the flags set, but for those that the user has `given`."""
        settled = with_flags(run, self._others(given))
        return replace(settled, launch=replace(settled.launch, auto_layout=False))

    def _others(self, given: frozenset[str]) -> dict[str, list[str]]:
        return {name: value.split() for name, value in self.flags.items() if name not in given}


def choose_layout(run: RunConfig, meta: ModelMeta, machine: Machine) -> Chosen | None:
    """Return the fastest layout that fits; None where the user has named one (launch.auto_layout).

    Micro batch, dtype and what else was said are kept. Raises LaunchError where no layout fits the memory of the GPUs, or
    none that fits can run; on processors, whose memory is shared with who knows what, the run is left as it is.
    """
    if not run.launch.auto_layout:
        return None
    machine = beside_vllm(run, machine)
    on_cpu = machine.device.generation == "cpu"
    question, software = _question(run, meta, machine), software_on(machine.device)
    job = question.job
    left_out = {"micro_batch_size"}  # is as the run says
    if on_cpu or not run.parallel.use_distributed_optimizer:
        left_out |= OVERLAP
    if run.training.gradient_accumulation_steps is not None:
        left_out.add("global_batch_size")

    def flags(plan: Plan, job: Job) -> dict[str, str]:
        return {name: value for name, value in flags_of(plan, job).items() if name not in left_out}

    tried = search_runnable(question, run, machine, software=software, flags=flags)
    found, plan = tried.found, tried.best
    if plan is None:
        if on_cpu:
            return None
        if not found.plans:
            raise nothing_fits(job, machine, found, software=software, space=question.space)
        raise LaunchError(
            f"{len(found.plans)} layouts fit {machine.num_devices} x {machine.device.name} and none of them can run. The "
            f"fastest: {tried.refusals[0]}"
        )
    sizes = plan.candidate.layout
    axes = {"dp": sizes.dp, "tp": sizes.tp, "pp": sizes.pp, "cp": sizes.cp, "ep": sizes.ep}
    assumed = run.training.global_batch_size is None and "global_batch_size" not in left_out
    rounded = assumed and job.global_batch != DEFAULT_GLOBAL_BATCH
    batch = f" in steps of {job.global_batch}, so that every rank may be a replica" if rounded else ""
    named = " ".join(f"{name}={size}" for name, size in axes.items() if size > 1) or "one rank"
    return Chosen(
        flags=flags(plan, job),
        note=f"layout: {named}, recomputation {plan.candidate.recompute}; of {found.tried} tried the fastest that fits, with "
        f"{plan.memory_gib:.1f} of {machine.device.memory_gib:.0f} GiB on the fullest of {machine.num_devices} "
        f"{machine.device.name} for samples of {job.max_length} tokens{batch}. Parallel flags override it",
    )


def layout_here(
    run: RunConfig, meta: ModelMeta, *, nodes: int, ranks_per_node: int, on_gpus: bool
) -> Chosen | None:
    """Return the layout for nodes like this one; None where one is named, or where this machine's GPU is not known."""
    if not run.launch.auto_layout:
        return None
    try:
        profile = profile_here(nodes=nodes, ranks=ranks_per_node, gpus=None if on_gpus else ())
    except (
        LaunchError
    ):  # a device that the catalogue does not have: the run's own settings are as good as any
        return None
    machine = replace(profile.machine, num_devices=nodes * ranks_per_node, per_node=ranks_per_node)
    return choose_layout(run, meta, machine)


def check_memory(run: RunConfig, layout: Layout, meta: ModelMeta, machine: Machine) -> None:
    """Raise LaunchError where a resolved run needs more memory than its devices have, by the planner's reckoning."""
    training, precision = run.training, PRECISIONS[run.model.torch_dtype or "bfloat16"]
    candidate = Candidate(
        layout=layout,
        micro_batch=training.micro_batch_size,
        precision=precision if precision in machine.device.peak_flops else "fp32",
        recompute=training.recompute_granularity,
        recompute_layers=training.recompute_num_layers if training.recompute_method == "block" else None,
    )
    costs = Costs(_question(run, meta, machine).job, machine, software_on(machine.device))
    memory = costs.memory(candidate, costs.stages(layout)).total
    machine = beside_vllm(run, machine)
    if memory > memory_limit(machine):
        kept = machine.kept_share * machine.device.memory_gib
        of_vllm = f", of which vLLM keeps {kept:.0f} without --sleep_level 1 or 2" if kept else ""
        raise LaunchError(
            f"the run needs about {memory / GIB:.0f} GiB on its fullest rank and {machine.device.name} has "
            f"{machine.device.memory_gib:.0f} GiB{of_vllm}. Leave the parallel flags out, and a layout that fits is chosen; "
            "`megaswift plan` shows what would fit."
        )


def _question(run: RunConfig, meta: ModelMeta, machine: Machine) -> Question:
    """Return what the planner is asked: this run, with a length and a batch where nobody has said them."""
    training, data = run.training, run.data
    if training.gradient_accumulation_steps is not None:  # of as many replicas as there can be
        size = training.micro_batch_size * training.gradient_accumulation_steps * machine.num_devices
        training = replace(training, global_batch_size=size)
    if data.max_length is None and data.packing_length is None:
        data = replace(data, max_length=min(USUAL_LENGTH, meta.max_length))
    precision = PRECISIONS.get(run.model.torch_dtype or "", "auto")
    return ask(
        replace(run, training=training, data=data),
        meta,
        machine,
        given=frozenset({"micro_batch_size"}),
        precision=precision if precision in machine.device.peak_flops else "auto",
        document_len=None,
        offload=False,
    )
