"""What can be found out before a job waits in a queue: the rules, the rows, the disk, and what the partition has."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from math import ceil
from pathlib import Path

from megaswift.config.dump import dump_run
from megaswift.config.reference import beside, has_teacher_here
from megaswift.config.rules import ResolvedRun, check_request, resolve
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError, DataError, LaunchError, ModelError
from megaswift.launch.quota import writable_bytes
from megaswift.logs import get_logger
from megaswift.metadata.count import count_parameters
from megaswift.metadata.hub import Files
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta
from megaswift.planner.ask import trained_of

log = get_logger("preflight")

GIB = 2**30
ENCODING_S = 300  # transformers from a cold file system, and a set in one large JSON file
ROW_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_run(run: RunConfig, *, world_size: int, platform_name: str) -> tuple[ModelMeta, ResolvedRun]:
    """Return the facts about the model and the resolved run; raises UserError for the first thing that is wrong."""
    meta = model_of(run)
    trained_of(run, meta)  # names that the model does not have are found here
    check_checkpoints(run, meta)
    check_new_tokens(run, meta)
    resolved = resolve(run, meta, world_size, platform_name)
    check_teacher(resolved.config, world_size=world_size, platform_name=platform_name)
    return meta, resolved


def check_teacher(run: RunConfig, *, world_size: int, platform_name: str) -> None:
    """Raise UserError unless the layout of a resolved run fits the teacher that stands beside its model, too."""
    name = run.preference.teacher_model
    if name is None or not has_teacher_here(run):
        return
    try:
        teacher = get_model_meta(
            name,
            use_hf=run.model.use_hf,
            trust_remote_code=run.model.trust_remote_code,
            token=run.model.hub_token,
        )
        resolve(beside(run, has_experts=teacher.moe is not None), teacher, world_size, platform_name)
    except (ConfigError, ModelError) as error:
        raise ConfigError(f"teacher_model={name} cannot teach this model here: {error}") from error


def model_of(run: RunConfig) -> ModelMeta:
    """Return the facts about the model, whose weights are on this machine's disk then; raises UserError."""
    check_request(run)
    assert run.model.model is not None, "checked by check_request"
    return get_model_meta(
        run.model.model,
        revision=run.model.model_revision,
        use_hf=run.model.use_hf,
        trust_remote_code=run.model.trust_remote_code,
        files=Files.ALL if run.model.reads_safetensors else Files.FACTS,
        token=run.model.hub_token,
    )


def check_checkpoints(run: RunConfig, meta: ModelMeta) -> None:
    """Raise CheckpointError unless --mcore_model and --mcore_ref_model hold what config.json describes, by what .metadata says.

    Their heads are left for later: a model that scores has another one.
    """
    named = [name for name in (run.model.mcore_model, run.preference.mcore_ref_model) if name is not None]
    if not named:
        return
    from megaswift.converters.dcp_model import find_checkpoint, stored_parameters  # numpy

    for name in named:
        checkpoint = find_checkpoint(Path(name))
        if name == run.model.mcore_model or run.preference.ref_model is None:
            stored_parameters(replace(meta, scores=0), checkpoint)


def check_new_tokens(run: RunConfig, meta: ModelMeta) -> None:
    """Raise ConfigError where the vocabulary would have to grow for --new_special_tokens, and cannot."""
    if run.model.new_special_tokens and meta.folder is not None:
        from megaswift.converters.new_tokens import view_of  # numpy

        view_of(meta, run.model.new_special_tokens, with_weights=run.model.reads_safetensors)


def check_rows(run: RunConfig) -> None:
    """Raise DataError for a data set that is a path (not an id) and is not there."""
    for entry in (*run.data.dataset, *run.data.val_dataset):
        path = Path(entry.rpartition("#")[0] if entry.rpartition("#")[2].isdigit() else entry).expanduser()
        looks_like_a_path = (
            path.is_absolute()
            or entry.startswith(("./", "../", "~"))
            or path.suffix in ROW_FILES  # a hub id may have a dot, too: teknium/OpenHermes-2.5
        )
        if looks_like_a_path and not path.exists():
            raise DataError(f"dataset={entry} is not there. Give the path as the compute nodes see it.")


def check_first_rows(run: RunConfig, meta: ModelMeta) -> None:
    """Encode the first rows of every data set that is here, and log bad ones; raises DataError for what training would refuse.

    It takes a process of its own and seconds, as the tokenizer needs transformers. Without a tokenizer here nothing is done.
    """
    if meta.folder is None or not any((meta.folder / name).exists() for name in TOKENIZER_FILES):
        log.info("the first rows are not encoded: the model's tokenizer is not on this machine")
        return
    with tempfile.TemporaryDirectory(prefix="megaswift-") as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(dump_run(run), encoding="utf-8")
        words = [sys.executable, "-m", "megaswift.data.first_rows", str(path)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=ENCODING_S)
        except subprocess.TimeoutExpired:
            log.warning("the first rows could not be encoded within %d s", ENCODING_S)
            return
    if done.returncode:
        log.warning(
            "the first rows could not be encoded: %s", (done.stderr.strip().splitlines() or ["?"])[-1]
        )
        return
    found = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        raise DataError(found["error"])
    for row in found["bad"]:
        log.warning("bad row: %s", row)
    for name in found["elsewhere"]:
        log.info("dataset=%s is not on this machine: its rows are not looked at", name)
    log.info(
        "encoded %d rows of the beginnings of the data sets, %d are bad", found["encoded"], len(found["bad"])
    )


def check_output(run: RunConfig, meta: ModelMeta) -> None:
    """Raise LaunchError where the run's folder cannot be written or has too little room for the checkpoints planned."""
    output = Path(run.checkpoint.output_dir)
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise LaunchError(
            f"output_dir={output} cannot be written below {there}. Choose another --output_dir."
        )
    each, planned = checkpoint_bytes(run, meta), planned_checkpoints(run)
    kept = sum(1 for path in output.glob("checkpoint-*") if path.suffix == "") if output.is_dir() else 0
    free, needed = writable_bytes(there), each * max(1, planned - kept)
    if free < needed:
        limit = run.checkpoint.save_total_limit
        raise LaunchError(
            f"output_dir={output} has room for {free / GIB:.1f} GiB, and the run writes {max(1, planned - kept)} checkpoints of about "
            f"{each / GIB:.1f} GiB. Free some space, choose another --output_dir, or keep fewer of them "
            f"(--save_total_limit is {'not set' if limit is None else limit}; --save_optim false leaves the optimizer out)."
        )


def planned_checkpoints(run: RunConfig) -> int:
    """Return how many checkpoints will be there at a time, one that is being written included.

    Where nobody knows how many steps the run has, it is two: the newest, and the next.
    """
    settings, training = run.checkpoint, run.training
    if settings.exit_after_save or settings.save_strategy == "no":
        return 1
    if settings.save_strategy == "epoch":
        saved = ceil(1.0 if training.num_train_epochs is None else training.num_train_epochs)
        if training.train_iters is not None:
            saved = 2  # the epochs in so many steps are not known
    elif training.train_iters is not None:
        saved = ceil(training.train_iters / settings.save_steps)  # the last step is saved too
    else:
        saved = 2
    # The oldest one goes after the newest is complete (checkpoint/save.py).
    return saved if settings.save_total_limit is None else min(saved, settings.save_total_limit + 1)


def check_files_for_nodes_without_network(run: RunConfig, meta: ModelMeta) -> None:
    """Raise ModelError where the weights are not on this machine's disk: nodes without a network could not fetch them."""
    if not run.model.reads_safetensors or meta.folder is None:
        return
    if not any(meta.folder.glob("*.safetensors")):
        raise ModelError(
            f"model={run.model.model} has no safetensors in {meta.folder}. Fetch them before the job starts: nodes often "
            "have no network."
        )


def checkpoint_bytes(run: RunConfig, meta: ModelMeta) -> int:
    """Return about how large one checkpoint is, from the size of the weights' files; 0 where those are not here.

    Full training: weights, fp32 masters and two moments of what trains, and the export. Of adapters the merged export is all that counts.
    """
    if meta.folder is None:
        return 0
    files = sum(file.stat().st_size for file in meta.folder.glob("*.safetensors"))
    parameters, weight = files // BYTES.get(meta.dtype, 2), BYTES[run.model.torch_dtype or "bfloat16"]
    if run.model.mcore_model is not None:
        parameters = count_parameters(meta).total
    export = weight if run.checkpoint.save_safetensors else 0
    if run.tuner.tuner_type != "full":
        return parameters * export if run.tuner.merge_lora else 0
    state = 3 * BYTES["float32"] if run.checkpoint.save_optim else 0
    # Without the optimizer the export alone is written, where there is one (training/setup.py).
    own = weight if run.checkpoint.save_optim or not export else 0
    trained = trained_of(run, meta)
    return (parameters if trained is None else trained.total) * (own + state) + parameters * export
