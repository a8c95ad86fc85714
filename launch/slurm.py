"""Talking to Slurm: its partitions, jobs and logs, through its own commands and their plain output."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megaswift.errors import LaunchError, nearest
from megaswift.launch.environment import slurm_job_end, slurm_job_id

TIMEOUT_S = (
    60.0  # a client waits this long for a controller that does not answer before it says so (slurm 22.05)
)
FINISHED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",  # by a partition that cancels; one that requeues is PENDING again
    "TIMEOUT",
)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What `sinfo` says about one kind of node of a partition."""

    name: str
    is_default: bool
    is_up: bool
    nodes: int
    cpus: int  # of a node
    gpus: int  # of a node
    gpu_type: str | None
    max_time: str  # as Slurm writes it: "infinite", "2-00:00:00"


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What Slurm says about one job of ours."""

    job_id: str
    name: str
    state: str
    elapsed: str
    limit: str
    nodes: int
    where: str  # node list, or the reason for waiting


def slurm(*words: str) -> str:
    """Run one of Slurm's commands and return its output; raises LaunchError with what it said."""
    if shutil.which(words[0]) is None:
        raise LaunchError(
            f"{words[0]} is not found on this machine. Run this on a login node of the cluster, or use --dry_run."
        )
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{words[0]} did not answer within {TIMEOUT_S:.0f} s. Slurm's controller seems to be down."
        ) from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise LaunchError(
            f"{' '.join(words[:2])} failed: {'; '.join(said[-3:]) or f'code {done.returncode}'}."
        )
    return done.stdout


def partitions() -> list[Partition]:
    """Return the cluster's partitions, one entry a kind of node."""
    return parse_partitions(slurm("sinfo", "-h", "-o", "%P|%a|%D|%c|%G|%l"))


def parse_partitions(text: str) -> list[Partition]:
    """Return what `sinfo -h -o "%P|%a|%D|%c|%G|%l"` says; a name with a star is the default."""
    found = []
    for line in text.splitlines():
        name, up, nodes, cpus, gres, limit = (part.strip() for part in line.split("|"))
        gpus, gpu_type = parse_gres(gres)
        found.append(
            Partition(
                name=name.rstrip("*"),
                is_default=name.endswith("*"),
                is_up=up == "up",
                nodes=int(nodes),
                cpus=int(cpus.rstrip("+")),
                gpus=gpus,
                gpu_type=gpu_type,
                max_time=limit,
            )
        )
    return found


def parse_gres(text: str) -> tuple[int, str | None]:
    """Return the GPUs of a node and their type: `gpu:h100:8(S:0-1),nvme:1` -> (8, "h100")."""
    for entry in text.split(","):
        kind, *rest = entry.split("(")[0].split(":")
        if kind == "gpu" and rest and rest[-1].isdigit():
            return int(rest[-1]), rest[0] if len(rest) > 1 else None
    return 0, None


def choose_partition(
    known: Sequence[Partition],
    name: str | None,
    *,
    nodes: int,
    gpus: int | None,
    gpu_type: str | None = None,
) -> Partition:
    """Return the kind of node of that partition (or the default) with such GPUs, of which there are so many nodes.

    Raises LaunchError.
    """
    names = sorted({one.name for one in known})
    fitting = [one for one in known if one.name == name or (name is None and one.is_default)]
    if not fitting and name is None and len(names) == 1:
        fitting = list(known)
    if not fitting:
        asked = (
            f"partition={name} is not a partition of this cluster."
            if name
            else "the cluster has no default partition."
        )
        raise LaunchError(f"{asked}{nearest(name or '--partition', names)}")
    # Slurm may not say of which type they are, or name several for a node: sbatch then knows better.
    fitting = [one for one in fitting if gpu_type in (None, one.gpu_type)] or fitting
    best = max(fitting, key=lambda one: (one.gpus, one.nodes))
    if not any(one.is_up for one in fitting):
        others = ", ".join(sorted({one.name for one in known if one.is_up})) or "none: no partition is up"
        raise LaunchError(f"partition={best.name} is down. Choose --partition from {others}.")
    if gpus is not None and gpus > best.gpus:
        raise LaunchError(
            f"gpus_per_node={gpus} but nodes of partition {best.name} have {best.gpus}. Ask for at most {best.gpus}."
        )
    total = sum(one.nodes for one in fitting if one.gpus >= (gpus or 0))
    if nodes > total:
        raise LaunchError(
            f"nodes={nodes} but partition {best.name} has {total} such nodes. Ask for at most {total}."
        )
    return best


def mpi_kinds() -> list[str] | None:
    """Return what `srun --mpi=list` names; None without srun, or where it cannot say."""
    if shutil.which("srun") is None:
        return None
    try:
        done = subprocess.run(
            ("srun", "--mpi=list"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return None
    return None if done.returncode else parse_mpi_kinds(done.stdout)


def parse_mpi_kinds(text: str) -> list[str]:
    """Return the plugins of a list: one a line below a heading, behind "srun: " in older Slurms, which write to stderr.

    The last line may name versions of pmix: "specific pmix plugin versions available: pmix_v4" (slurm 22.05).
    """
    versions = "specific pmix plugin versions available: "
    lines = [line.removeprefix("srun: ").removeprefix(versions) for line in text.splitlines()]
    names = [name.strip() for line in lines for name in line.split(",")]
    return [name for name in names if name and " " not in name]


def submit(script: Path) -> str:
    """Hand a script to sbatch and return the job's id."""
    return slurm("sbatch", "--parsable", str(script)).strip().split(";")[0]


def jobs() -> list[JobState]:
    """Return this user's jobs of scripts that `megaswift submit` wrote, and others whose names begin with `megaswift`."""
    text = slurm("squeue", "-h", "--me", "-o", "%i|%j|%T|%M|%l|%D|%o|%R")
    found = []
    for line in text.splitlines():
        job_id, name, state, elapsed, limit, nodes, script, where = (
            part.strip() for part in line.split("|", 7)
        )
        if name.startswith("megaswift") or script.endswith(f"/slurm/{name}.sbatch"):
            found.append(
                JobState(
                    job_id=job_id,
                    name=name,
                    state=state,
                    elapsed=elapsed,
                    limit=limit,
                    nodes=int(nodes),
                    where=where,
                )
            )
    return found


def cancel(job_id: str) -> None:
    """Cancel a job; its ranks save first where Slurm's KillWait leaves them the time."""
    slurm("scancel", job_id)


def job_facts(job_id: str) -> dict[str, str]:
    """Return `scontrol show job`'s NAME=value pairs of one job."""
    return parse_facts(slurm("scontrol", "show", "job", "--oneliner", job_id))


def parse_facts(text: str) -> dict[str, str]:
    """Return the pairs of the first line of `scontrol --oneliner show`; values hold no blanks, but for those cut off here."""
    pairs = (
        (word.partition("=") for word in text.splitlines()[0].split(" ") if "=" in word)
        if text.strip()
        else ()
    )
    return {name: value for name, _, value in pairs}


def follow(job_id: str, *, poll_s: float = 1.0, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """Yield what a job writes to its log, through all its slices, until it is over; raises LaunchError for an unknown job."""
    path = Path(job_facts(job_id)["StdOut"])
    seen = 0
    while True:
        over = job_facts(job_id)["JobState"] in FINISHED
        if path.exists():
            with path.open("rb") as file:
                file.seek(seen)
                new = file.read()
            seen += len(new)
            if new:
                yield new.decode(errors="replace")
        if over:
            return
        sleep(poll_s)


def job_end(environ: Mapping[str, str]) -> float | None:
    """Return when the Slurm job of this process ends, in seconds since the epoch; None outside of one, or without a limit.

    Slurm 23.02 and our batch scripts say it in SLURM_JOB_END_TIME; otherwise the controller is asked.
    """
    said, job_id = slurm_job_end(environ), slurm_job_id(environ)
    if said is not None or job_id is None or shutil.which("scontrol") is None:
        return said
    end = job_facts(job_id).get("EndTime", "")
    try:
        return datetime.fromisoformat(end).timestamp()
    except ValueError:  # "Unknown", "None": there is no limit
        return None
