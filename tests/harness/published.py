"""Published training runs (tests/golden/published_runs) as the planner's own inputs."""

import csv
import hashlib
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megaswift.errors import LaunchError
from megaswift.launch.catalogue import find_device
from megaswift.parallel.layout import Layout
from megaswift.planner.job import Candidate, Job, job_of
from megaswift.planner.machine import Machine
from megaswift.planner.software import Software
from megaswift.planner.stages import Stage, make_stages
from megaswift.planner.work import model_flops
from tests.harness.published_models import meta_of, mtp_layers_of
from tests.harness.published_software import sequence_parallel, software_of

FOLDER = Path(__file__).parent.parent / "golden" / "published_runs"
RUNS, OUT_OF_MEMORY = FOLDER / "runs.csv", FOLDER / "out_of_memory.csv"
CONFIGURATION = (
    "model layers seq_len gpu num_gpus precision gbs mbs tp pp cp ep vp etp recompute task".split()
)
RECOMPUTE = {"full": "full", "selective": "alternate"}  # "selective" is torchtitan's here
SFT_DOCUMENT = 512  # tokens; the SFT and LoRA rows pack short samples (SQuAD), whose attention is short


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published run, or one layout that was published as not fitting."""

    row: dict[str, str]
    job: Job
    candidate: Candidate
    machine: Machine
    software: Software
    stages: tuple[Stage, ...]
    step_time_s: float | None  # as published, or derived from the published rate
    peak_memory_gib: float | None
    fits: bool

    @property
    def name(self) -> str:
        """The row's identity."""
        return self.row["row_id"]

    @property
    def source(self) -> str:
        """Who published it, without the release."""
        words = self.row["source"].split()
        return " ".join(words[:2]) if words[0] in ("NeMo", "MoE", "Megatron-LM") else words[0]

    @property
    def is_whole(self) -> bool:
        """Say whether the source tells everything that the prediction needs."""
        return self.row["full_spec"] == "1" or (not self.fits and bool(self.row["mbs"]))

    @property
    def is_pretraining(self) -> bool:
        """Say whether it is a pre-training run, not SFT or LoRA."""
        return self.row["task"] == "pretrain"

    @property
    def is_moe(self) -> bool:
        """Say whether the model has experts."""
        return self.job.meta.moe is not None

    @cached_property
    def configuration(self) -> str:
        """What was run; repetitions and later releases share it."""
        kernel = self.row["notes"].split(";")[0] if self.source == "Hagemann" else ""
        return "|".join(
            [
                self.source,
                kernel,
                str(self.candidate.layout.sequence_parallel),
                *(self.row[key] for key in CONFIGURATION),
            ]
        )

    @property
    def stratum(self) -> tuple[str, ...]:
        """Rows that are alike; each gives half of its configurations to calibration."""
        return (
            self.source,
            self.machine.device.name,
            self.row["precision"],
            str(self.is_moe),
            self.row["task"],
        )


def read_runs(runs: Path = RUNS, out_of_memory: Path | None = OUT_OF_MEMORY) -> list[Published]:
    """Return the rows of both files that say enough to be predicted."""
    found = _read(runs, fits=True)
    return found + (_read(out_of_memory, fits=False) if out_of_memory is not None else [])


def count_rows(*paths: Path) -> int:
    """Return the rows of files, also those that say too little to be predicted."""
    total = 0
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            total += sum(1 for _ in csv.DictReader(file))
    return total


def split(runs: list[Published]) -> tuple[list[Published], list[Published]]:
    """Return calibration and held-out rows: in every stratum, half of the configurations by the order of their hashes."""
    strata: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for run in runs:
        strata[run.stratum].add(run.configuration)
    chosen: set[str] = set()
    for configurations in strata.values():
        ordered = sorted(configurations, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
        chosen.update(ordered[: (len(ordered) + 1) // 2])
    return (
        [run for run in runs if run.configuration in chosen],
        [run for run in runs if run.configuration not in chosen],
    )


def number(text: str, default: float = 0.0) -> float:
    """Return a cell as a number."""
    return float(text) if text else default


def _read(path: Path, *, fits: bool) -> list[Published]:
    with path.open(newline="", encoding="utf-8") as file:
        return [published_from(row, fits=fits) for row in csv.DictReader(file) if _is_described(row)]


def _is_described(row: dict[str, str]) -> bool:
    """Say whether model, device and layout were published, for a device of the catalogue."""
    needed = ("hidden", "layers", "heads", "seq_len", "gbs", "num_gpus", "pp", "dp", "gpu")
    if not all(row[key] for key in needed):
        return False
    try:
        find_device(row["gpu"])
    except LaunchError:
        return False
    return True


def published_from(row: dict[str, str], *, fits: bool = True) -> Published:
    """Return a row as planner input."""
    device = find_device(row["gpu"])
    world = int(row["num_gpus"])
    layout = _layout(row, world)
    packed = row["task"] in ("sft", "lora")
    job = job_of(
        meta_of(row),
        seq_len=int(row["seq_len"]),
        global_batch=int(number(row["gbs"])),
        trained="lora" if row["task"] == "lora" else "full",
        document_len=SFT_DOCUMENT if packed else None,
        mtp_layers=mtp_layers_of(row),
    )
    return Published(
        row=row,
        job=job,
        candidate=Candidate(
            layout=layout,
            micro_batch=int(number(row["mbs"], 1)),
            precision=row["precision"],
            recompute=RECOMPUTE.get(row["recompute"].split(":")[0], "none"),
            cp_comm="a2a" if row["notes"].rstrip().endswith("CP comm a2a") else "p2p",
            fully_sharded=bool(row["fsdp"]),
        ),
        machine=Machine(device=device, num_devices=world, per_node=min(world, device.per_node)),
        software=software_of(row),
        stages=_stages(job, layout),
        step_time_s=_step_time_s(row, job),
        peak_memory_gib=number(row["peak_mem_gib"]) or None,
        fits=fits,
    )


def _layout(row: dict[str, str], world: int) -> Layout:
    tp = int(number(row["tp"], 1))
    etp = int(number(row["etp"], 1))
    if not row["etp"] and row["source"].startswith("MoE Parallel Folding") and "Folding" not in row["notes"]:
        etp = tp  # without folding, experts have the layout of attention
    return Layout(
        world=world,
        tp=tp,
        pp=int(number(row["pp"], 1)),
        vpp=int(number(row["vp"], 1)),
        cp=int(number(row["cp"], 1)),
        ep=int(number(row["ep"], 1)),
        etp=etp,
        sequence_parallel=tp > 1 and sequence_parallel(row),
    )


def _stages(job: Job, layout: Layout) -> tuple[Stage, ...]:
    """Spread the layers over the chunks; where they do not divide, the chunks at both ends have fewer."""
    kinds = job.parts.layers
    chunks = layout.pp * layout.vpp
    small, extra = divmod(len(kinds), chunks)
    from_end = (chunks - extra) // 2
    sizes = [small + int(chunks - extra - from_end <= chunk < chunks - from_end) for chunk in range(chunks)]
    starts = [sum(sizes[:chunk]) for chunk in range(chunks)]
    return make_stages(
        [
            [
                kind
                for chunk in range(stage, chunks, layout.pp)
                for kind in kinds[starts[chunk] : starts[chunk] + sizes[chunk]]
            ]
            for stage in range(layout.pp)
        ]
    )


def _step_time_s(row: dict[str, str], job: Job) -> float | None:
    """Return the published step time, or the one that the published rate implies."""
    time = number(row["step_time_s"]) or number(row["step_time_s_derived"])
    if time:
        return time
    peak = find_device(row["gpu"]).peak_flops.get("bf16", 0.0)
    rate = number(row["model_tflops_per_gpu"]) * 1e12 or number(row["mfu"]) / 100 * peak
    return model_flops(job) / (rate * int(row["num_gpus"])) if rate else None
