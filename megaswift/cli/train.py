"""What `megaswift sft` and `megaswift pt` share: parse, check, then join the ranks, be the only one, or start them."""

import os
import signal
import sys
import warnings
from pathlib import Path

from megaswift.config.head_rules import variables_are_flags
from megaswift.config.parse import parse
from megaswift.config.rules import check_request, minimal_world
from megaswift.config.tuner_rules import adapters_are_asked_for
from megaswift.launch.devices import num_gpus, platform_here
from megaswift.launch.environment import own_error_file, set_library_defaults
from megaswift.launch.layout import layout_here
from megaswift.launch.local import die_with_parent, start_ranks, this_program
from megaswift.launch.preflight import check_output, check_run, model_of
from megaswift.launch.sbatch import UNFINISHED
from megaswift.launch.start import plan_start
from megaswift.launch.versions import check_versions
from megaswift.logs import get_logger, setup_logging

log = get_logger("cli")


def run_task(task: str, argv: list[str]) -> int:
    """Run `megaswift TASK argv` and return the exit code; raises UserError before any rank is started where it can."""
    if own_error_file():
        die_with_parent()
    parsed = parse(task, argv)
    run = parsed.config
    check_request(run)
    variables_are_flags(run, parsed.given, os.environ)
    adapters_are_asked_for(run, parsed.given)
    platform = platform_here(run.launch.platform)
    # Who names no layout gets all GPUs of this node; on processors one rank, unless more are asked for.
    fewest = num_gpus() if run.launch.auto_layout and platform == "cuda" else 0
    start = plan_start(
        os.environ, nproc_per_node=run.launch.nproc_per_node, minimal_world=max(fewest, minimal_world(run))
    )
    rank = start.rank.rank if start.rank else 0
    setup_logging(rank=rank, verbose=run.logging.verbose)
    if rank == 0:
        check_versions()
    if start.rank is None:
        chosen = layout_here(
            run,
            model_of(run),
            nodes=start.node.num_nodes,
            ranks_per_node=start.nproc,
            on_gpus=platform == "cuda",
        )
        if chosen is not None:
            run, argv = chosen.adopt(run, parsed.given), [*argv, *chosen.words(parsed.given)]
            log.info(chosen.note)
        meta, _ = check_run(run, world_size=start.world_size, platform_name=platform)
        check_output(run, meta)
        if start.world_size > 1:
            log.info(f"starting {start.nproc} ranks on this node")
            return start_ranks([*this_program(), task, *argv], nproc=start.nproc, node=start.node)
    for note in parsed.notes:
        log.info(note)
    set_library_defaults(beside_vllm=run.sampler.use_vllm and run.sampler.vllm_mode == "colocate")
    signal.signal(
        signal.SIGUSR1, signal.SIG_IGN
    )  # a warning that comes before the training loop listens is no reason to die
    if not run.logging.verbose:
        warnings.filterwarnings(
            "ignore", module=r"(megatron|torch)\b"
        )  # about what is not installed, and deprecations
    if platform == "cpu":
        from megaswift.platforms.cpu import skip_compilation  # torch

        skip_compilation()
    from megaswift.training.run import train  # torch and Megatron-Core: seconds

    summary = train(run, given=parsed.given)
    if rank == 0:
        mark_unfinished(summary.output_dir, summary.interrupted)
    if start.rank is not None and start.rank.source != "mpi":  # MPI wants to be finalised
        # Nothing is left to do, and taking the interpreter down can cost what is left of a slice.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def mark_unfinished(output_dir: Path, unfinished: bool) -> None:
    """Leave word for the batch script (launch/sbatch.py) whether the run has to go on in another slice."""
    mark = output_dir / UNFINISHED
    if unfinished:
        mark.touch()
    else:
        mark.unlink(missing_ok=True)
