"""`megaswift rlhf`: learn from preferences."""

from megaswift.cli.train import run_task


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_task("rlhf", argv)
