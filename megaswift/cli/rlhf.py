"""`megaswift rlhf`: learn from preferences, or from rewards."""

from megaswift.cli.train import run_task


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    return run_task("rlhf", argv)
