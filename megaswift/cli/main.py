"""`megaswift COMMAND ...`: find the command, run it, and turn errors into a message and an exit code.

Exit codes: 0 done, 1 an error of ours (with its traceback), 2 an error that the user can mend, 130 Ctrl-C.
"""

import os
import sys
import traceback
from importlib import import_module

from megaswift.errors import ConfigError, UserError, nearest

# command -> (module with run(argv) -> exit code, one line of help); imported when the command runs
COMMANDS: dict[str, tuple[str, str]] = {
    "sft": ("megaswift.cli.sft", "fine-tune a model on conversations"),
    "pt": ("megaswift.cli.pt", "continue pre-training on text, or start it"),
    "rlhf": ("megaswift.cli.rlhf", "learn from preferences or rewards: dpo, orpo, simpo, cpo, kto, rm, grpo"),
    "rollout": ("megaswift.cli.rollout", "start vLLM servers that write completions for `megaswift rlhf`"),
    "plan": ("megaswift.cli.plan", "choose the layout for a model and a cluster, and say why"),
    "export": ("megaswift.cli.export", "turn a training checkpoint or an adapter into a Hugging Face folder"),
    "convert": (
        "megaswift.cli.convert",
        "move weights between Hugging Face and Megatron checkpoints, and prove it",
    ),
    "submit": ("megaswift.cli.submit", "check a run, write its batch script and hand it to Slurm"),
    "rehearse": ("megaswift.cli.rehearse", "run the exact layout on processors with a shrunken model"),
    "ledger": ("megaswift.cli.ledger", "sum up what a run has cost over all its slices, and what for"),
    "data": ("megaswift.cli.data", "show data sets as they will be trained on, and every bad row"),
    "models": ("megaswift.cli.models", "list the model families, or the facts about one model"),
    "doctor": ("megaswift.cli.doctor", "say what is installed here, and what is missing"),
}

TASKS = ("sft", "pt", "rlhf")  # commands that train: their help is the list of RunConfig's settings

HELP = """\
usage: megaswift COMMAND [file.yaml] [--flag value ...]

Say which model, which data and which task; the rest is found. Ranks are started by --nproc_per_node (or the smallest
number that the layout needs); under torchrun, srun or mpirun those that exist are joined.

commands:
{commands}

`megaswift COMMAND --help` lists a command's flags. Flags of ms-swift are understood, or refused by name.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        return _report(error, f"error: {error}\n", error.exit_code)
    except Exception as error:  # noqa: BLE001 - the last resort of the program: it ends here, with its traceback
        return _report(error, traceback.format_exc(), 1)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
        sys.stdout.write(HELP.format(commands="\n".join(lines)))
        return 0
    if argv[0] not in COMMANDS:
        raise ConfigError(f"{argv[0]} is not a command.{nearest(argv[0], COMMANDS)}")
    if argv[0] in TASKS and {"-h", "--help"} & set(argv):
        # Here and not in cli/train.py: help waits for neither the planner nor the launchers.
        from megaswift.cli.help import task_help

        sys.stdout.write(task_help(argv[0]))
        return 0
    module, _ = COMMANDS[argv[0]]
    code: int = import_module(module).run(argv[1:])
    return code


def _report(error: Exception, text: str, code: int) -> int:
    """Tell why this process ends: to whoever started this rank, otherwise on stderr."""
    # Only a failing program pays for these imports.
    from megaswift.launch import environment
    from megaswift.launch.failure import claim_user_error, write_failure
    from megaswift.launch.mpi import abort

    try:
        env = environment.rank_env()
    except UserError:  # half a set of variables: what is told here already
        env = None
    rank = env.rank if env else 0
    own, torchrun, user = (
        environment.own_error_file(),
        environment.torchrun_error_file(),
        environment.user_error_file(),
    )
    for path in (own, torchrun):
        if path:
            write_failure(path, error, rank=rank)
    silent = own or (user and isinstance(error, UserError) and not claim_user_error(user, error))
    if not silent:
        sys.stderr.write(f"[rank {rank}] {text}" if rank else text)
    if env and env.source == "mpi":
        abort(code)
    ranks = sys.modules.get("torch.distributed")
    if ranks is not None and ranks.is_initialized():
        # gloo's threads may still wait for other ranks, and an orderly exit is then an abort now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
