"""Where log lines go beyond this machine: Weights & Biases, and SwanLab. Rank 0 alone reports; both packages are optional.

Their own environment variables say who reports, and whether there is a network: WANDB_API_KEY, WANDB_ENTITY,
WANDB_MODE=offline; SWANLAB_API_KEY, SWANLAB_WORKSPACE, SWANLAB_MODE=offline. Without one everything stays below the run's
folder, and `wandb sync` or `swanlab sync` sends it from a machine that has one.

A run that resumes goes on in the run whose id its folder keeps. Neither service takes back what it was told: after an
interruption the steps since the last checkpoint are made again, and reported again. The settings of a run go with it, without its
secrets; the command line does not, as it may hold some.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megaswift.config.dump import dump_run
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError
from megaswift.training.reporters import scalars

PROJECT = "megaswift"


class WeightsAndBiases:
    """A run of Weights & Biases.

    Points are placed by a metric "step" of their own: wandb's step only grows, and would drop the steps that are made again. They
    have two points instead, the older of the interrupted run. (Its `resume_from` would take the older away, but needs a server.)
    """

    def __init__(self, run: RunConfig, output_dir: Path, *, resumed_step: int) -> None:
        """Begin a run, or go on with that of `output_dir`. Raises ConfigError where wandb refuses."""
        import wandb  # an optional package, and half a second

        kept, self._teardown = output_dir / "wandb_run_id", wandb.teardown
        try:
            own = wandb.setup().settings  # of its environment variables
            self._run = wandb.init(
                dir=str(output_dir),
                project=run.logging.wandb_project or own.project or PROJECT,
                name=run.logging.wandb_exp_name or own.run_name or str(output_dir),
                id=_known(kept, resumed_step),
                resume="allow",
                config=_settings(run),
                allow_val_change=True,  # a resumed run may have another layout
                settings=wandb.Settings(x_disable_meta=True),  # the command line
            )
        except wandb.Error as error:
            raise _refusal("wandb", error) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        kept.write_text(f"{self._run.id}\n", encoding="utf-8")

    def report(self, line: Mapping[str, Any]) -> None:
        """Send every number of the line."""
        self._run.log({"step": line["step"], **scalars(line)})

    def close(self) -> None:
        """End the run; waits until everything is sent, and written: by a process, which a rank does not wait for when it exits."""
        self._run.finish()
        self._teardown()


class SwanLab:
    """An experiment of SwanLab; a step that is made again is sent again under the same number."""

    def __init__(self, run: RunConfig, output_dir: Path, *, resumed_step: int) -> None:
        """Begin an experiment, or go on with that of `output_dir`. Raises ConfigError where swanlab refuses."""
        import swanlab  # an optional package, and a second

        kept, folder = output_dir / "swanlab_run_id", output_dir / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        own = swanlab.Settings()  # of its environment variables
        try:
            self._run = swanlab.init(
                log_dir=str(folder),
                project=run.logging.swanlab_project or own.project.name or PROJECT,
                name=run.logging.swanlab_exp_name or own.experiment.name or str(output_dir),
                id=_known(kept, resumed_step),
                resume="allow",
                config=_settings(run),
                settings=swanlab.Settings(probe=swanlab.Settings.Probe(runtime=False)),  # the command line
            )
        # What it raises without a key, without a network, and for what its server refuses; requests' errors are OSErrors.
        except (AssertionError, RuntimeError, OSError, swanlab.exceptions.AuthenticationError) as error:
            raise _refusal("swanlab", error) from error
        kept.write_text(f"{self._run.id}\n", encoding="utf-8")

    def report(self, line: Mapping[str, Any]) -> None:
        """Send every number of the line."""
        self._run.log(scalars(line), step=line["step"])

    def close(self) -> None:
        """End the experiment; waits until everything is sent."""
        self._run.finish()


SERVICES: dict[str, type[WeightsAndBiases] | type[SwanLab]] = {
    "wandb": WeightsAndBiases,
    "swanlab": SwanLab,
}


def _known(kept: Path, resumed_step: int) -> str | None:
    """Return the id to go on with; a run that begins anew is another."""
    return kept.read_text(encoding="utf-8").strip() if resumed_step and kept.exists() else None


def _refusal(service: str, error: Exception) -> ConfigError:
    prefix = service.upper()
    return ConfigError(
        f"report_to={service} does not work: {str(error).strip().rstrip('.')}. Log in ({service} login, or {prefix}_API_KEY), or set "
        f"{prefix}_MODE=offline where there is no network."
    )


def _settings(run: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(dump_run(run))
    return found
