"""`megaswift submit`: check a run, write a batch script that one can read, and hand it to Slurm."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megaswift.cli.help import sections_help
from megaswift.config.field import declared
from megaswift.config.parse import TASK_DEFAULTS, Parsed, parse, take_flags
from megaswift.config.reference import needs_reference
from megaswift.config.rules import minimal_world
from megaswift.config.run import RunConfig
from megaswift.config.submit import SubmitConfig
from megaswift.errors import ConfigError, LaunchError, nearest
from megaswift.launch import slurm
from megaswift.launch.launcher import choose_launcher
from megaswift.launch.layout import Chosen, check_memory, choose_layout
from megaswift.launch.matrix import expand_matrix, read_matrix
from megaswift.launch.preflight import (
    check_files_for_nodes_without_network,
    check_first_rows,
    check_output,
    check_rows,
    check_run,
    model_of,
)
from megaswift.launch.profile import profile_of_name
from megaswift.launch.sbatch import Job, sbatch_script
from megaswift.launch.versions import check_versions
from megaswift.logs import get_logger, setup_logging
from megaswift.planner.machine import Machine

log = get_logger("submit")

USAGE = """\
usage: megaswift submit TASK [the flags of `megaswift TASK`] [flags below] [--dry_run]
       megaswift submit list | cancel JOB | follow JOB

Checks the run, writes OUTPUT_DIR/slurm/NAME.sbatch and hands it to sbatch. --dry_run prints the script instead. The job
goes on in as many slices as it needs: it saves before its time is over, and is requeued while it makes progress.
"""


def run(argv: list[str]) -> int:
    """Run the command and return its exit code; raises UserError."""
    setup_logging(rank=0)
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE + sections_help(SubmitConfig()))
        return 0
    verb, rest = argv[0], argv[1:]
    if verb in JOB_VERBS:
        return JOB_VERBS[verb](rest)
    if verb not in TASK_DEFAULTS:
        raise ConfigError(f"{verb} is not a task.{nearest(verb, [*TASK_DEFAULTS, *JOB_VERBS])}")
    dry_run = "--dry_run" in rest or "--dry-run" in rest
    known = _partitions(dry_run)
    words = [word for word in rest if word not in ("--dry_run", "--dry-run")]
    job = plan_job(verb, words, known)
    script = sbatch_script(job)
    if dry_run:
        sys.stdout.write(script)
        return 0
    _check_rows_of(job)
    folder = Path(job.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{job.name}.sbatch"
    path.write_text(script, encoding="utf-8")
    job_id = slurm.submit(path)
    log.info(f"job {job_id}: {path}; `megaswift submit follow {job_id}` shows its log")
    sys.stdout.write(f"{job_id}\n")
    return 0


def _check_rows_of(job: Job) -> None:
    """Encode the first rows of every run of a job, of each choice of model, template and data once."""
    seen: set[str] = set()
    for command in job.commands:
        run = parse(command[0], list(command[1:])).config
        key = repr((run.model, run.data, run.task, run.preference))
        if key not in seen:
            seen.add(key)
            check_first_rows(run, model_of(run))


def _partitions(dry_run: bool) -> list[slurm.Partition]:
    """Return what Slurm has; nothing where a dry run has no Slurm to ask."""
    if not dry_run:
        return slurm.partitions()
    try:
        return slurm.partitions()
    except LaunchError as error:
        log.info(f"partitions are not checked: {error}")
        return []


def plan_job(task: str, argv: list[str], known: Sequence[slurm.Partition]) -> Job:
    """Return the job for `megaswift submit TASK argv` on a cluster with the `known` partitions; raises UserError.

    Without any known partition what it would have decided is left to Slurm, or to the flags.
    """
    request, argv = take_flags(SubmitConfig(), argv)
    _check_request(request)
    runs = _runs(task, argv, request)
    rows = [parse(command[0], command[1:]) for command, _ in runs]
    first, asked = rows[0].config, request.slurm
    if asked.nodes < 1:
        raise ConfigError(f"nodes={asked.nodes} is too small. Give 1 or more.")
    partition = None
    if known:
        partition = slurm.choose_partition(
            known,
            asked.partition,
            nodes=asked.nodes,
            gpus=asked.gpus_per_node,
            gpu_type=asked.gpu_type,
        )
    gpus = asked.gpus_per_node if asked.gpus_per_node is not None else _needed_gpus(first, partition)
    ranks = first.launch.nproc_per_node or gpus or -(-minimal_world(first) // asked.nodes)
    platform_name = "cuda" if gpus and first.launch.platform != "cpu" else "cpu"
    machine = _machine(partition, nodes=asked.nodes, ranks=ranks) if platform_name == "cuda" else None
    layouts: dict[str, Chosen | None] = {}
    commands = []
    for (command, _), row in zip(runs, rows, strict=True):
        layout = _layout(row, machine, layouts)
        config = layout.adopt(row.config, row.given) if layout is not None else row.config
        _check(config, machine, world_size=asked.nodes * ranks, platform_name=platform_name)
        commands.append((*command, *(layout.words(row.given) if layout is not None else [])))
    container_runtime = _container_runtime(request)
    if container_runtime is None and request.runtime.conda is None and request.runtime.venv is None:
        check_versions()  # the job has this program's own environment
    launcher = choose_launcher(
        request.runtime.launcher,
        mpi=request.runtime.mpi,
        mpi_kinds=slurm.mpi_kinds() if known else None,
        container_runtime=container_runtime,
        partition=partition,
        ranks_per_node=ranks,
    )
    log.info(f"ranks are started by {launcher.name}: {launcher.reason}. --launcher overrides it")
    tasks = 1 if launcher.name == "torchrun" else ranks
    return Job(
        name=asked.job_name or f"megaswift-{task}",
        commands=tuple(commands),
        output_dirs=tuple(folder for _, folder in runs),
        log_dir=f"{_output_dir(task, argv)}/slurm",
        ranks_per_node=ranks,
        gpus_per_node=gpus,
        cpus_per_task=asked.cpus_per_task
        or (_share_of_cores(partition, gpus=gpus, tasks=tasks) if partition else None),
        launcher=launcher.name,
        mpi=launcher.mpi,
        container_runtime=container_runtime,
        slurm=asked,
        runtime=replace(request.runtime, venv=_venv(request)),
    )


def _check_request(request: SubmitConfig) -> None:
    """Check what Slurm or the shell would take for something else; raises ConfigError."""
    asked = request.slurm
    if asked.job_name is not None and "/" in asked.job_name:
        raise ConfigError(f"job_name={asked.job_name} names the script too, a file. Leave / out of it.")
    if asked.array_limit is not None and asked.matrix is None:
        raise ConfigError(
            f"array_limit={asked.array_limit} is for the runs of a matrix. Give --matrix, or leave it out."
        )
    for name, value in request.runtime.env.items():
        if value is None:
            raise ConfigError(f"env has no value for {name}. Give a text, or leave it out.")


def _needed_gpus(run: RunConfig, partition: slurm.Partition | None) -> int:
    """Return the GPUs of a node where nobody says how many: all, but no more than there are ranks for."""
    if partition is None or run.launch.platform == "cpu":
        return 0
    return min(partition.gpus, run.launch.nproc_per_node or partition.gpus)


def _machine(partition: slurm.Partition | None, *, nodes: int, ranks: int) -> Machine | None:
    """Return the GPUs that the job will have; None where the partition does not say which they are."""
    if partition is None or partition.gpu_type is None:
        return None
    try:
        return profile_of_name(partition.gpu_type, nodes=nodes, per_node=ranks).machine
    except LaunchError as error:
        log.info(f"memory is not checked, and the layout is chosen inside the job: {error}")
        return None


def _layout(row: Parsed, machine: Machine | None, known: dict[str, Chosen | None]) -> Chosen | None:
    """Return the layout of a run that names none; `known` has those of rows of a matrix that differ in other things."""
    run = row.config
    if machine is None or not run.launch.auto_layout:
        return None
    lengths = (run.data.max_length, run.data.packing_length)
    models = (needs_reference(run), run.preference.teacher_model, run.preference.ref_model)
    key = repr((run.model, lengths, run.training, run.tuner, run.parallel, models, run.sampler, run.vllm))
    if key not in known:
        known[key] = chosen = choose_layout(run, model_of(run), machine)
        if chosen is not None:
            log.info(chosen.note)
    return known[key]


def _check(run: RunConfig, machine: Machine | None, *, world_size: int, platform_name: str) -> None:
    """Check a run as far as this node can; raises UserError for the first thing that is wrong."""
    meta, resolved = check_run(run, world_size=world_size, platform_name=platform_name)
    if machine is not None:
        check_memory(resolved.config, resolved.layout, meta, machine)
    check_rows(run)
    check_output(run, meta)
    check_files_for_nodes_without_network(run, meta)


def _runs(task: str, argv: list[str], request: SubmitConfig) -> list[tuple[list[str], str]]:
    output_dir = _output_dir(task, argv)
    if request.slurm.matrix is None:
        return [([task, *argv], output_dir)]
    names = {"output_dir", *declared(RunConfig)["output_dir"].aliases}
    flags = [word.lstrip("-").partition("=")[0].replace("-", "_") for word in argv]
    place = next((at for at, flag in enumerate(flags) if argv[at].startswith("--") and flag in names), None)
    if place is not None:
        argv = argv[:place] + argv[place + (1 if "=" in argv[place] else 2) :]
    return expand_matrix(task, argv, read_matrix(request.slurm.matrix), output_dir)


def _output_dir(task: str, argv: list[str]) -> str:
    """Return the folder that the flags name; a matrix may leave other flags open."""
    config: RunConfig = parse(task, argv).config
    return config.checkpoint.output_dir


def _container_runtime(request: SubmitConfig) -> str | None:
    image, runtime = request.runtime.container, request.runtime.container_runtime
    if image is None:
        return None
    if runtime == "auto":
        return "apptainer" if image.endswith(".sif") else "pyxis"
    return runtime


def _venv(request: SubmitConfig) -> str | None:
    """Return the virtual environment of the job: the one asked for, or the one that runs this command."""
    runtime = request.runtime
    if runtime.venv or runtime.conda or runtime.container:
        return runtime.venv
    return sys.prefix if sys.prefix != sys.base_prefix else None


def _share_of_cores(partition: slurm.Partition, *, gpus: int, tasks: int) -> int:
    """Return the cores of a task: of the node, or of the GPUs' part of it, an even share."""
    part = gpus / partition.gpus if gpus and partition.gpus else 1.0
    return max(1, int(partition.cpus * part) // tasks)


def _list(argv: list[str]) -> int:
    rows = [("job", "name", "state", "elapsed", "limit", "nodes", "where")]
    rows += [
        (job.job_id, job.name, job.state, job.elapsed, job.limit, str(job.nodes), job.where)
        for job in slurm.jobs()
    ]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        sys.stdout.write(
            "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() + "\n"
        )
    return 0


def _cancel(argv: list[str]) -> int:
    for job_id in _job_ids("cancel", argv):
        slurm.cancel(job_id)
    return 0


def _follow(argv: list[str]) -> int:
    for text in slurm.follow(_job_ids("follow", argv)[0]):
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def _job_ids(verb: str, argv: list[str]) -> list[str]:
    if not argv or not all(word.replace("_", "").isdigit() for word in argv):
        raise ConfigError(
            f"megaswift submit {verb} needs the number of a job. `megaswift submit list` shows them."
        )
    return argv


JOB_VERBS = {"list": _list, "cancel": _cancel, "follow": _follow}
