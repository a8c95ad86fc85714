"""`megaswift pt`: continue pre-training on text, or start it from random weights."""

from megaswift.cli.train import run_task


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_task("pt", argv)
