"""This rank's parameters into a Hugging Face folder: every rank writes its own bytes, none gathers the model.

All ranks compute the same files and offsets from ModelMeta. Rank 0 creates the files in their full size and the owners
write rows at their offsets; only columns are gathered, one weight at a time, within a tensor-parallel group.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megaswift.converters.block_floats import encode_fp8
from megaswift.converters.carried import carried_tensors
from megaswift.converters.fp8_output import fp8_tensors, quantisation_config, scale_name, with_scales
from megaswift.converters.live import TORCH_DTYPES, LiveParameter, as_matrix, live_parameters, rows_of
from megaswift.converters.model_files import config_json, copy_model_files
from megaswift.converters.output_folder import OutputFolder
from megaswift.converters.plan import Parameter, Piece, file_tensors, float32_tensors
from megaswift.converters.reading import read_whole
from megaswift.converters.shards import OutputFile, RowWriter, index_json, parse_size, plan_files
from megaswift.converters.table import Shard
from megaswift.converters.tensor_files import DTYPE_NAMES, INDEX_FILE, TensorInfo, TensorReader
from megaswift.errors import ConfigError
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Coordinates, Layout, coordinates


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What one rank wrote."""

    folder: Path
    bytes_written: int
    seconds: float


def export_hf(
    chunks: Sequence[torch.nn.Module],
    meta: ModelMeta,
    layout: Layout,
    rank: int,
    output: Path | str,
    *,
    dtype: str,
    max_shard_size: str = "5GB",
    merge_lora: bool = False,
    quant_method: str | None = None,
    chat_template: str | None = None,
) -> ExportReport:
    """Write the model as a Hugging Face folder that appears complete or not at all; every rank of the world calls it.

    `dtype` is config.json's name of the weights' dtype in the files. `merge_lora` adds scale * B @ A to the weights that
    have adapters, in float32; without it adapters are left out. `quant_method` "fp8" writes the layers' linears in block
    FP8. `chat_template` is what the tokenizer lacks. An earlier export at `output` is replaced. Raises WeightsError on every rank when any rank cannot write,
    ConfigError where there is nothing to quantise or tensor-parallel ranks would cut its blocks.
    """
    fp8 = fp8_tensors(meta) if quant_method else frozenset()
    if fp8 and (layout.tp > 1 or layout.etp > 1):
        raise ConfigError(
            f"quant_method=fp8 needs whole matrices, and tp={layout.tp} etp={layout.etp} cut them. Export from a checkpoint."
        )
    started = time.monotonic()
    folder = OutputFolder(Path(output), rank=rank, world=layout.world)
    live = live_parameters(chunks, meta, layout, rank=rank)
    in_float32 = float32_tensors(meta)
    tensors = [
        TensorInfo(
            name=name,
            dtype="F32" if name in in_float32 else DTYPE_NAMES[dtype],
            shape=shape,
            file=folder.growing,
            begin=0,
        )
        for name, shape in file_tensors(meta).items()
    ]
    carried = carried_tensors(meta)
    tensors = [*with_scales(tensors, fp8), *carried.values()]
    files = plan_files(tensors, folder.growing, max_bytes=parse_size(max_shard_size))
    folder.prepare(files, replaces="config.json", source=meta.folder)

    writer = RowWriter(files)
    at = coordinates(layout, rank)
    for ordinal, parameter in enumerate(live):
        if is_writer(parameter.planned, ordinal, layout, at):
            weight = merged_weight(parameter) if merge_lora else parameter.weight
            for name, rows, first_row in file_rows(weight, parameter.planned, layout, at):
                if name in fp8:
                    folder.attempt(partial(_write_fp8, writer, name, rows))
                    continue
                slot = writer.slot(name)
                rows = rows[..., : slot.cols]  # columns beyond the file's are padded heads
                folder.attempt(partial(writer.write, name, raw_bytes(rows, slot.dtype), first_row=first_row))
    with TensorReader(carried) as reader:
        for name in list(carried)[rank :: layout.world]:
            data = np.ascontiguousarray(read_whole(reader, carried[name])).data.cast("B")
            folder.attempt(partial(writer.write, name, data, first_row=0))
    folder.attempt(writer.close)
    folder.publish(partial(_add_small_files, meta, files, dtype, fp8, chat_template))
    return ExportReport(
        folder=folder.output, bytes_written=writer.bytes_written, seconds=time.monotonic() - started
    )


def _write_fp8(writer: RowWriter, name: str, rows: torch.Tensor) -> None:
    """Write the whole of a matrix, [1, N, C] or in runs of rows, as FP8 values and scales."""
    matrix_NC = rows.detach().float().cpu().reshape(-1, writer.slot(name).cols).numpy()
    values_NC, scales_PQ = encode_fp8(matrix_NC)
    writer.write(name, values_NC.data.cast("B"), first_row=0)
    writer.write(scale_name(name), scales_PQ.data.cast("B"), first_row=0)


def _add_small_files(
    meta: ModelMeta,
    files: Sequence[OutputFile],
    dtype: str,
    fp8: frozenset[str],
    chat_template: str | None,
    folder: Path,
) -> None:
    if len(files) > 1:
        (folder / INDEX_FILE).write_text(index_json(files))
    if meta.folder is not None:
        copy_model_files(meta.folder, folder)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    shapes = {info.name: info.shape for file in files for info in file.tensors}
    config = quantisation_config(shapes, fp8) if fp8 else None
    text = config_json(meta, dtype=dtype, quantization=config)
    (folder / "config.json").write_text(text, encoding="utf-8")


def is_writer(planned: Parameter, ordinal: int, layout: Layout, at: Coordinates) -> bool:
    """Whether this rank's copy is the one that is written: the copies take turns, so that all of them write alike."""
    if planned.is_copy:
        return False
    if planned.is_expert:
        return at.edp == ordinal % layout.edp
    return at.dp * layout.cp + at.cp == ordinal % (layout.dp * layout.cp)


def file_rows(
    weight: torch.Tensor, planned: Parameter, layout: Layout, at: Coordinates
) -> list[tuple[str, torch.Tensor, int]]:
    """Return (tensor, its rows [runs, width, C], first row) of what this rank writes; every rank of its tp group calls it."""
    index, _ = tensor_rank(planned, layout, at)
    matrix_NC = as_matrix(weight)
    if planned.shard is Shard.DIM1:
        matrix_NC = gather_columns(matrix_NC, planned, layout, at)
    if planned.shard is not Shard.DIM0 and index != 0:
        return []
    if planned.pieces and planned.pieces[0].slab is not None:
        return [_transposed(matrix_NC, planned.pieces)]
    assert all(piece.rows.is_contiguous for piece in planned.pieces), f"{planned.name}: scattered rows"
    return [(piece.tensor, rows_of(matrix_NC, piece.into), piece.rows.start) for piece in planned.pieces]


def _transposed(matrix_NC: torch.Tensor, pieces: Sequence[Piece]) -> tuple[str, torch.Tensor, int]:
    """Return (tensor, its rows [1, C, N], first row) of a matrix that a rank holds whole and the file packs transposed."""
    in_file_NC = torch.empty_like(matrix_NC)
    for piece in pieces:
        target = rows_of(in_file_NC, piece.rows)
        target.copy_(rows_of(matrix_NC, piece.into).reshape(target.shape))
    slab = pieces[0].slab
    assert slab is not None, f"{pieces[0].tensor} is not packed"
    return pieces[0].tensor, in_file_NC.T[None], slab * matrix_NC.shape[1]


def tensor_rank(planned: Parameter, layout: Layout, at: Coordinates) -> tuple[int, int]:
    """Return this rank's index among the ranks that share the parameter, and how many they are."""
    return (at.etp, layout.etp) if planned.is_expert else (at.tp, layout.tp)


def gather_columns(
    matrix_NC: torch.Tensor, planned: Parameter, layout: Layout, at: Coordinates
) -> torch.Tensor:
    """Return the columns of all ranks of the tensor-parallel group on its first rank, and the input elsewhere."""
    index, parts = tensor_rank(planned, layout, at)
    if parts == 1:
        return matrix_NC
    if planned.is_expert:
        group = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    raw = matrix_NC.contiguous().view(torch.uint8)  # gloo does not know every dtype
    shares = [torch.empty_like(raw) for _ in range(parts)] if index == 0 else None
    dist.gather(raw, shares, group=group, group_dst=0)
    return (
        matrix_NC if shares is None else torch.cat([share.view(matrix_NC.dtype) for share in shares], dim=1)
    )


def raw_bytes(rows: torch.Tensor, dtype: str) -> memoryview:
    """Return the bytes of a tensor cast to the file's `dtype`, in row-major order."""
    rows = rows.detach().to(device="cpu", dtype=TORCH_DTYPES[dtype]).contiguous()
    return rows.view(-1).view(torch.uint8).numpy().data


@torch.no_grad()
def row_factors(parameter: LiveParameter) -> torch.Tensor | None:
    """Return what DoRA multiplies the rows of a merged weight by; every rank of the tensor-parallel group calls it."""
    module = parameter.adapted_module
    return None if module is None or module.lora_magnitude is None else module.row_factors()


def merged_weight(parameter: LiveParameter, factors_N: torch.Tensor | None = None) -> torch.Tensor:
    """Return W + scale * B @ A of this rank's shard, computed in float32; W itself where the module has no adapter.

    Column-parallel: B [N/tp, r], A [r, C]; row-parallel: B [N, r], A [r, C/tp]. Both give the shard's own rows and columns.
    With DoRA its rows have the trained norms: by `factors_N`, or else every rank of the tensor-parallel group calls it.
    """
    module, weight_NC = parameter.adapted_module, parameter.weight
    if module is None:
        return weight_NC
    update = module.lora_b().detach().float() @ module.lora_a().detach().float()
    merged_NC = weight_NC.float() + float(module.lora_scale) * update
    if module.lora_magnitude is not None:
        factors_N = row_factors(parameter) if factors_N is None else factors_N
        assert factors_N is not None, "DoRA"
        merged_NC *= factors_N[:, None]
    return merged_NC.to(weight_NC.dtype)
