"""`megaswift doctor`: what is installed on this machine, what is missing, and what that means."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megaswift.config.parse import take_flags
from megaswift.config.plan import PlanConfig
from megaswift.errors import ConfigError, nearest
from megaswift.launch.devices import num_gpus
from megaswift.launch.local import threads_per_rank

SWITCHES = ("--load", "--profile", "--measure")
HELP = """\
usage: megaswift doctor [--load] [--profile [--gpu H100-80G --nodes 8 | --partition NAME]] [--measure]

Lists versions, devices and launchers of this machine, and which versions do not go together. Exit code 1 where something is
missing or does not fit, and nothing trains.

--load also imports the compiled packages, which takes seconds: one that was compiled with another torch fails.

--profile shows the hardware instead, of this machine, of a name or of a Slurm partition, and what it switches and why.
--measure runs matrix products, copies and all-reduces on this machine's devices and shows them beside the data sheet's.
"""

# package -> (lowest version, why it is needed); as in pyproject.toml
NEEDED = {
    "torch": ("2.6", "tensors and collectives"),
    "megatron-core": ("0.16", "the engine"),
    "transformers": ("5.0", "tokenizers"),
    "datasets": ("3.0", "data files"),
    "safetensors": ("0.4.5", "weights"),
    "tokenizers": ("0.20", "tokenizers"),
    "huggingface_hub": ("0.30", "the hub's cache and downloads"),
    "numpy": ("1.26", "batches"),
    "pyyaml": ("6.0", "configuration files"),
}
OPTIONAL = {
    "transformer-engine": "fused layers and FP8 on GPUs; without it layers are plain torch",
    "flash-attn": "attention of packed rows on GPUs without Transformer Engine",
    "apex": "gradient accumulation inside the GEMM",
    "peft": "opening adapters elsewhere; training does not need it",
    "bitsandbytes": "a frozen base, or GaLore's projections, in four bits",
    "tensorboard": "metrics as TensorBoard files",
    "wandb": "metrics to Weights & Biases",
    "swanlab": "metrics to SwanLab",
    "jieba": "words of generated answers that are scored (--predict_with_generate)",
    "rouge": "their ROUGE",
    "nltk": "their BLEU",
    "mpi4py": "ranks started by mpirun",
    "nvidia-ml-py": "GPU health",
}
COMPILED = {
    "transformer-engine": "transformer_engine.pytorch",
    "flash-attn": "flash_attn",
    "apex": "apex.optimizers",
}
LOAD_S = 300  # a cold file system on a login node
PROGRAMS = {
    "sbatch": "Slurm jobs",
    "srun": "Slurm steps",
    "mpirun": "MPI",
    "nvidia-smi": "NVIDIA's driver",
    "apptainer": "containers",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    state: str
    good: bool  # false: nothing trains here until it is mended
    remark: str = ""


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP)
        return 0
    asked = [word for word in argv if word not in SWITCHES]
    config, rest = take_flags(PlanConfig(), asked)
    if rest:
        raise ConfigError(f"{rest[0]} is not a flag of megaswift doctor.{nearest(rest[0], SWITCHES)}")
    if asked and "--profile" not in argv:
        raise ConfigError(f"{asked[0]} needs --profile. megaswift doctor alone looks at this machine.")
    if "--profile" in argv:
        from megaswift.cli.plan import find_hardware  # the planner, which the other reports do not need
        from megaswift.launch.profile import describe

        sys.stdout.write(describe(find_hardware(config.hardware)))
    if "--measure" in argv:
        from megaswift.training.measure import measure  # torch

        sys.stdout.write(measure())
    if {"--profile", "--measure"} & set(argv):
        return 0
    findings = [*_machine(), *_packages(), *_programs(), *_conflicts()]
    if "--load" in argv:
        findings += _loaded()
    sys.stdout.write(_table(findings))
    return 0 if all(one.good for one in findings) else 1


def _machine() -> list[Finding]:
    gpus = num_gpus()
    kind = "cuda, NCCL" if gpus else "cpu, gloo"
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        Finding(name="python", state=platform.python_version(), good=sys.version_info >= (3, 10)),
        Finding(
            name="machine",
            state=f"{platform.system()} {platform.machine()}",
            good=True,
            remark=platform.node(),
        ),
        Finding(
            name="cores", state=str(threads_per_rank(1)), good=True, remark=f"{memory_gib:.0f} GiB of memory"
        ),
        Finding(
            name="platform",
            state=kind,
            good=True,
            remark=f"{gpus} GPUs" if gpus else "no GPU: ranks run on the CPU",
        ),
    ]


def _packages() -> list[Finding]:
    findings = []
    for name, (lowest, why) in NEEDED.items():
        version = _version(name)
        old = version is not None and _numbers(version) < _numbers(lowest)
        remark = why if version and not old else f"{why}: pip install '{name}>={lowest}'"
        findings.append(
            Finding(
                name=name, state=version or "missing", good=version is not None and not old, remark=remark
            )
        )
    for name, why in OPTIONAL.items():
        findings.append(Finding(name=name, state=_version(name) or "not installed", good=True, remark=why))
    return findings


def _programs() -> list[Finding]:
    return [
        Finding(name=name, state="found" if shutil.which(name) else "not found", good=True, remark=why)
        for name, why in PROGRAMS.items()
    ]


def _conflicts() -> list[Finding]:
    """Return the versions that do not go together, by launch/versions.py and by what the packages require."""
    from megaswift.launch.versions import (  # packaging: time that --help need not pay
        REFUSED,
        RULES,
        WATCHED,
        conflicts,
        installed,
        unmet_requirements,
    )

    watched = installed(WATCHED)
    others = installed({name for rule in RULES for name in (rule.package, rule.other) if name is not None})
    found = [*conflicts({**watched, **others}), *unmet_requirements(watched)]
    good = Finding(
        name="versions", state="fit", good=True, remark=f"{len(RULES)} rules and the packages' own"
    )
    return [
        Finding(name="versions", state=one.effect, good=one.effect != REFUSED, remark=str(one))
        for one in found
    ] or [good]


def _loaded() -> list[Finding]:
    """Import each compiled package that is installed in a process of its own: one that fails may take it down."""
    findings = []
    for name, module in COMPILED.items():
        if _version(name) is None:
            continue
        words = [sys.executable, "-c", f"import torch, {module}"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=LOAD_S)
            said = (
                ""
                if done.returncode == 0
                else (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
            )
        except subprocess.TimeoutExpired:
            said = f"not within {LOAD_S} s"
        state = "fails" if said else "loads"
        findings.append(Finding(name=name, state=state, good=not said, remark=said))
    return findings


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def _table(findings: Sequence[Finding]) -> str:
    names, states = (max(len(getattr(one, of)) for one in findings) for of in ("name", "state"))
    return "".join(
        f"{'  ' if one.good else '! '}{one.name:<{names}}  {one.state:<{states}}  {one.remark}".rstrip()
        + "\n"
        for one in findings
    )
