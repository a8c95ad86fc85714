"""What a chain of slices has cost, and what for: read from ledger.jsonl, which rank 0 appends to (training/account.py).

The file is never cut back, so that steps which a crash made necessary twice are in it twice. One JSON object a line:

| event | fields |
|---|---|
| start | time, launched, queued_s, job, world_size, device, peak_flops (of one rank), step (resumed from) |
| steps | time, step (the last of them), steps, tokens (padding left out), flop (model FLOPs), seconds |
| save | time, step, seconds |
| end | time, step, finished |

Times are seconds since the epoch; a slice that was killed has no end.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megaswift.errors import LaunchError
from megaswift.launch.environment import rank_env, slurm_job_id
from megaswift.launch.layout import PRECISIONS
from megaswift.launch.profile import profile_here
from megaswift.launch.slurm import job_facts

FILE = "ledger.jsonl"
CONVENTION = "model FLOPs, causal attention, nothing recomputed (training/flops.py)"


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One start of the run, until it ended or was killed."""

    start: dict[str, Any]
    steps: tuple[dict[str, Any], ...]
    saves: tuple[dict[str, Any], ...]
    end: dict[str, Any] | None

    @property
    def seconds(self) -> float:
        """From the start of the job (or of the process) to the last word."""
        last = self.end or max((self.start, *self.steps, *self.saves), key=lambda event: event["time"])
        return float(last["time"] - self.start["launched"])

    @property
    def starting_s(self) -> float:
        """Until the first step began; all of it where none was made."""
        if not self.steps:
            return self.seconds
        first = self.steps[0]
        return float(first["time"] - first["seconds"] - self.start["launched"])


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The sums over a chain. Times are wall-clock seconds of the whole job, not of one device."""

    slices: int
    devices: int  # of the last slice
    device: str
    device_hours: float
    steps: int
    tokens: int
    queued_s: float
    starting_s: float
    stepping_s: float  # steps that counted
    redone_s: float  # steps that a later slice had to make again
    redone_steps: int
    saving_s: float
    mfu_of_steps: float  # model FLOPs of the steps that counted, over the peak of the devices while they ran
    mfu_of_all: float  # and over their peak for all of the device hours

    @property
    def other_s(self) -> float:
        """Validation, logging, and taking down."""
        known = self.starting_s + self.stepping_s + self.redone_s + self.saving_s
        return self.device_hours * 3600 / max(1, self.devices) - known


def read_slices(output_dir: Path) -> list[Slice]:
    """Return the slices of a run; raises LaunchError where nothing was written down."""
    path = output_dir / FILE
    if not path.is_file():
        raise LaunchError(
            f"output_dir={output_dir} has no {FILE}. Give the --output_dir of a run that has started."
        )
    slices: list[Slice] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # the torn last line of a killed process
            continue
        if event["event"] == "start":
            slices.append(Slice(start=event, steps=(), saves=(), end=None))
        elif slices:
            slices[-1] = _with(slices[-1], event)
    if not slices:
        raise LaunchError(
            f"{path} names no start of a run. It is damaged; the run's logging.jsonl has its losses."
        )
    return slices


def sum_up(slices: Sequence[Slice]) -> Ledger:
    """Return what a chain of slices has cost."""
    stepping_s = redone_s = flop = peak_of_steps = peak_of_all = hours = tokens = 0.0
    steps = redone_steps = 0
    for number, one in enumerate(slices):
        # A later slice may have started before an earlier one's first step: from an older checkpoint.
        kept_until = min((later.start["step"] for later in slices[number + 1 :]), default=float("inf"))
        peak = one.start["peak_flops"] * one.start["world_size"]
        for window in one.steps:
            redone = min(window["steps"], max(0, window["step"] - kept_until))
            share = 1 - redone / window["steps"]
            steps += window["steps"] - redone
            redone_steps += redone
            tokens += share * window["tokens"]
            flop += share * window["flop"]
            stepping_s += share * window["seconds"]
            redone_s += (1 - share) * window["seconds"]
            peak_of_steps += share * window["seconds"] * peak
        peak_of_all += one.seconds * peak
        hours += one.seconds * one.start["world_size"] / 3600
    last = slices[-1].start
    return Ledger(
        slices=len(slices),
        devices=last["world_size"],
        device=last["device"],
        device_hours=hours,
        steps=steps,
        tokens=round(tokens),
        queued_s=sum(one.start["queued_s"] or 0.0 for one in slices),
        starting_s=sum(one.starting_s for one in slices),
        stepping_s=stepping_s,
        redone_s=redone_s,
        redone_steps=redone_steps,
        saving_s=sum(save["seconds"] for one in slices for save in one.saves),
        mfu_of_steps=flop / peak_of_steps if peak_of_steps else 0.0,
        mfu_of_all=flop / peak_of_all if peak_of_all else 0.0,
    )


def beginning(environ: Mapping[str, str], *, dtype: str, on_gpus: bool, world_size: int) -> dict[str, Any]:
    """Return what a slice that starts now writes down about itself: since when, after which wait, on which devices."""
    rank, job = rank_env(environ), slurm_job_id(environ)
    launched, queued_s = time.time() - process_age_s(), None
    if job is not None and shutil.which("scontrol") is not None:
        try:
            facts = job_facts(job)
            launched = datetime.fromisoformat(facts["StartTime"]).timestamp()
            queued_s = launched - datetime.fromisoformat(facts["SubmitTime"]).timestamp()
        except (LaunchError, KeyError, ValueError):  # the controller does not answer: known less well
            pass
    ranks = rank.local_world_size if rank else world_size
    try:
        device = profile_here(ranks=ranks, gpus=None if on_gpus else ()).device
    except LaunchError:  # not in the catalogue
        name, peak = "unknown device", 0.0
    else:
        name = device.name
        peak = device.peak_flops.get(PRECISIONS[dtype], device.peak_flops["fp32"])
    return {
        "launched": launched,
        "queued_s": queued_s,
        "job": job,
        "world_size": world_size,
        "device": name,
        "peak_flops": peak,
    }


def process_age_s() -> float:
    """Return how long ago this process was started, in seconds; 0 where /proc does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # proc(5): starttime
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return up_s - ticks / os.sysconf("SC_CLK_TCK")


def _with(one: Slice, event: dict[str, Any]) -> Slice:
    steps = (*one.steps, event) if event["event"] == "steps" else one.steps
    saves = (*one.saves, event) if event["event"] == "save" else one.saves
    return Slice(start=one.start, steps=steps, saves=saves, end=event if event["event"] == "end" else one.end)
