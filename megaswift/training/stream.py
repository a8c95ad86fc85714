"""The data of a run that reads and tokenises its rows while it trains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megaswift.checkpoint.store import Checkpoint
from megaswift.config.run import RunConfig
from megaswift.data.batches import ValidationData
from megaswift.data.encode import EncodedSet
from megaswift.data.forms import form_of
from megaswift.data.load import load_data
from megaswift.data.prepared import prepared_folder
from megaswift.data.sources import FileSet, find_files, parse_source
from megaswift.data.stream import Position, Recipe, RowStream
from megaswift.data.stream_batches import StreamData, where_to_go_on
from megaswift.data.tokenizer import load_tokenizer, pad_id_of
from megaswift.data.windows import Shelf, Workshop
from megaswift.errors import DataError
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.agreement import agree, agree_on_first, alike
from megaswift.parallel.layout import Layout
from megaswift.training.setup import TOKENISED, Sets, batch_settings

WINDOWS = "windows"  # below the folder of tokens


def load_stream(
    run: RunConfig,
    meta: ModelMeta,
    layout: Layout,
    *,
    output_dir: Path,
    group: Any,
    checkpoint: Checkpoint | None,
) -> Sets:
    """Begin the stream of a resolved run, or go on with that of `checkpoint`; every rank of the world calls it.

    Rank 0 has windows made below the shared `output_dir`, where the others read them. Raises DataError.
    """
    folder, leads = output_dir / TOKENISED, dist.get_rank() == 0
    tokenizer = agree(lambda: load_tokenizer(str(meta.folder), trust_remote_code=run.model.trust_remote_code))
    files, nature = agree_on_first(lambda: _files_and_nature(run), group=group)  # rank 0 alone may see them
    position, first_item = None, 0
    if checkpoint is not None:
        stored, first_item = alike(lambda: where_to_go_on(checkpoint.folder, nature))
        position = Position.from_json(stored)
    has_val = agree_on_first(lambda: _save_validation(run, meta, tokenizer, folder / "val"), group=group)

    def open_shelf() -> Shelf:
        if not leads:
            return Shelf(folder / WINDOWS)
        stream = RowStream(files, run.data, seed=_seed(run), position=position)
        recipe = _recipe(run, meta, files)
        return Workshop(folder / WINDOWS, stream, recipe, processes=run.data.dataset_num_proc)

    shelf = agree(open_shelf, group=group)  # none looks before the first one has emptied the folder
    settings, pad_id = batch_settings(run, meta, layout), pad_id_of(tokenizer)
    train = StreamData(
        shelf,
        settings,
        pad_id=pad_id,
        nature=nature,
        first_window=0 if position is None else position.window,
        first_item=first_item,
        writes=leads,
    )
    first = agree(train.first_set, group=group)
    items = len(first.packs) if first.packs is not None else first.num_rows
    val = None
    if has_val:
        encoded = agree(lambda: EncodedSet.load(folder / "val"))
        val = agree(lambda: ValidationData(encoded, settings, pad_id=pad_id))
    return Sets(
        train=train, val=val, lengths=first.lengths, num_items=items, settings=settings, pad_id=pad_id
    )


def _files_and_nature(run: RunConfig) -> tuple[tuple[FileSet, ...], dict[str, Any]]:
    files = _files(run)
    return files, _nature(run, files)


def _files(run: RunConfig) -> tuple[FileSet, ...]:
    for name in run.data.dataset:
        if prepared_folder(Path(name).expanduser()):
            raise DataError(f"dataset={name} is prepared and needs no streaming: leave --streaming out.")
    sources = [parse_source(name, use_hf=run.model.use_hf) for name in run.data.dataset]
    for source in sources:
        if source.rows is not None:
            raise DataError(
                f"dataset={source.name}#{source.rows} draws from all rows, which streaming=true does not know. Leave one of them out."
            )
    return tuple(find_files(source) for source in sources)


def _seed(run: RunConfig) -> int:
    return run.training.seed if run.data.data_seed is None else run.data.data_seed


def _recipe(run: RunConfig, meta: ModelMeta, files: tuple[FileSet, ...]) -> Recipe:
    return Recipe(
        config=run.data,
        sets=files,
        tokenizer=str(meta.folder),
        trust_remote_code=run.model.trust_remote_code,
        max_length=run.data.max_length,
        stop_ids=tuple(meta.eos_token_ids),
        run=run,
        packing_length=run.data.packing_length if run.data.packing else None,
    )


def _nature(run: RunConfig, files: tuple[FileSet, ...]) -> dict[str, Any]:
    """Return what the items of the stream depend on: a checkpoint can be gone on from with the same alone."""
    data = run.data
    return {
        "dataset": [[[path.name, path.stat().st_size] for path in one.files] for one in files],
        "interleave_prob": data.interleave_prob,
        "stopping_strategy": data.stopping_strategy,
        "shuffle_buffer_size": data.shuffle_buffer_size,
        "dataset_shuffle": data.dataset_shuffle,
        "data_seed": _seed(run),
        "packing_length": data.packing_length if data.packing else None,
        "max_length": data.max_length,
        "truncation_strategy": data.truncation_strategy,
        "columns": data.columns,
    }


def _save_validation(run: RunConfig, meta: ModelMeta, tokenizer: Any, folder: Path) -> bool:
    """Tokenise --val_dataset whole; False where there is none."""
    if not run.data.val_dataset:
        return False
    alone = replace(run.data, dataset=run.data.val_dataset, val_dataset=[], interleave_prob=[])
    loaded = load_data(
        alone,
        tokenizer,
        max_length=run.data.max_length,
        seed=run.training.seed,
        use_hf=run.model.use_hf,
        stop_ids=meta.eos_token_ids,
        form=form_of(run),
    )
    loaded.train.save(folder)
    return True
