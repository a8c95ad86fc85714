"""What can be found out before a job waits in a queue: the rules, the rows, the disk, and what the partition has."""

import os
import shutil
from pathlib import Path

from megaswift.config.rules import ResolvedRun, check_request, resolve
from megaswift.config.run import RunConfig
from megaswift.errors import DataError, LaunchError, ModelError
from megaswift.metadata.hub import Files
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_run(run: RunConfig, *, world_size: int, platform_name: str) -> tuple[ModelMeta, ResolvedRun]:
    """Return the facts about the model and the resolved run; raises UserError for the first thing that is wrong."""
    meta = model_of(run)
    return meta, resolve(run, meta, world_size, platform_name)


def model_of(run: RunConfig) -> ModelMeta:
    """Return the facts about the model, whose weights are on this machine's disk then; raises UserError."""
    check_request(run)
    assert run.model.model is not None, "checked by check_request"
    return get_model_meta(
        run.model.model,
        revision=run.model.model_revision,
        use_hf=run.model.use_hf,
        trust_remote_code=run.model.trust_remote_code,
        files=Files.FACTS if run.model.random_init else Files.ALL,
        token=run.model.hub_token,
    )


def check_rows(run: RunConfig) -> None:
    """Raise DataError for a data set that is a path (not an id) and is not there."""
    for entry in (*run.data.dataset, *run.data.val_dataset):
        path = Path(entry.rpartition("#")[0] if entry.rpartition("#")[2].isdigit() else entry).expanduser()
        looks_like_a_path = path.is_absolute() or entry.startswith(("./", "../", "~")) or path.suffix != ""
        if looks_like_a_path and not path.exists():
            raise DataError(f"dataset={entry} is not there. Give the path as the compute nodes see it.")


def check_output(run: RunConfig, meta: ModelMeta) -> None:
    """Raise LaunchError where the run's folder cannot be written or has too little room for one checkpoint."""
    output = Path(run.checkpoint.output_dir)
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise LaunchError(
            f"output_dir={output} cannot be written below {there}. Choose another --output_dir."
        )
    free, needed = shutil.disk_usage(there).free, checkpoint_bytes(run, meta)
    if free < needed:
        raise LaunchError(
            f"output_dir={output} has {free / GIB:.1f} GiB free, and one checkpoint takes about {needed / GIB:.1f} GiB. "
            "Free some space, or choose another --output_dir."
        )


def check_files_for_nodes_without_network(run: RunConfig, meta: ModelMeta) -> None:
    """Raise ModelError where the weights are not on this machine's disk: nodes without a network could not fetch them."""
    if run.model.random_init or meta.folder is None:
        return
    if not any(meta.folder.glob("*.safetensors")):
        raise ModelError(
            f"model={run.model.model} has no safetensors in {meta.folder}. Fetch them before the job starts: nodes often "
            "have no network."
        )


def checkpoint_bytes(run: RunConfig, meta: ModelMeta) -> int:
    """Return about how large one checkpoint is, from the size of the weights' files; 0 where those are not here.

    Full training: weights, fp32 masters and two moments, and the export. Adapters are small beside that.
    """
    if meta.folder is None or run.tuner.tuner_type != "full":
        return 0
    parameters = sum(file.stat().st_size for file in meta.folder.glob("*.safetensors")) // BYTES.get(
        meta.dtype, 2
    )
    weight = BYTES[run.model.torch_dtype or "bfloat16"]
    state = 3 * BYTES["float32"] if run.checkpoint.save_optim else 0
    return parameters * (weight + state + (weight if run.checkpoint.save_safetensors else 0))
