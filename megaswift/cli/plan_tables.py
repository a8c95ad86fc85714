"""The answer of `megaswift plan` as tables."""

from dataclasses import fields

from rich.console import Console
from rich.table import Table

from megaswift.cli.plan import Answer
from megaswift.launch.profile import choices_of, warnings_of
from megaswift.planner.explain import MEMORY_WORDS, TIME_WORDS, reasons
from megaswift.planner.flags import flags_of
from megaswift.planner.machine import GIB
from megaswift.planner.memory import Memory
from megaswift.planner.plan import Plan, memory_limit, rates
from megaswift.planner.steptime import StepTime

NARROWEST = 120  # columns, where the output is not a terminal


def show(answer: Answer, *, top: int, model: str) -> None:
    """Print the answer."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=NARROWEST)
    job, machine, best = answer.job, answer.machine, answer.found.plans[0]
    console.print(
        f"{model}: {job.parts.total / 1e9:.2f}e9 parameters, {job.meta.num_layers} layers; {job.trained} training of "
        f"{job.global_batch} x {job.seq_len} tokens a step on {machine.num_devices} x {machine.device.name}, "
        f"{machine.per_node} a node ({answer.profile.origin})"
    )
    for line in answer.question.assumed:
        console.print(f"assumed: {line}")
    console.print(_plans(answer, top))
    console.print(_memory(answer, best))
    console.print(_time(best))
    console.print(_others(answer))
    console.print(_hardware(answer))
    for warning in warnings_of(answer.profile):
        console.print(f"warning: {warning}")
    if answer.eight_bits is not None:
        gain = best.time.total / answer.eight_bits.time.total
        verdict = "" if answer.eight_bits.fits else "; it does not fit as it is"
        console.print(
            f"FP8 ({answer.eight_bits.candidate.precision}) GEMMs: {answer.eight_bits.time.total:.3g} s a step, "
            f"{gain:.2f} x{verdict} (--precision best searches it)"
        )
    for rank, refused in enumerate(answer.refusals[:top], start=1):
        if refused is not None:
            console.print(f"plan {rank} is not for this version: {refused}")
    runnable = answer.runnable
    if runnable is not None:
        flags = " ".join(f"--{name} {value}" for name, value in flags_of(runnable, job).items())
        rank = answer.found.plans.index(runnable) + 1
        console.print(f"\nplan {rank}: megaswift sft --model {model} {flags} ...", soft_wrap=True)


def _plans(answer: Answer, top: int) -> Table:
    table = Table(title=f"plans that fit, best first ({answer.found.tried} tried)", title_justify="left")
    names = (
        "",
        "tp",
        "pp",
        "vpp",
        "cp",
        "ep",
        "etp",
        "dp",
        "micro",
        "recompute",
        "GEMMs",
        "GiB",
        "step s",
        "tokens/s/GPU",
        "MFU %",
    )
    for name in names:
        table.add_column(name, justify="left" if name in ("recompute", "GEMMs") else "right")
    for rank, plan in enumerate(answer.found.plans[:top], start=1):
        layout, candidate = plan.candidate.layout, plan.candidate
        stages = str(layout.pp) + (f": {layout.pp_first}-{layout.pp_last}" if layout.pp_first else "")
        cp = f"{layout.cp} {candidate.cp_comm}" if layout.cp > 1 else "1"
        axes = (layout.tp, stages, layout.vpp, cp, layout.ep, layout.etp, layout.dp, candidate.micro_batch)
        rate = rates(plan, answer.job, answer.machine)
        table.add_row(
            *map(str, (rank, *axes)),
            _recompute(plan),
            candidate.precision,
            f"{plan.memory_gib:.1f}",
            f"{plan.time.total:.3g}",
            f"{rate.tokens_s_device:.0f}",
            f"{100 * rate.mfu:.1f}",
        )
    return table


def _recompute(plan: Plan) -> str:
    candidate = plan.candidate
    layers = f" {candidate.recompute_layers} layers" if candidate.recompute_layers else ""
    return (
        candidate.recompute
        + layers
        + (", offload" if candidate.offload_optimizer else "")
        + (", 4 bits" if candidate.four_bits else "")
    )


def _memory(answer: Answer, plan: Plan) -> Table:
    limit = memory_limit(answer.machine) / GIB
    title = f"memory of plan 1 on its fullest rank (stage {plan.memory.stage}): {plan.memory_gib:.1f} of {limit:.1f} GiB"
    table = Table(title=title, title_justify="left", show_header=False)
    parts = [
        (MEMORY_WORDS[item.name], getattr(plan.memory, item.name))
        for item in fields(Memory)
        if item.name != "stage"
    ]
    return _bars(table, [(name, value / GIB, "GiB") for name, value in parts if value > 0])


def _time(plan: Plan) -> Table:
    table = Table(title=f"time of a step: {plan.time.total:.3g} s", title_justify="left", show_header=False)
    parts = [(TIME_WORDS[item.name], getattr(plan.time, item.name)) for item in fields(StepTime)]
    return _bars(table, [(name, value, "s") for name, value in parts if value > 0])


def _bars(table: Table, parts: list[tuple[str, float, str]]) -> Table:
    """Fill a table with names, values and bars of up to 40 characters."""
    total = sum(value for _, value, _ in parts)
    for name, value, unit in parts:
        share = value / total
        table.add_row(name, f"{value:.3g} {unit}", f"{100 * share:.1f} %", "#" * max(1, round(40 * share)))
    return table


def _others(answer: Answer) -> Table:
    table = Table(title="why the others lost: the best plan with", title_justify="left", show_header=False)
    for reason in reasons(answer.found, answer.machine):
        value = (
            {True: "yes", False: "no"}.get(reason.value, reason.value)
            if isinstance(reason.value, bool)
            else reason.value
        )
        table.add_row(f"{reason.axis} = {value}", reason.text)
    return table


def _hardware(answer: Answer) -> Table:
    table = Table(
        title=f"what {answer.machine.device.name} switches", title_justify="left", show_header=False
    )
    for choice in choices_of(answer.profile):
        table.add_row(choice.setting, choice.value, choice.reason)
    return table
