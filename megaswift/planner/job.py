"""What is to be trained (Job) and one way of doing it (Candidate)."""

from dataclasses import dataclass

from megaswift.converters.selection import Elements
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout
from megaswift.planner.parts import Parts, parts_of


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model, its batch and which parameters train."""

    meta: ModelMeta
    parts: Parts
    seq_len: int  # tokens in one row of the batch: a sample, a pair of them, or a pack
    global_batch: int  # rows in one optimizer step
    trained: str = "full"  # or "lora"
    lora_rank: int = 8
    adapts_mlp: bool = True  # the feed-forward parts have adapters too, those of experts with them
    lora_dropout: bool = False  # every adapter's input is kept once more, with its mask
    whole_modules: bool = False  # something of the model trains beside the adapters
    use_dora: bool = False  # every adapted output is kept before its rows are scaled
    four_bits: bool = False  # the frozen matrices are asked for in four bits
    document_len: int | None = None  # mean tokens of the documents in a pack; None: one document
    mtp_layers: int = 0  # multi-token-prediction layers that train
    # Frozen models in memory too, a reference or a teacher; None: a copy of the model
    beside: tuple[Parts | None, ...] = ()
    answers: int = 1  # samples that make one row of the batch: 2 for pairs
    optimizer: str = "adamw"  # Muon's state is of another size, and lies elsewhere: "muon", "dist_muon"
    drawn_layers: int | None = None  # of the model, that train at a time; None: all of them

    @property
    def frozen(self) -> bool:
        """Say whether the base weights have no gradients."""
        return self.trained == "lora"

    @property
    def drawn_share(self) -> float:
        """The share of the layers that train at a time."""
        return 1.0 if self.drawn_layers is None else min(1.0, self.drawn_layers / self.meta.num_layers)

    @property
    def is_muon(self) -> bool:
        """Say whether matrices of layers have one moment, and every data-parallel rank all master weights."""
        return self.optimizer in ("muon", "dist_muon")

    @property
    def max_length(self) -> int:
        """Tokens of a sample, as --max_length counts them."""
        return self.seq_len // self.answers

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.seq_len * self.global_batch


def job_of(
    meta: ModelMeta,
    *,
    seq_len: int,
    global_batch: int,
    trained: str = "full",
    lora_rank: int = 8,
    adapts_mlp: bool = True,
    lora_dropout: bool = False,
    use_dora: bool = False,
    four_bits: bool = False,
    document_len: int | None = None,
    mtp_layers: int = 0,
    beside: tuple[Parts | None, ...] = (),
    answers: int = 1,
    optimizer: str = "adamw",
    drawn_layers: int | None = None,
    trained_elements: Elements | None = None,
) -> Job:
    """Return the job of training `meta`, of which so much trains; None: all of it, or the adapters alone."""
    return Job(
        meta=meta,
        parts=parts_of(meta, trained_elements),
        seq_len=seq_len,
        global_batch=global_batch,
        trained=trained,
        whole_modules=trained == "lora" and trained_elements is not None,
        lora_rank=lora_rank,
        adapts_mlp=adapts_mlp,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        four_bits=four_bits,
        document_len=document_len,
        mtp_layers=mtp_layers,
        beside=beside,
        answers=answers,
        optimizer=optimizer,
        drawn_layers=drawn_layers,
    )


def recompute_modules(job: Job) -> list[str]:
    """Return what selective recomputation repeats: dense feed-forward parts whole, of experts the activation.

    The activation of experts can be repeated where they are one grouped GEMM, which LoRA's are not (mcore/configs.py).
    """
    dense = any(kind.mlp and not kind.is_moe for kind in job.parts.kinds)
    grouped = job.meta.moe is not None and not job.frozen
    return (["mlp"] if dense else []) + (["moe_act"] if grouped else [])


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way of running a job: the layout and what goes with it.

    recompute: "none"; "selective" (the dense feed-forward part, or the experts' activation); "full" (a layer keeps its
    input); "alternate" (every second product; torchtitan's operator-level selective checkpointing, not built here).
    """

    layout: Layout
    micro_batch: int = 1
    precision: str = "bf16"  # of GEMMs: fp32 fp16 bf16 fp8 mxfp8 nvfp4
    recompute: str = "none"
    recompute_layers: int | None = None  # with full: layers of a stage that are recomputed; None: all
    offload_optimizer: bool = False  # optimizer state and update in host memory
    four_bits: bool = False  # the frozen matrices, though nobody asked
    cp_comm: str = "p2p"
    fully_sharded: bool = False  # weights and gradients sharded over dp too (not built here)

    def micro_batches(self, job: Job) -> int:
        """Return the micro batches that one data-parallel rank runs in a step."""
        return max(1, job.global_batch // (self.layout.dp * self.micro_batch))

    @property
    def sequence_shards(self) -> int:
        """Ranks that share the tensors between tensor-parallel regions."""
        return self.layout.tp if self.layout.sequence_parallel else 1

    def tokens(self, job: Job) -> float:
        """Return T, the tokens of one micro batch that one cp rank sees."""
        return self.micro_batch * job.seq_len / self.layout.cp

    def routed_tokens(self, job: Job) -> float:
        """Return R, the tokens, counted once an expert, that one rank's experts see where routing is balanced."""
        assert job.meta.moe is not None, "only experts have routed tokens"
        return self.tokens(job) / self.sequence_shards * job.meta.moe.topk * self.layout.etp
