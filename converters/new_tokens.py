"""A model folder with more special tokens: links to its files, its own tokenizer, and longer matrices where ids go beyond them.

The new rows are the mean of the old ones, which leaves the probabilities of old tokens nearly as they are (Hewitt, "Initializing New
Word Embeddings for Pretrained Language Models", 2021). transformers' resize_token_embeddings draws them around it with 1e-9 of the rows' covariance;
without the noise a run that starts again finds the same model. Letters: V rows before, D model. No torch.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megaswift.config.model import ModelConfig
from megaswift.config.run import RunConfig
from megaswift.converters.dtypes import cast
from megaswift.converters.folders import check_space, growing_name, publish, sync
from megaswift.converters.plan import file_tensors, table_for
from megaswift.converters.shards import RowWriter, create, plan_files
from megaswift.converters.table import FACTS
from megaswift.converters.tensor_files import INDEX_FILE, Bits, TensorInfo, TensorReader, read_folder
from megaswift.errors import ConfigError, WeightsError, listing
from megaswift.logs import get_logger
from megaswift.metadata.hub import Files
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.new_tokens import link_folder, with_new_tokens
from megaswift.metadata.proven import NOTE
from megaswift.metadata.read import get_model_meta

logger = get_logger(__name__)

BLOCK = 1 << 14  # rows that are summed at once


@dataclass(frozen=True, kw_only=True)
class View:
    """What differs from the model's folder."""

    texts: Mapping[str, str]  # name -> text of a file
    added: tuple[str, ...]  # tokens that are new
    num_ids: int  # one more than the largest id
    grows: tuple[str, ...]  # tensors that get more rows
    tensors: Mapping[str, TensorInfo]  # of the folder, where some grow


def vocabulary_tensors(meta: ModelMeta) -> tuple[str, ...]:
    """Return the tensors of the model's file with a row for each token that it reads, or predicts."""
    rows = [row for row in table_for(meta).rows if "V" in row.shapes and FACTS[row.when](meta)]
    return tuple(name for row in rows for name in row.tensors)


def rows_that_do_not_train(run: RunConfig, meta: ModelMeta, whole: Collection[str]) -> list[str]:
    """Return a line about rows of new tokens that stay as they begin beside adapters; `whole` are the tensors that train."""
    still = [name.removesuffix(".weight") for name in vocabulary_tensors(meta) if name not in whole]
    if not run.model.new_special_tokens or run.tuner.tuner_type != "lora" or not still:
        return []
    return [
        f"new_special_tokens: their rows of {listing(still)} do not train. --modules_to_save "
        f"{' '.join(name.rpartition('.')[2] for name in still)} trains them."
    ]


def view_of(meta: ModelMeta, tokens: Sequence[str], *, with_weights: bool) -> View:
    """Return what differs once `tokens` are added; nothing is written. Raises ConfigError where the vocabulary cannot grow.

    The model's folder has its weights on this machine, if any are read.
    """
    assert meta.folder is not None, "a model with a tokenizer has a folder"
    found = with_new_tokens(meta.folder, tokens)
    texts = dict(found.texts)
    tensors: Mapping[str, TensorInfo] = {}
    grows: tuple[str, ...] = ()
    if found.num_ids > meta.vocab_size:
        _check_grows(meta)
        config = {**meta.raw, "vocab_size": found.num_ids}
        texts["config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        if with_weights:
            tensors = read_folder(meta.folder)
            grows = _growing(meta, tensors)
            if (meta.folder / INDEX_FILE).is_file():
                texts[INDEX_FILE] = _index(meta, tensors, grows, found.num_ids)
    return View(texts=texts, added=found.added, num_ids=found.num_ids, grows=grows, tensors=tensors)


def read_with_new_tokens(model: ModelConfig, home: Path) -> Path:
    """Return what model_with_new_tokens() does for a run's --model, whose files are fetched where they are missing."""
    assert model.model is not None, "checked by config/rules.py"
    meta = get_model_meta(
        model.model,
        revision=model.model_revision,
        use_hf=model.use_hf,
        trust_remote_code=model.trust_remote_code,
        files=Files.ALL if model.reads_safetensors else Files.FACTS,
        token=model.hub_token,
    )
    return model_with_new_tokens(meta, model.new_special_tokens, home, with_weights=model.reads_safetensors)


def model_with_new_tokens(meta: ModelMeta, tokens: Sequence[str], home: Path, *, with_weights: bool) -> Path:
    """Return the folder of the model with more special tokens, made below `home` unless it is there; one process calls it.

    Its name depends on what is in it, so that a run that starts again finds it. Raises UserError.
    """
    assert meta.folder is not None, "a model with a tokenizer has a folder"
    view = view_of(meta, tokens, with_weights=with_weights)
    if known := [token for token in tokens if token not in view.added]:
        logger.info("new_special_tokens: %s is a special token of the model already", listing(known))
    if not view.added:
        return meta.folder
    stats = [(info.file.name, info.file.stat()) for name, info in view.tensors.items() if name in view.grows]
    facts = [
        str(meta.folder.absolute()),
        dict(view.texts),
        [(name, one.st_size, one.st_mtime_ns) for name, one in stats],
    ]
    digest = hashlib.sha256(json.dumps(facts).encode())
    folder = home.absolute() / f".model-{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        try:
            _write(view, meta.folder, folder)
        except OSError as error:
            raise WeightsError(
                f"{folder}, the model with new_special_tokens, cannot be written: {error.strerror or error}."
            ) from error
        rows = (
            f"{len(view.grows)} matrices grow to {view.num_ids} rows"
            if view.grows
            else "rows are there for them"
        )
        logger.info("new_special_tokens: %d added in %s, %s", len(view.added), folder, rows)
    return folder


def _check_grows(meta: ModelMeta) -> None:
    assert meta.folder is not None
    reasons = {
        f"its weights are quantised ({(meta.quantization or {}).get('quant_method')})": meta.quantization
        is not None,
        "its layers have embeddings of tokens of their own": meta.layer_inputs is not None,
        f"{NOTE} is about a config.json with the old size": (meta.folder / NOTE).is_file(),
    }
    for reason, holds in reasons.items():
        if holds:
            raise _cannot_grow(meta, reason)


def _growing(meta: ModelMeta, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return the tensors with a row for each token; raises ConfigError where one is not among those that are known."""
    long = {name for name, info in tensors.items() if info.shape[:1] == (meta.vocab_size,)}
    # A file of a tied model may have the output layer, too.
    own = {name for row in table_for(meta).rows if "V" in row.shapes for name in row.tensors}
    grows = tuple(sorted(long & own))
    if others := sorted(long - own - file_tensors(meta).keys()):
        raise _cannot_grow(meta, f"{listing(others)} may have rows of tokens, too")
    if not grows:
        raise _cannot_grow(meta, f"none of {listing(vocabulary_tensors(meta))} has so many rows")
    return grows


def _cannot_grow(meta: ModelMeta, reason: str) -> ConfigError:
    return ConfigError(
        f"new_special_tokens needs more than the {meta.vocab_size} rows of {meta.model_type}'s vocabulary, which cannot grow: {reason}. "
        "Use tokens that the model has and that stand for nothing yet."
    )


def _index(meta: ModelMeta, tensors: Mapping[str, TensorInfo], grows: Sequence[str], num_ids: int) -> str:
    assert meta.folder is not None
    index = json.loads((meta.folder / INDEX_FILE).read_text(encoding="utf-8"))
    more = {name: (num_ids - meta.vocab_size) * tensors[name].cols for name in grows}
    metadata = index.setdefault("metadata", {})
    if "total_size" in metadata:
        metadata["total_size"] += sum(count * tensors[name].item_bytes for name, count in more.items())
    if "total_parameters" in metadata:
        metadata["total_parameters"] += sum(more.values())
    return json.dumps(index, indent=2) + "\n"


def _write(view: View, source: Path, folder: Path) -> None:
    """Write the folder under another name, then give it its own. Raises OSError."""
    growing = growing_name(folder)
    shutil.rmtree(growing, ignore_errors=True)
    changed = {view.tensors[name].file for name in view.grows}
    link_folder(source, growing, view.texts, without={path.name for path in changed})
    for name in view.texts:
        sync(growing / name)
    with TensorReader(view.tensors) as reader:
        for path in sorted(changed):
            _write_grown(view, reader, path, growing)
    publish(growing, folder, fsync=False)  # what is no link is on the disk


def _write_grown(view: View, reader: TensorReader, path: Path, growing: Path) -> None:
    """Write one file of the model with the tensors that grow in it. Raises OSError."""
    infos = [info for info in view.tensors.values() if info.file == path]
    grown = [
        replace(info, shape=(view.num_ids, *info.shape[1:])) if info.name in view.grows else info
        for info in infos
    ]
    files = plan_files(grown, growing, max_bytes=sys.maxsize, single=path.name)
    check_space(growing, files[0].num_bytes)
    create(files[0])
    writer = RowWriter(files)
    for info in infos:
        old_VD = reader.matrix(info.name)
        writer.write(info.name, old_VD.data.cast("B"), first_row=0)
        if info.name in view.grows:
            new_ND = np.tile(_mean(old_VD, info.dtype), (view.num_ids - len(old_VD), 1))
            writer.write(info.name, new_ND.data.cast("B"), first_row=len(old_VD))
    writer.close()


def _mean(old_VD: Bits, dtype: str) -> Bits:
    """Return the mean of the rows as one of them, summed in float64."""
    total_D = np.zeros(old_VD.shape[1])
    for start in range(0, len(old_VD), BLOCK):
        total_D += cast(old_VD[start : start + BLOCK], dtype, "F32").view(np.float32).sum(0, dtype=np.float64)
    mean_D = (total_D / len(old_VD)).astype(np.float32)
    return cast(mean_D.view(np.uint32), "F32", dtype)
