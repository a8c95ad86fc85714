"""A RunConfig as YAML that `--config` reads back to the same RunConfig."""

from typing import Any

import yaml

from megaswift.config.field import declared
from megaswift.config.run import RunConfig

SECRETS = ("hub_token",)  # never written to a file that people share


def dump_run(run: RunConfig) -> str:
    """Return every setting of `run` as `flag: value` lines, section by section."""
    lines = [f"task: {run.task}"]
    section = None
    for setting in declared(RunConfig).values():
        if setting.flag in SECRETS:
            continue
        if setting.section != section:
            section = setting.section
            lines.append(f"\n# {section}")
        lines.append(_line(setting.flag, getattr(getattr(run, setting.section), setting.name)))
    return "\n".join(lines) + "\n"


def _line(flag: str, value: Any) -> str:
    flow: str = yaml.safe_dump(
        [value], default_flow_style=True, allow_unicode=True, width=1 << 30, sort_keys=False
    )
    return f"{flag}: {flow.strip()[1:-1]}"
