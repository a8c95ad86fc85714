"""Settings of `megaswift export`."""

from dataclasses import dataclass, field

from megaswift.config.field import setting
from megaswift.config.model import DTYPES


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What is exported: a training checkpoint, or a model, with an adapter or without."""

    checkpoint: str | None = setting(
        None, "a checkpoint-N folder, or a run's folder for its newest one", aliases=("mcore_model",)
    )
    model: str | None = setting(None, "Hugging Face folder or hub id", aliases=("model_id_or_path",))
    adapters: list[str] = setting([], "PEFT adapter to merge into --model")
    new_special_tokens: list[str] = setting(
        [],
        "special tokens that --model gets: words, and files .txt of them; a checkpoint has those of its run",
    )
    trust_remote_code: bool = setting(False, "allow code from the model folder to run")


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What is written."""

    output_dir: str | None = setting(None, "folder to write; it appears complete or not at all")
    exist_ok: bool = setting(False, "replace an earlier export there")
    merge_lora: bool = setting(False, "add the adapter to the weights instead of writing it as a PEFT folder")
    torch_dtype: str | None = setting(
        None, "dtype of the weights in the files; default: as in the model's files", choices=DTYPES
    )
    max_shard_size: str = setting("5GB", "largest safetensors file")
    quant_method: str | None = setting(
        None,
        "fp8: the layers' linears in blocks of 128 x 128 with a scale each, as DeepSeek's files; default: none",
        choices=("fp8",),
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """All settings of an export."""

    source: SourceConfig = field(default_factory=SourceConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
