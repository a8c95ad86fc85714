"""Settings of `megaswift plan`: which hardware, what may be chosen, and how the answer is shown."""

from dataclasses import dataclass, field

from megaswift.config.field import setting


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """The devices to plan for; without --gpu and --partition those of this machine."""

    gpu: str | None = setting(None, "kind of GPU: H100-80G, A100-40G, RTX4090 ...; `cpu` for processor ranks")
    num_gpus: int | None = setting(None, "GPUs in all (with --gpu cpu: ranks)", aliases=("gpus",))
    nodes: int | None = setting(None, "nodes, another way to say how many")
    gpus_per_node: int | None = setting(
        None, "GPUs that NVLink or PCIe joins; default: as usual for the kind"
    )
    partition: str | None = setting(None, "take kind and number from this Slurm partition")
    network_gbit: float | None = setting(None, "network of one GPU in Gbit/s; default: the catalogue's")
    gpu_memory_gib: float | None = setting(None, "memory of one GPU; default: the catalogue's")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What may be chosen. Parallel flags of `megaswift sft` that are given are kept, the others are searched."""

    precision: str = setting(
        "auto",
        "precision of GEMMs; auto: 16 bits, and a line about what FP8 would gain; best: the fastest of all",
        choices=("auto", "best", "bf16", "fp16", "fp32", "fp8", "mxfp8", "nvfp4"),
    )
    document_length: int | None = setting(
        None, "mean tokens of the samples in a pack; default: a pack is one sample"
    )
    offload: bool = setting(
        True,
        "where nothing fits: consider optimizer state in host memory, and LoRA's frozen base in four bits",
    )


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """How the answer is shown."""

    top: int = setting(5, "plans in the table")
    json: bool = setting(False, "print JSON instead of tables")
    plot: str | None = setting(
        None,
        "write a picture (.png, .svg or .pdf; needs matplotlib): memory of every stage, pipeline timeline",
    )


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The flags of `megaswift plan` beside those of `megaswift sft`."""

    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
