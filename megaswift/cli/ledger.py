"""`megaswift ledger OUTPUT_DIR`: what a run has cost over all its slices, and what for."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from megaswift.errors import ConfigError
from megaswift.launch.ledger import CONVENTION, Ledger, read_slices, sum_up

HELP = """\
usage: megaswift ledger OUTPUT_DIR [--json]

Sums over all slices of a run: tokens, device hours, utilisation, and the time that went to the queue, to starting, to
saving and to steps that had to be made again.
"""


def run(argv: list[str]) -> int:
    """Run the command and return its exit code; raises UserError."""
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP)
        return 0
    as_json = "--json" in argv
    words = [word for word in argv if word not in ("--json", "--output_dir", "--output-dir")]
    if len(words) != 1 or words[0].startswith("-"):
        raise ConfigError(f"megaswift ledger takes one folder, not {' '.join(argv)}.")
    ledger = sum_up(read_slices(Path(words[0]).expanduser()))
    if as_json:
        json.dump(
            {**asdict(ledger), "other_s": ledger.other_s, "convention": CONVENTION}, sys.stdout, indent=2
        )
        sys.stdout.write("\n")
    else:
        sys.stdout.write(table(ledger))
    return 0


def table(ledger: Ledger) -> str:
    """Return the ledger for a person."""
    whole_s = ledger.device_hours * 3600 / max(1, ledger.devices)
    times = {
        "training": ledger.stepping_s,
        "training again": ledger.redone_s,
        "starting": ledger.starting_s,
        "saving": ledger.saving_s,
        "other": ledger.other_s,
    }
    lines = [
        f"slices          {ledger.slices}",
        f"steps           {ledger.steps}  (and {ledger.redone_steps} made again)",
        f"tokens          {ledger.tokens}  (padding left out)",
        f"device hours    {ledger.device_hours:.3g}  ({ledger.devices} x {ledger.device})",
        f"MFU of steps    {100 * ledger.mfu_of_steps:.3g} %  ({CONVENTION})",
        f"MFU of all      {100 * ledger.mfu_of_all:.3g} %  (over all device hours)",
        f"queued          {ledger.queued_s:.0f} s",
        *(
            f"{name:<15} {seconds:.0f} s  ({100 * seconds / whole_s if whole_s else 0:.1f} %)"
            for name, seconds in times.items()
        ),
    ]
    return "\n".join(lines) + "\n"
