"""Quantised tensors of a file seen as the bfloat16 tensors that they stand for: block FP8 and MXFP4, by config.json's word.

A weight X in block FP8 lies beside its scales X_scale_inv; experts X in MXFP4 lie as X_blocks and X_scales. Everything
that reads a model folder sees one tensor X with the shape of the plain one. No torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megaswift.converters.block_floats import BLOCK, MX_BLOCK
from megaswift.converters.tensor_files import Packed, TensorInfo, read_folder
from megaswift.errors import WeightsError
from megaswift.metadata.meta import ModelMeta

SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_READS_AS = "BF16"  # whatever it is then cast to


def read_model(meta: ModelMeta, folder: Path) -> dict[str, TensorInfo]:
    """Return every tensor of a model folder as plain ones, read from headers alone; raises WeightsError."""
    return plain_tensors(meta, read_folder(folder))


def plain_tensors(meta: ModelMeta, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return `tensors` with each quantised one and its scales as one; raises WeightsError where they do not fit together."""
    method = quantisation_method(meta)
    if method is None:
        return dict(tensors)
    if method == "fp8":
        return _with_fp8(meta, tensors)
    if method == "mxfp4":
        return _with_mxfp4(tensors)
    raise WeightsError(
        f"quant_method={method} of {meta.folder or meta.model_type} cannot be read; fp8 and mxfp4 can. "
        "Take the model's bfloat16 files."
    )


def quantisation_method(meta: ModelMeta) -> str | None:
    """Return quant_method of config.json, None for plain weights."""
    if meta.quantization is None:
        return None
    return str(meta.quantization.get("quant_method", "unknown"))


def files_of(info: TensorInfo) -> tuple[TensorInfo, ...]:
    """Return the tensors of the file that a tensor is made of: itself, or values and scales."""
    return (info.packed.values, info.packed.scales) if info.packed else (info,)


def _with_fp8(meta: ModelMeta, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    assert meta.quantization is not None
    block = meta.quantization.get("weight_block_size")
    if block not in (None, [BLOCK, BLOCK]):  # None: one scale for each weight
        raise WeightsError(
            f"weight_block_size={block} of {meta.folder or meta.model_type} cannot be read; blocks of {BLOCK} x {BLOCK} can. "
            "Take the model's bfloat16 files."
        )
    plain: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in tensors:
            continue
        if name.endswith(".activation_scale"):
            continue  # how servers round activations; no weight
        if info.dtype != "F8_E4M3":
            plain[name] = info
            continue
        scales = tensors.get(f"{name}_scale_inv")
        grid = tuple(-(-size // BLOCK) for size in info.shape)
        if scales is None or scales.dtype not in SCALE_DTYPES or scales.shape not in (grid, (), (1,)):
            found = f"{list(scales.shape)} of {scales.dtype}" if scales else "missing"
            raise WeightsError(
                f"{name} of {info.file} is {list(info.shape)} in FP8 and its scales {name}_scale_inv are {found} where "
                f"{list(grid)} are due. Download the file again."
            )
        if len(info.shape) != 2:
            raise WeightsError(
                f"{name} of {info.file} is {list(info.shape)} in FP8; only matrices can be read. Take the bfloat16 files."
            )
        plain[name] = replace(info, dtype=_READS_AS, packed=Packed(values=info, scales=scales))
    return plain


def _with_mxfp4(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    plain: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        stem = name.removesuffix("_blocks")
        if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors:
            continue
        if stem == name:
            plain[name] = info
            continue
        scales = tensors.get(f"{stem}_scales")
        half = MX_BLOCK // 2
        fits = scales is not None and (scales.shape, info.dtype, scales.dtype) == (
            info.shape[:-1],
            "U8",
            "U8",
        )
        if scales is None or not fits or len(info.shape) != 4 or info.shape[-1] != half:
            found = list(scales.shape) if scales else "missing"
            raise WeightsError(
                f"{name} of {info.file} is {list(info.shape)} of {info.dtype} and {stem}_scales are {found}: no MXFP4, which has "
                f"[experts, rows, columns / {MX_BLOCK}, {half}] bytes and a scale for each block. Download the file again."
            )
        experts, rows, groups, _ = info.shape
        # transformers keeps these experts as [in, out] and packs them as [out, in].
        plain[stem] = replace(
            info,
            name=stem,
            dtype=_READS_AS,
            shape=(experts, groups * MX_BLOCK, rows),
            packed=Packed(values=info, scales=scales),
        )
    return plain
