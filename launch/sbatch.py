"""The text of a batch script: a pure function of the job, made to be read."""

import shlex
from dataclasses import dataclass

from megaswift.config.submit import RuntimeConfig, SlurmConfig
from megaswift.errors import ConfigError
from megaswift.launch.environment import FIRST_PORT, NUM_PORTS

SRUN_CPUS = (
    "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it from sbatch (slurm 22.05)"
)
UNFINISHED = "unfinished"  # a file in the run's folder: the ranks stopped before the end, and saved


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that the script depends on; every choice has been made."""

    name: str
    commands: tuple[tuple[str, ...], ...]  # arguments of `megaswift`; more than one: rows of a job array
    output_dirs: tuple[str, ...]  # of each command
    log_dir: str
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_task: int | None
    launcher: str  # "srun" or "torchrun"
    mpi: str  # value of srun --mpi
    container_runtime: str | None  # "apptainer", "pyxis"; None: no container
    slurm: SlurmConfig
    runtime: RuntimeConfig

    @property
    def is_array(self) -> bool:
        """Whether one script runs several commands."""
        return len(self.commands) > 1

    @property
    def own_id(self) -> str:
        """How the script names its job to Slurm: the id of one of an array's tasks is also that of the whole array."""
        return '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if self.is_array else '"$SLURM_JOB_ID"'

    @property
    def tasks_per_node(self) -> int:
        """Processes that srun starts on a node."""
        return 1 if self.launcher == "torchrun" else self.ranks_per_node


def sbatch_script(job: Job) -> str:
    """Return a script for sbatch that runs `job`, slice after slice, until it is finished."""
    parts = [
        "#!/bin/bash",
        *_directives(job),
        "",
        "# Written by `megaswift submit`. Submitting it again resumes the run from its newest checkpoint.",
        "",
        *_surroundings(job),
        *_rendezvous(job),
        *_what_to_run(job),
        *_run(job),
        *_afterwards(job),
    ]
    return "\n".join(parts) + "\n"


def _directives(job: Job) -> list[str]:
    slurm = job.slurm
    pattern = "%x-%A_%a.log" if job.is_array else "%x-%j.log"
    values: list[tuple[str, object]] = [
        ("job-name", job.name),
        ("nodes", slurm.nodes),
        ("ntasks-per-node", job.tasks_per_node),
        ("cpus-per-task", job.cpus_per_task),
        *_gpu_request(job),
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("time", slurm.time),
        ("mem", slurm.mem),
        ("constraint", slurm.constraint),
        ("exclude", slurm.exclude),
        ("reservation", slurm.reservation),
        ("dependency", slurm.dependency),
        ("output", f"{job.log_dir}/{pattern}"),
        ("open-mode", "append"),
    ]
    lines = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in values if value is not None]
    if job.is_array:
        limit = f"%{slurm.array_limit}" if slurm.array_limit else ""
        lines.append(f"#SBATCH --array=0-{len(job.commands) - 1}{limit}")
    lines += ["#SBATCH --exclusive"] if slurm.exclusive else []
    lines.append("#SBATCH --requeue" if slurm.requeue else "#SBATCH --no-requeue")
    warning_s = _warning_s(slurm)
    if warning_s:
        lines.append(f"#SBATCH --signal=USR1@{warning_s}")
    return lines + [f"#SBATCH {argument}" for argument in slurm.sbatch_args]


def _warning_s(slurm: SlurmConfig) -> int:
    """Return how long before the limit Slurm warns the ranks: as asked, but never for more than a fifth of the slice."""
    limit_s = parse_time_limit(slurm.time) if slurm.time else None
    return slurm.signal_seconds if limit_s is None else min(slurm.signal_seconds, limit_s // 5)


def parse_time_limit(text: str) -> int | None:
    """Return the seconds of a time limit as sbatch reads it, None for no limit; raises ConfigError.

    Slurm reads minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and
    days-hours:minutes:seconds (sbatch(1), --time).
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in (*parts, days if dash else "0")) or len(parts) > 3:
        raise ConfigError(f"time={text} is not a time limit. Write minutes, HH:MM:SS or D-HH:MM:SS.")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    else:
        hours, minutes, seconds = {1: (0, *numbers, 0), 2: (0, *numbers), 3: numbers}[len(numbers)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _gpu_request(job: Job) -> list[tuple[str, object]]:
    if not job.gpus_per_node:
        return []
    kind = f"{job.slurm.gpu_type}:" if job.slurm.gpu_type else ""
    if job.slurm.gpu_request == "gres":
        return [("gres", f"gpu:{kind}{job.gpus_per_node}")]
    return [("gpus-per-node", f"{kind}{job.gpus_per_node}")]


def _surroundings(job: Job) -> list[str]:
    runtime = job.runtime
    lines = (
        [f"module load {' '.join(map(shlex.quote, runtime.modules))} || exit 2"] if runtime.modules else []
    )
    if runtime.conda:
        lines += ['eval "$(conda shell.bash hook)"', f"conda activate {shlex.quote(runtime.conda)} || exit 2"]
    elif runtime.venv:
        lines.append(f"source {shlex.quote(runtime.venv)}/bin/activate || exit 2")
    lines += [f"export {name}={shlex.quote(str(value))}" for name, value in runtime.env.items()]
    lines += runtime.setup
    return ["# Where the program is", *lines, ""] if lines else []


def _rendezvous(job: Job) -> list[str]:
    return [
        "# Where the ranks meet, and when this slice is over",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"MASTER_PORT=$(({FIRST_PORT} + SLURM_JOB_ID % {NUM_PORTS}))",
        f"END=$(squeue -h -j {job.own_id} -o %e 2>/dev/null)",
        'SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(date -d "${END:-unknown}" +%s 2>/dev/null)}',
        "export MASTER_ADDR MASTER_PORT SLURM_JOB_END_TIME",
        *([SRUN_CPUS] if job.cpus_per_task else []),
        "",
    ]


def _what_to_run(job: Job) -> list[str]:
    if not job.is_array:
        return [
            "# What to run",
            f"OUT={shlex.quote(job.output_dirs[0])}",
            f"RUN=({_words(job.commands[0])})",
            "",
        ]
    lines = ["# What to run: a row for every task of the array", "case $SLURM_ARRAY_TASK_ID in"]
    for row, (command, output_dir) in enumerate(zip(job.commands, job.output_dirs, strict=True)):
        lines += [f"{row})", f"    OUT={shlex.quote(output_dir)}", f"    RUN=({_words(command)})", "    ;;"]
    return [*lines, "esac", ""]


def _run(job: Job) -> list[str]:
    step = [
        "srun",
        "--kill-on-bad-exit=1",
        f"--mpi={job.mpi}",
        f"--ntasks-per-node={job.tasks_per_node}",
    ]
    if job.container_runtime == "pyxis":
        mounts = ",".join(["$PWD:$PWD", *job.runtime.container_mounts])
        step += [
            f"--container-image={shlex.quote(job.runtime.container or '')}",
            f'--container-mounts="{mounts}"',
            '--container-workdir="$PWD"',
        ]
    inside = []
    if job.container_runtime == "apptainer":
        binds = [f"--bind {shlex.quote(mount)}" for mount in job.runtime.container_mounts]
        nv = ["--nv"] if job.gpus_per_node else []
        inside = [
            "apptainer exec",
            *nv,
            '--bind "$PWD" --pwd "$PWD"',
            *binds,
            shlex.quote(job.runtime.container or ""),
        ]
    if job.launcher == "torchrun":
        rendezvous = '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"'
        # An ignored signal stays ignored in torchrun, while the ranks it starts set their own handler.
        shell = 'bash -c \'trap "" USR1; exec "$@"\' ranks'
        inside += [
            shell,
            f"torchrun --nnodes={job.slurm.nodes} --nproc-per-node={job.ranks_per_node}",
            rendezvous,
            "-m megaswift.cli.main",
        ]
    else:
        inside.append("python -m megaswift.cli.main")
    command = " \\\n    ".join([" ".join(step), *inside, '"${RUN[@]}" </dev/null'])
    return [
        'mkdir -p "$OUT"',
        'newest() { cat "$OUT/latest" 2>/dev/null; }  # the newest complete checkpoint',
        "before=$(newest)",
        'rm -f "$OUT/user-error"; export MEGASWIFT_USER_ERROR=$OUT/user-error  # srun and torchrun do not keep an exit code of 2',
        "stopped=",
        "trap 'stopped=$(date +%s)' TERM  # the time is over, or: cancelled, preempted, requeued by hand",
        'time_is_over() { [ -n "$stopped" ] && [ "$stopped" -ge "${SLURM_JOB_END_TIME:-9999999999}" ]; }',
        "",
        f"{command} &",
        "ranks=$!",
        'wait "$ranks"; code=$?',
        'while kill -0 "$ranks" 2>/dev/null && ! time_is_over; do wait "$ranks"; code=$?; done  # a signal ends a wait early',
        "time_is_over && sleep 5  # for a save that is under way; Slurm kills this script after its KillWait, 30 s",
        "",
    ]


def _afterwards(job: Job) -> list[str]:
    lines = [
        "# An error in what was asked for is not tried again. Any other end that is not the end goes on, if there is something new.",
        '[ -z "$stopped" ] || time_is_over || exit "$code"  # Slurm knows what comes next',
        f'[ "$code" -ne 0 ] || [ -e "$OUT/{UNFINISHED}" ] || exit 0',
        '[ ! -e "$MEGASWIFT_USER_ERROR" ] || exit 2',
    ]
    if not job.slurm.requeue:
        return [
            *lines,
            'echo "not finished (code $code), newest checkpoint: $(newest)"',
            'exit "$((code ? code : 1))"',
        ]
    return [
        *lines,
        'if [ "$(newest)" = "$before" ]; then',
        '    echo "this slice ended (code $code) without a new checkpoint: not requeued. Ask for more time, or look above for the error."',
        '    exit "$((code ? code : 1))"',
        "fi",
        'echo "this slice ended (code $code) with $(newest): requeueing"',
        f"scontrol requeue {job.own_id}",
        "sleep 60  # Slurm ends this script",
    ]


def _words(command: tuple[str, ...]) -> str:
    return " ".join(map(shlex.quote, command))
