"""Read a model folder into a ModelMeta."""

from pathlib import Path
from typing import Any

from megaswift.errors import ModelError, nearest
from megaswift.metadata.catalogue import FAMILIES
from megaswift.metadata.family import Family
from megaswift.metadata.files import first_dtype, read_json, read_json_if_there
from megaswift.metadata.hub import Files, locate
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.proven import proven_family
from megaswift.metadata.tokenizer import read_tokenizer

DTYPES = ("bfloat16", "float16", "float32")


def get_model_meta(
    model: str | Path,
    *,
    revision: str | None = None,
    use_hf: bool = True,
    trust_remote_code: bool = False,
    files: Files = Files.FACTS,
    token: str | None = None,
) -> ModelMeta:
    """Return the facts about `model`, a folder or a hub id; raises ModelError.

    `use_hf` false looks ids up on ModelScope first. `files` says what a download brings: with Files.ALL the weights
    lie in the meta's folder too. No code of the folder runs here; `trust_remote_code` only words the refusal of a
    model_type that is not in the catalogue.
    """
    folder = locate(model, revision=revision, use_hf=use_hf, files=files, token=token)
    return meta_from_config(read_json(folder / "config.json"), folder, trust_remote_code=trust_remote_code)


def meta_from_config(
    config: dict[str, Any],
    folder: Path | None = None,
    *,
    trust_remote_code: bool = False,
    family: str | None = None,
) -> ModelMeta:
    """Return the facts of a config.json, and of the files beside it when `folder` is given; raises ModelError.

    `family` reads it as one of that family, whatever its model_type is.
    """
    name = str(folder) if folder else str(config.get("_name_or_path") or "the model")
    declared = FAMILIES[family] if family else _family(config, name, trust_remote_code, folder)
    facts = declared.evaluate(config, name=name)
    generation = read_json_if_there(folder / "generation_config.json") if folder else {}
    tokenizer = read_tokenizer(folder) if folder else None
    meta = ModelMeta(
        model_type=config["model_type"],
        architecture=(config.get("architectures") or [declared.architecture])[0],
        family=declared.name,
        folder=folder,
        dtype=_dtype(config, folder),
        template=tokenizer.template if tokenizer else None,
        bos_token=tokenizer.bos_token if tokenizer else None,
        eos_token=tokenizer.eos_token if tokenizer else None,
        pad_token=tokenizer.pad_token if tokenizer else None,
        eos_token_ids=_token_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
        quantization=config.get("quantization_config") or _quantisation_beside(folder),
        trust_remote_code="auto_map" in config,
        generation=generation,
        raw=config,
        **facts,
    )
    _check_sizes(meta, name)
    return meta


def is_known(config: dict[str, Any], folder: Path | None) -> bool:
    """Whether config.json's model_type is declared, or the model was proven to be of a declared family."""
    return config.get("model_type") in FAMILIES or (
        folder is not None and proven_family(config, folder) is not None
    )


def _family(config: dict[str, Any], name: str, trust_remote_code: bool, folder: Path | None) -> Family:
    """Return the declaration for config.json's model_type, or for the family that the model was proven to be.

    Raises ModelError naming the nearest known one.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            f"config.json of {name} has no model_type. It is not a Hugging Face model; check the folder."
        )
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if proven := proven_family(config, folder) if folder else None:
        return FAMILIES[proven]
    text_type = (config.get("text_config") or {}).get("model_type")
    if text_type in FAMILIES:
        raise ModelError(
            f"model_type={model_type} of {name} is multimodal, which is not supported. Its text part {text_type} is: "
            f"give a folder that holds the text model alone."
        )
    own_code = "its own code (auto_map) does not help: " if "auto_map" in config and trust_remote_code else ""
    raise ModelError(
        f"model_type={model_type} of {name} is not a known family; {own_code}a family needs a declaration in "
        f"megaswift/metadata/families.{nearest(model_type, FAMILIES)} `megaswift models` lists them; "
        f"`megaswift convert --verify --model {name}` looks for one that computes the same."
    )


def _dtype(config: dict[str, Any], folder: Path | None) -> str:
    """Return the dtype of the weights: what config.json says, else what the first weight file holds."""
    said = config.get("dtype") or config.get("torch_dtype")
    if said in (None, "auto"):
        return (first_dtype(folder) if folder else None) or "bfloat16"
    if said not in DTYPES:
        raise ModelError(f"dtype={said} in config.json is not supported.{nearest(str(said), DTYPES)}")
    return str(said)


def _check_sizes(meta: ModelMeta, name: str) -> None:
    """Raise ModelError where sizes contradict each other."""
    sizes = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "vocab_size",
    )
    for size in sizes:
        if vars(meta)[size] <= 0:
            raise ModelError(f"{size}={vars(meta)[size]} of {name} is not positive. Check config.json.")
    if meta.num_heads % meta.num_kv_heads:
        raise ModelError(
            f"num_key_value_heads={meta.num_kv_heads} of {name} does not divide "
            f"num_attention_heads={meta.num_heads}. Check config.json."
        )
    if meta.moe is not None and meta.moe.topk > meta.moe.num_experts:
        raise ModelError(
            f"{meta.moe.topk} experts a token of {name} are more than its {meta.moe.num_experts}. Check config.json."
        )


def _quantisation_beside(folder: Path | None) -> dict[str, Any] | None:
    """Return what ModelOpt writes into a file of its own about packed weights."""
    return (read_json_if_there(folder / "hf_quant_config.json") or None) if folder else None


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Return token ids that a file writes as one number, a list or null."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
