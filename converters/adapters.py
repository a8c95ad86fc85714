"""LoRA adapters of Megatron's fused linears <-> a PEFT folder.

A Megatron module holds one pair A [R, in], B [out, R] for all the weights that it fuses. In a PEFT folder each weight has
a pair of its own:
- R = r: the weights share A. Export writes A once for each of them.
- R = weights * r: the adapter was read from a file whose A's differ. They are stacked, and B is block-diagonal, so that
  weight i sees block i only. While that holds, export writes back the r rows and columns of block i. Training makes the
  other blocks of B nonzero; each weight then needs all of A, and export writes pairs of rank R. Both are exact.
- An adapter that started from the weights is B A - B_0 A_0 (models/weight_starts.py): a pair of twice the rank, for the same base.

B is cut over ranks like the rows of the weight, A like its columns; the plan of the weight says where.
Modules that train whole, such as a head of scores, lie whole in the folder (modules_to_save).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megaswift.config.tuner import TunerConfig
from megaswift.converters.adapter_rows import (
    Adapted,
    adapted_tensors,
    adapter_rows,
    config_json,
    factor_shapes,
    module_of,
)
from megaswift.converters.export import (
    ExportReport,
    file_rows,
    is_writer,
    raw_bytes,
)
from megaswift.converters.live import TORCH_DTYPES, LiveParameter, as_matrix, live_parameters, rows_of
from megaswift.converters.load import LoadReport
from megaswift.converters.lora_targets import whole_tensors
from megaswift.converters.model_files import copy_tokenizer
from megaswift.converters.output_folder import OutputFolder
from megaswift.converters.peft_folder import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    LowRank,
    PeftAdapter,
    magnitude_name,
    share_a,
)
from megaswift.converters.plan import Piece, file_tensors
from megaswift.converters.selection import output_twin
from megaswift.converters.shards import RowWriter, plan_files
from megaswift.converters.table import Shard
from megaswift.converters.tensor_files import DTYPE_NAMES, Bits, TensorInfo
from megaswift.errors import WeightsError
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Coordinates, Layout, coordinates


def load_peft(
    chunks: Sequence[torch.nn.Module], meta: ModelMeta, layout: Layout, rank: int, adapter: PeftAdapter
) -> LoadReport:
    """Fill the LoRA parameters of this rank's chunks, and what the folder has whole; a weight that the folder does not adapt gets B = 0.

    The modules must have been made with the settings of `adapter.adopt` and the ranks of `adapter.ranks`. No rank talks
    to another. Raises WeightsError where a module has no adapter, or one of another rank.
    """
    started = time.monotonic()
    bytes_read, tensors = 0, 0
    for parameter in live_parameters(chunks, meta, layout, rank=rank):
        for piece in parameter.planned.pieces:
            if (whole := adapter.whole.get(piece.tensor)) is not None:
                _replace(parameter, piece, _tensor(whole.values, whole.dtype))
                bytes_read, tensors = bytes_read + whole.values.nbytes, tensors + 1
        pairs = [adapter.pairs.get(tensor) for tensor in parameter.planned.tensors]
        present = [pair for pair in pairs if pair]
        if present and parameter.adapted_module is None:
            raise WeightsError(
                f"{adapter.folder} adapts {parameter.planned.tensors[0]}, but {parameter.name} has no adapter in this "
                "model. Take --target_modules from the adapter."
            )
        if parameter.adapted_module is not None:
            _fill(parameter, parameter.adapted_module, pairs, adapter)
            bytes_read += sum(pair.a.nbytes + pair.b.nbytes for pair in present)
            tensors += 2 * len(present)
    return LoadReport(bytes_read=bytes_read, tensors=tensors, seconds=time.monotonic() - started)


@torch.no_grad()
def _replace(parameter: LiveParameter, piece: Piece, in_file_NC: torch.Tensor) -> None:
    """Take what this rank holds of a whole tensor of the file."""
    first, end = piece.cols
    target = rows_of(as_matrix(parameter.weight)[:, : end - first], piece.into)
    target.copy_(rows_of(in_file_NC[:, first:end], piece.rows).reshape(target.shape))
    parameter.settle()


@torch.no_grad()
def _fill(
    parameter: LiveParameter, module: Any, pairs: Sequence[LowRank | None], adapter: PeftAdapter
) -> None:
    a_RD, b_FR = module.lora_a.weight, module.lora_b.weight
    magnitude_F1 = None if module.lora_magnitude is None else module.lora_magnitude.weight.data[:, None]
    b_FR.zero_()  # rows of A that nothing fills keep their random start, so that they can train
    rank = max((len(pair.a) for pair in pairs if pair), default=len(a_RD))
    stacked = not share_a(pairs)
    needed = rank * len(pairs) if stacked else rank
    if len(a_RD) != needed:
        raise WeightsError(
            f"{adapter.folder} needs rank {needed} for {parameter.name}, which has rank {len(a_RD)}. "
            "Take --lora_rank from the adapter."
        )
    pieces = parameter.planned.pieces
    for number, (tensor, pair) in enumerate(zip(parameter.planned.tensors, pairs, strict=True)):
        if pair is None:
            continue
        start = number * rank if stacked else 0
        own = slice(start, start + len(pair.a))
        a_rD, b_Fr = _tensor(pair.a, pair.dtype), _tensor(pair.b, pair.dtype)
        if pair.scale != module.lora_scale:
            b_Fr = b_Fr.float() * (pair.scale / module.lora_scale)
        m_F1 = None if pair.magnitude is None else _tensor(pair.magnitude, pair.dtype)
        if parameter.planned.shard is Shard.DIM1:
            b_FR[:, own] = b_Fr.to(b_FR.dtype)
            if magnitude_F1 is not None and m_F1 is not None:
                magnitude_F1.copy_(m_F1)
            for piece in pieces:
                a_RD[own, : piece.cols[1] - piece.cols[0]] = a_rD[:, slice(*piece.cols)].to(a_RD.dtype)
            continue
        a_RD[own] = a_rD.to(a_RD.dtype)
        for piece in pieces:
            if piece.tensor == tensor:
                rows = slice(piece.rows.start, piece.rows.start + piece.rows.rows)
                for whole, part in ((b_FR.data[:, own], b_Fr), (magnitude_F1, m_F1)):
                    if whole is not None and part is not None:
                        target = rows_of(whole, piece.into)
                        target.copy_(part[rows].reshape(target.shape))


def _tensor(bits: Bits, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits).view(TORCH_DTYPES[dtype])


def save_peft(
    chunks: Sequence[torch.nn.Module],
    meta: ModelMeta,
    layout: Layout,
    rank: int,
    output: Path | str,
    *,
    tuner: TunerConfig,
    dtype: str,
    base_model: str | None = None,
    with_tokenizer: bool = False,
) -> ExportReport:
    """Write the adapters, and what trains whole beside them, as a PEFT folder that appears complete or not at all; every rank of the world calls it.

    `dtype` is the name of the dtype in the file, `base_model` the id or folder that peft is told. Beside a tokenizer peft's
    AutoPeftModelForCausalLM gives the base as many rows. Raises WeightsError on every rank when any rank cannot write.
    """
    started = time.monotonic()
    folder = OutputFolder(Path(output), rank=rank, world=layout.world)
    everything = live_parameters(chunks, meta, layout, rank=rank)
    live = [one for one in everything if one.adapted_module is not None]
    adapted = adapted_tensors(live, meta, layout, tuner)
    whole = whole_tensors(meta, tuner)
    live += [one for one in everything if one.planned.tensors[0] in whole]
    shapes = file_tensors(meta)
    infos = [
        TensorInfo(name=name, dtype=DTYPE_NAMES[dtype], shape=shape, file=folder.growing, begin=0)
        for name, shape in factor_shapes(adapted, meta).items()
    ]
    if tuner.use_dora:
        infos += [
            TensorInfo(
                name=magnitude_name(module_of(tensor)),
                dtype=DTYPE_NAMES[dtype],
                shape=shapes[tensor][:1],
                file=folder.growing,
                begin=0,
            )
            for tensor in adapted
        ]
    names = {tensor: _names_in_folder(tensor, meta) for tensor in shapes if tensor in whole}
    infos += [
        TensorInfo(name=name, dtype=DTYPE_NAMES[dtype], shape=shapes[tensor], file=folder.growing, begin=0)
        for tensor, both in names.items()
        for name in both
    ]
    files = plan_files(
        infos, folder.growing, max_bytes=sum(info.num_bytes for info in infos), single=WEIGHTS_FILE
    )
    folder.prepare(files, replaces=CONFIG_FILE, source=meta.folder)

    writer = RowWriter(files)
    at = coordinates(layout, rank)
    for ordinal, parameter in enumerate(live):
        if is_writer(parameter.planned, ordinal, layout, at):
            for name, rows, first_row in _rows_in_folder(parameter, layout, at, adapted, names):
                slot = writer.slot(name)
                data = raw_bytes(rows[..., : slot.cols], slot.dtype)
                folder.attempt(partial(writer.write, name, data, first_row=first_row))
    folder.attempt(writer.close)
    base = base_model or str(meta.folder)
    saved = {module_of(name.removeprefix(PREFIX)) for both in names.values() for name in both}
    text = config_json(adapted, tuner, base_model=base, scores=bool(meta.scores), saved=saved)

    def add_small_files(path: Path) -> None:
        if with_tokenizer and meta.folder is not None:
            copy_tokenizer(meta.folder, path)
        (path / CONFIG_FILE).write_text(text, encoding="utf-8")

    folder.publish(add_small_files)
    return ExportReport(
        folder=folder.output, bytes_written=writer.bytes_written, seconds=time.monotonic() - started
    )


def _names_in_folder(tensor: str, meta: ModelMeta) -> list[str]:
    """Return the names of a tensor that trains whole: both of a tied matrix, which peft would part otherwise."""
    twin = output_twin(meta)
    both = twin if twin is not None and tensor in twin else (tensor,)
    return [PREFIX + name for name in both]


def _rows_in_folder(
    parameter: LiveParameter,
    layout: Layout,
    at: Coordinates,
    adapted: Adapted,
    names: Mapping[str, list[str]],
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield (tensor, rows, first row) of what this rank writes of one parameter; every rank of its tp group calls it."""
    if parameter.adapted_module is not None:
        rank, blocks = adapted[parameter.planned.tensors[0]]
        yield from adapter_rows(parameter, layout, at, rank=rank, blocks=blocks)
        return
    for tensor, rows, first_row in file_rows(parameter.weight, parameter.planned, layout, at):
        yield from ((name, rows, first_row) for name in names[tensor])
