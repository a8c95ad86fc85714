"""What `megaswift sft` and `megaswift pt` share: parse, check, then join the ranks, be the only one, or start them."""

import os
import signal
import sys
import warnings
from pathlib import Path

from megaswift.cli.help import task_help
from megaswift.config.parse import parse
from megaswift.config.rules import check_request, minimal_world
from megaswift.launch.devices import platform_here
from megaswift.launch.environment import own_error_file, set_library_defaults
from megaswift.launch.local import die_with_parent, start_ranks
from megaswift.launch.preflight import check_run
from megaswift.launch.sbatch import UNFINISHED
from megaswift.launch.start import plan_start
from megaswift.logs import get_logger, setup_logging

log = get_logger("cli")


def run_task(task: str, argv: list[str]) -> int:
    """Run `megaswift TASK argv` and return the exit code; raises UserError before any rank is started where it can."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(task_help(task))
        return 0
    if own_error_file():
        die_with_parent()
    parsed = parse(task, argv)
    run = parsed.config
    check_request(run)
    start = plan_start(os.environ, nproc_per_node=run.launch.nproc_per_node, minimal_world=minimal_world(run))
    rank = start.rank.rank if start.rank else 0
    setup_logging(rank=rank, verbose=run.logging.verbose)
    if start.rank is None:
        check_run(run, world_size=start.world_size, platform_name=platform_here(run.launch.platform))
        if start.world_size > 1:
            log.info(f"starting {start.nproc} ranks on this node")
            return start_ranks([*this_program(), task, *argv], nproc=start.nproc, node=start.node)
    for note in parsed.notes:
        log.info(note)
    set_library_defaults()
    signal.signal(
        signal.SIGUSR1, signal.SIG_IGN
    )  # a warning that comes before the training loop listens is no reason to die
    if not run.logging.verbose:
        warnings.filterwarnings(
            "ignore", module=r"(megatron|torch)\b"
        )  # about what is not installed, and deprecations
    from megaswift.training.run import train  # torch and Megatron-Core: seconds

    summary = train(run)
    if rank == 0:
        mark_unfinished(summary.output_dir, summary.interrupted)
    return 0


def mark_unfinished(output_dir: Path, unfinished: bool) -> None:
    """Leave word for the batch script (launch/sbatch.py) whether the run has to go on in another slice."""
    mark = output_dir / UNFINISHED
    if unfinished:
        mark.touch()
    else:
        mark.unlink(missing_ok=True)


def this_program() -> list[str]:
    """Return the command that starts this program again: the installed script, or the module."""
    script = sys.argv[0]
    return (
        [sys.executable, script]
        if script.endswith("megaswift")
        else [sys.executable, "-m", "megaswift.cli.main"]
    )
