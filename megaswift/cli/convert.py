"""`megaswift convert`: Hugging Face folder <-> Megatron torch_dist checkpoint, on a CPU, without building the model."""

import os
import sys
import time
from math import lcm
from pathlib import Path
from typing import Any

from megaswift.cli.help import sections_help
from megaswift.config.convert import CheckConfig, ConvertConfig
from megaswift.config.parse import take_flags
from megaswift.converters.certificate import Certificate, certify
from megaswift.converters.check import check_files
from megaswift.converters.conversion import Conversion, carry_out
from megaswift.converters.dcp_model import find_checkpoint
from megaswift.converters.offline import to_hf, to_mcore
from megaswift.converters.quantised import read_model
from megaswift.converters.shards import parse_size
from megaswift.converters.tensor_files import INDEX_FILE, SINGLE_FILE, read_folder
from megaswift.errors import ConfigError
from megaswift.launch.environment import own_error_file
from megaswift.launch.local import die_with_parent, start_ranks, this_program
from megaswift.launch.start import plan_start
from megaswift.logs import get_logger, setup_logging
from megaswift.metadata.beside import MODEL_FILES, model_beside
from megaswift.metadata.files import read_json
from megaswift.metadata.hub import Files, locate
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.proven import write_note
from megaswift.metadata.read import get_model_meta, is_known, meta_from_config
from megaswift.parallel.layout import Layout

log = get_logger("convert")

USAGE = """\
usage: megaswift convert --model HF_MODEL --to mcore --output_dir FOLDER [--nproc N]
       megaswift convert --model CHECKPOINT --to hf --output_dir FOLDER [--hf_model HF_MODEL]
       megaswift convert --model MODEL_OR_CONFIG_JSON --dry_run [--tensor_model_parallel_size N ...]
       megaswift convert --model MODEL_OR_CONFIG_JSON --verify

Moves bytes; builds no model and needs no GPU. An interrupted conversion goes on where it stopped when the same command
is run again. The certificate says that every tensor of the file is used exactly once and every shard of the layout
filled; a gap is an error. --verify builds a small model of the same structure and runs it through transformers and through
the converter: exit code 0 where logits and gradients are equal, 1 where they differ. With --to it comes first. A model of an unknown type is taken for
one of a known family if keys, tensors and that comparison agree; a note beside it then lets every command read it.
"""
VERIFICATION_FAILED = 1


def run(argv: list[str]) -> int:
    """Run the command and return its exit code; raises UserError."""
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE + sections_help(ConvertConfig()))
        return 0
    if own_error_file():
        die_with_parent()
    config, rest = take_flags(ConvertConfig(), argv)
    if rest:
        raise ConfigError(f"{rest[0]} is not a flag of convert. `megaswift convert --help` lists them.")
    if config.source.model is None:
        raise ConfigError("model is missing. Say what to convert: --model FOLDER_OR_ID.")
    start = plan_start(os.environ, nproc_per_node=config.check.nproc, minimal_world=1)
    rank = start.rank.rank if start.rank else 0
    setup_logging(rank=rank)
    if config.check.dry_run:
        meta, _ = _read(config)
        sys.stdout.write(certificate_text(meta, certify(meta, layout_of(config.check))))
        return 0
    if config.check.verify and rank == 0 and not own_error_file():
        if not _verify(config):
            return VERIFICATION_FAILED
        if config.target.to is None:
            return 0
    if start.rank is None:
        _check(config)
        if start.world_size > 1:
            return start_ranks([*this_program(), "convert", *argv], nproc=start.nproc, node=start.node)
    return _convert(config, rank=rank, world=start.world_size)


def layout_of(check: CheckConfig) -> Layout:
    """Return the smallest layout with these axes."""
    per_stage = lcm(check.tp, check.ep * check.etp)
    return Layout(
        world=per_stage * check.pp,
        tp=check.tp,
        pp=check.pp,
        vpp=check.vpp,
        ep=check.ep,
        etp=check.etp,
        pp_first=check.pp_first,
        pp_last=check.pp_last,
    )


def certificate_text(meta: ModelMeta, certificate: Certificate) -> str:
    """Return what a certificate says, for people."""
    layout, billions = certificate.layout, certificate.num_parameters / 1e9
    axes = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "ep": layout.ep, "etp": layout.etp}
    named = " ".join(f"{name}={size}" for name, size in axes.items() if size > 1) or "one rank"
    return (
        f"{meta.model_type} ({certificate.family}): {certificate.num_tensors} tensors, {billions:.3f} billion parameters "
        f"({certificate.num_parameters})\n"
        f"{named}: {certificate.num_shards} shards, the largest of {certificate.largest_shard_elements} elements\n"
        "every element of every tensor is held by exactly one shard, every shard is filled\n"
    )


def _check(config: ConvertConfig) -> None:
    """Prove what can be proven before anything is written; raises UserError."""
    if config.target.to is None or config.target.output_dir is None:
        raise ConfigError("to and output_dir are needed: --to mcore or --to hf, and --output_dir FOLDER.")
    if config.target.quant_method is not None and config.target.to != "hf":
        raise ConfigError(
            "quant_method is for --to hf: a torch_dist checkpoint holds weights as they are trained. Leave it out."
        )
    meta, _ = _read(config)
    log.info(certificate_text(meta, certify(meta, layout_of(config.check))).rstrip().replace("\n", "; "))


def _verify(config: ConvertConfig) -> bool:
    """Print what a verification finds, and return whether it passed; a model of an unknown type must be proven to be of a known one."""
    # torch, transformers and Megatron: seconds that moving bytes need not pay
    from megaswift.parity.infer import infer
    from megaswift.parity.verify import verify

    trusted = {"trust_remote_code": config.source.trust_remote_code}
    raw, folder = _config_to_verify(config)
    if is_known(raw, folder):
        verdict = verify(raw, _read(config)[0], **trusted)
    else:
        has_weights = folder is not None and any(
            (folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)
        )
        tensors = read_folder(folder) if folder is not None and has_weights else None
        verdict = infer(raw, folder, tensors, **trusted).verdict
        log.info(
            f"model_type={verdict.model_type} is not declared; it computes what the family {verdict.family} does"
        )
        if folder is not None:
            _note(raw, folder, family=verdict.family, compared_with=verdict.compared_with)
    sys.stdout.write(verdict.text())
    return verdict.passed


def _config_to_verify(config: ConvertConfig) -> tuple[dict[str, Any], Path | None]:
    """Return a config.json and the folder that it is of; None where it stands alone."""
    source = config.source
    path = Path(str(source.model)).expanduser()
    if path.is_file():
        return read_json(path), None
    if config.target.to == "hf":
        folder = _model_of_checkpoint(config, path).folder
    else:
        folder = locate(
            str(source.model), revision=source.model_revision, use_hf=source.use_hf, token=source.hub_token
        )
    assert folder is not None, "it was read from one"
    return read_json(folder / "config.json"), folder


def _note(config: dict[str, Any], folder: Path, *, family: str, compared_with: str) -> None:
    try:
        write_note(config, folder, family=family, compared_with=compared_with)
    except OSError as error:
        log.warning(
            f"{folder} cannot be written ({error.strerror}): other commands will not know the family; copy the folder first"
        )


def _convert(config: ConvertConfig, *, rank: int, world: int) -> int:
    started = time.monotonic()
    meta, source = _read(config)
    conversion = _plan(config, meta, source)
    output = carry_out(
        conversion,
        Path(str(config.target.output_dir)),
        source=source,
        rank=rank,
        world=world,
        fsync=config.target.fsync,
    )
    if rank == 0:
        log.info(f"{output}: {conversion.num_bytes / 1e9:.2f} GB in {time.monotonic() - started:.1f} s")
    return 0


def _plan(config: ConvertConfig, meta: ModelMeta, source: Path) -> Conversion:
    target = config.target
    max_bytes = parse_size(target.max_shard_size)
    if target.to == "mcore":
        multiple = target.make_vocab_size_divisible_by
        return to_mcore(meta, source, dtype=target.torch_dtype, vocab_multiple=multiple, max_bytes=max_bytes)
    return to_hf(
        meta,
        find_checkpoint(source),
        dtype=target.torch_dtype,
        max_bytes=max_bytes,
        quant_method=target.quant_method,
    )


def _read(config: ConvertConfig) -> tuple[ModelMeta, Path]:
    """Return the facts about the model, its tensors checked where there are some, and the folder to convert."""
    source = config.source
    path = Path(str(source.model)).expanduser()
    if config.target.to == "hf":
        return _model_of_checkpoint(config, path), path
    if path.is_file():
        if config.target.to is not None and not config.check.dry_run:
            raise ConfigError(
                f"model={path} is a file. Give the folder; a config.json alone is enough for --dry_run and --verify only."
            )
        return meta_from_config(read_json(path), trust_remote_code=source.trust_remote_code), path.parent
    facts_only = config.check.dry_run or config.target.to is None
    folder = locate(
        str(source.model),
        revision=source.model_revision,
        use_hf=source.use_hf,
        files=Files.FACTS if facts_only else Files.ALL,
        token=source.hub_token,
    )
    meta = get_model_meta(folder, trust_remote_code=source.trust_remote_code)
    if not facts_only or any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        check_files(meta, read_model(meta, folder))
    return meta, folder


def _model_of_checkpoint(config: ConvertConfig, checkpoint: Path) -> ModelMeta:
    source = config.source
    folder: Path
    if source.hf_model is not None:
        folder = locate(
            source.hf_model, revision=source.model_revision, use_hf=source.use_hf, token=source.hub_token
        )
    else:
        beside = model_beside(checkpoint)
        if beside is None:
            raise ConfigError(
                f"model={checkpoint} has no {MODEL_FILES}/config.json beside it. Name the Hugging Face model that it is of: "
                "--hf_model FOLDER_OR_ID."
            )
        folder = beside
    return get_model_meta(folder, trust_remote_code=source.trust_remote_code)
