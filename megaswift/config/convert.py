"""Settings of `megaswift convert`."""

from dataclasses import dataclass, field

from megaswift.config.field import setting
from megaswift.config.model import DTYPES


@dataclass(frozen=True, kw_only=True)
class FromConfig:
    """What is converted."""

    model: str | None = setting(
        None,
        "Hugging Face folder or hub id, a torch_dist checkpoint, or (for --dry_run and --verify) a config.json alone",
        aliases=("model_id_or_path", "mcore_model"),
    )
    hf_model: str | None = setting(
        None,
        "where --to hf takes config.json and tokenizer from; default: what --to mcore has left beside the checkpoint",
    )
    model_revision: str | None = setting(None, "branch, tag or commit on the hub", aliases=("revision",))
    use_hf: bool = setting(True, "look ids up on Hugging Face rather than ModelScope")
    hub_token: str | None = setting(None, "token for private repositories")
    trust_remote_code: bool = setting(False, "allow code from the model folder to run")


@dataclass(frozen=True, kw_only=True)
class IntoConfig:
    """What is written."""

    to: str | None = setting(
        None,
        "mcore: a torch_dist checkpoint of Megatron-Core; hf: a Hugging Face folder",
        choices=("mcore", "hf"),
    )
    output_dir: str | None = setting(
        None, "folder to write; it appears complete or not at all", aliases=("save",)
    )
    torch_dtype: str | None = setting(
        None, "dtype of the weights; default: as they are", choices=DTYPES, aliases=("dtype",)
    )
    max_shard_size: str = setting("5GB", "largest file")
    quant_method: str | None = setting(
        None,
        "fp8: the layers' linears in blocks of 128 x 128 with a scale each, as DeepSeek's files; default: none",
        choices=("fp8",),
    )
    fsync: bool | None = setting(
        None,
        "wait until the output is on the disk and outlives a loss of power; default: from 16 GB on, and with several "
        "processes. Without it convert returns earlier, as `cp` does, and a rerun compares what is there with the source",
    )
    make_vocab_size_divisible_by: int = setting(
        1, "pad embedding and output layer of --to mcore with zero rows (Megatron-LM asks for 128 x tp)"
    )


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What is proven beforehand, and by how many processes the work is done."""

    dry_run: bool = setting(False, "print the certificate and write nothing")
    verify: bool = setting(
        False,
        "run a small model of the same structure through transformers and through the converter; logits and gradients "
        "must be equal",
    )
    tp: int = setting(
        1,
        "layout of the certificate: tensor parallel size",
        flag="tensor_model_parallel_size",
        aliases=("tp",),
    )
    pp: int = setting(1, "pipeline stages", flag="pipeline_model_parallel_size", aliases=("pp",))
    vpp: int = setting(
        1, "model chunks on a stage", flag="virtual_pipeline_model_parallel_size", aliases=("vpp",)
    )
    ep: int = setting(1, "expert parallel size", flag="expert_model_parallel_size", aliases=("ep",))
    etp: int = setting(
        1, "tensor parallel size inside an expert", flag="expert_tensor_parallel_size", aliases=("etp",)
    )
    pp_first: int | None = setting(
        None, "layers on the first stage", flag="decoder_first_pipeline_num_layers"
    )
    pp_last: int | None = setting(None, "layers on the last stage", flag="decoder_last_pipeline_num_layers")
    nproc: int | None = setting(
        None, "processes on this node that share the work; default: those that a launcher has started, or one"
    )


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """All settings of a conversion."""

    source: FromConfig = field(default_factory=FromConfig)
    target: IntoConfig = field(default_factory=IntoConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
