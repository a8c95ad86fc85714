"""Plan a conversion between a Hugging Face folder and a torch_dist checkpoint: which bytes go where, no model, no GPU.

Both directions walk the plan of one rank that holds the whole model: its parameters are the tensors of a torch_dist
checkpoint, however many ranks wrote it. So a conversion is a list of byte ranges to be copied, and of matrices to be
computed where the file packs them.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megaswift.converters.carried import CARRIED_FILE, carried_tensors
from megaswift.converters.certificate import certify
from megaswift.converters.check import check_files
from megaswift.converters.computed import Fp8, Transposed
from megaswift.converters.conversion import Conversion, Part, Stretch
from megaswift.converters.copying import Literal, Span
from megaswift.converters.dcp_items import saved_object
from megaswift.converters.dcp_metadata import FILE as METADATA
from megaswift.converters.dcp_metadata import write_metadata
from megaswift.converters.dcp_model import RELEASE, TRACKER, StoredParameter, stored_parameters, whole_model
from megaswift.converters.dcp_names import addresses, stacks_layers
from megaswift.converters.dcp_reader import DataFinder, copies_from
from megaswift.converters.dcp_writer import DcpWriter, into_parameter
from megaswift.converters.fp8_output import fp8_tensors, quantisation_config, scale_name, with_scales
from megaswift.converters.model_files import config_json, copy_model_files, model_files
from megaswift.converters.plan import EMBEDDING, TIED_OUTPUT, Piece, file_tensors, float32_tensors
from megaswift.converters.quantised import files_of, read_model
from megaswift.converters.shards import OutputFile, index_json, plan_files
from megaswift.converters.stripes import block
from megaswift.converters.tensor_files import DTYPE_NAMES, INDEX_FILE, TensorInfo
from megaswift.errors import CheckpointError, listing
from megaswift.metadata.beside import MODEL_FILES
from megaswift.metadata.meta import ModelMeta
from megaswift.parallel.layout import Layout, padded_vocab_size


def to_mcore(
    meta: ModelMeta, folder: Path, *, dtype: str | None, vocab_multiple: int, max_bytes: int
) -> Conversion:
    """Plan the way from a Hugging Face folder to a torch_dist checkpoint.

    `dtype` is config.json's name of the new dtype, None to keep the files'; what is quantised becomes bfloat16 first.
    Embedding and output layer get zero rows up to a multiple of `vocab_multiple`. Raises WeightsError where the files do
    not fit config.json.
    """
    folder = folder.absolute()
    tensors = read_model(meta, folder)
    check_files(meta, tensors)
    writer = DcpWriter(max_bytes, folder=RELEASE)
    stacked = stacks_layers(meta)
    in_float32 = float32_tensors(meta)
    for parameter in whole_model(meta):
        if parameter.name in (EMBEDDING, TIED_OUTPUT):
            rows = padded_vocab_size(parameter.shape[0], tp=vocab_multiple)
            parameter = replace(parameter, shape=(rows, *parameter.shape[1:]))
        chosen = DTYPE_NAMES[dtype] if dtype else None
        writer.add(
            parameter,
            addresses(parameter, meta, stacked=stacked),
            tensors,
            dtype="F32" if parameter.tensors[0] in in_float32 else chosen,
        )

    def begin(growing: Path) -> None:
        release = growing / RELEASE
        write_metadata(release / METADATA, writer.tensors, writer.objects)
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        (release / "metadata.json").write_text(json.dumps(backends))
        _write_common(release / "common.pt", stacked=stacked)
        (growing / TRACKER).write_text(RELEASE)
        (growing / MODEL_FILES).mkdir(exist_ok=True)
        copy_model_files(folder, growing / MODEL_FILES)
        (growing / MODEL_FILES / "config.json").write_text(
            config_json(meta, dtype=dtype or meta.dtype), encoding="utf-8"
        )

    parts = (*writer.parts(), *_carried_part(carried_tensors(meta, tensors)))
    small = (*model_files(folder), folder / "config.json")
    return Conversion(parts=parts, facts=_facts(meta, "hf to mcore"), begin=begin, small=small)


def _carried_part(carried: Mapping[str, TensorInfo]) -> Iterator[Part]:
    """Yield the file that keeps the tensors which the model does not hold, for the way back, if there are any."""
    if carried:
        (file,) = plan_files(carried.values(), Path(MODEL_FILES), max_bytes=2**63, single=CARRIED_FILE)
        stretches = [_header(file)]
        for info in file.tensors:
            source = carried[info.name]
            span = _carry(source, info)
            stretches.append(Stretch(spans=(span,), summed=files_of(source)))
        yield Part(name=str(file.path), num_bytes=file.num_bytes, stretches=tuple(stretches))


def _header(file: OutputFile) -> Stretch:
    return Stretch(spans=(Literal(at=0, data=file.header),), summed=())


def _carry(source: TensorInfo, target: TensorInfo) -> Span:
    """Return what fills a tensor with one of the same shape."""
    whole = block(0, source.rows)
    piece = Piece(tensor=source.name, rows=whole, cols=(0, source.cols), into=whole)
    return into_parameter(piece, source, target.begin, target.dtype)


def to_hf(
    meta: ModelMeta, checkpoint: Path, *, dtype: str | None, max_bytes: int, quant_method: str | None = None
) -> Conversion:
    """Plan the way from a torch_dist checkpoint, written under any layout, to a Hugging Face folder.

    `checkpoint` is the folder with .metadata; what it holds beside the model (optimizer, random states) is left out.
    `quant_method` "fp8" writes the layers' linears in block FP8. Raises CheckpointError where a parameter is missing or
    has another shape, ConfigError where there is nothing to quantise.
    """
    fp8 = fp8_tensors(meta) if quant_method else frozenset()
    sources = _Sources.read(meta, checkpoint.absolute())
    carried = carried_tensors(meta)
    in_float32 = float32_tensors(meta)
    shapes = file_tensors(meta)
    if missing := shapes.keys() - sources.parameters.keys():  # a head of scores
        raise CheckpointError(
            f"{checkpoint} lacks {listing(missing)}. It does not hold a model as config.json describes it."
        )
    plain = [
        TensorInfo(name=name, dtype=sources.dtype(name), shape=shape, file=Path(), begin=0)
        for name, shape in shapes.items()
    ]
    plain = [
        replace(info, dtype="F32" if info.name in in_float32 else DTYPE_NAMES[dtype] if dtype else info.dtype)
        for info in plain
    ]
    wanted = [*with_scales(plain, fp8), *carried.values()]
    files = plan_files(wanted, Path(), max_bytes=max_bytes)  # below the output, wherever that grows
    weights = {scale_name(name): name for name in fp8}
    parts = []
    for file in files:
        stretches = [_header(file)]
        for info in file.tensors:
            spans: tuple[Span, ...]
            if info.name in carried:
                spans = (_carry(carried[info.name], info),)
            elif info.name in weights:
                spans = (sources.fp8(weights[info.name], shapes, scales_at=info.begin),)
            elif info.name in fp8:
                spans = (sources.fp8(info.name, shapes, values_at=info.begin),)
            else:
                spans = tuple(sources.spans(info))
            stretches.append(Stretch(spans=spans, summed=(info,)))
        parts.append(Part(name=file.path.name, num_bytes=file.num_bytes, stretches=tuple(stretches)))

    def begin(growing: Path) -> None:
        if len(files) > 1:
            (growing / INDEX_FILE).write_text(index_json(files))
        if meta.folder is not None:
            copy_model_files(meta.folder, growing)
        every = shapes | {name: info.shape for name, info in carried.items()}
        config = quantisation_config(every, fp8) if fp8 else None
        text = config_json(meta, dtype=dtype or meta.dtype, quantization=config)
        (growing / "config.json").write_text(text, encoding="utf-8")

    small = () if meta.folder is None else (*model_files(meta.folder), meta.folder / "config.json")
    return Conversion(parts=tuple(parts), facts=_facts(meta, "mcore to hf"), begin=begin, small=small)


@dataclass(frozen=True, kw_only=True)
class _Sources:
    """Where a checkpoint keeps what each tensor of the file is made of."""

    parameters: Mapping[str, list[StoredParameter]]  # by tensor
    finder: DataFinder

    @classmethod
    def read(cls, meta: ModelMeta, checkpoint: Path) -> "_Sources":
        """Return those of the whole model; raises CheckpointError."""
        parameters: dict[str, list[StoredParameter]] = defaultdict(list)
        for stored in stored_parameters(meta, checkpoint):
            for name in dict.fromkeys(piece.tensor for piece in stored.parameter.pieces):
                parameters[name].append(stored)
        return cls(parameters=parameters, finder=DataFinder(checkpoint))

    def dtype(self, name: str) -> str:
        """Return the dtype that the checkpoint holds a tensor in."""
        return self.parameters[name][0].tensor.dtype

    def spans(self, info: TensorInfo) -> Iterator[Span]:
        """Yield what fills a tensor of the file."""
        for stored in self.parameters[info.name]:
            if stored.parameter.pieces[0].slab is not None:
                yield self._transposed(info, stored)
                continue
            for piece in stored.parameter.pieces:
                if piece.tensor == info.name:
                    yield from copies_from(info, piece, stored, self.finder)

    def _transposed(self, info: TensorInfo, stored: StoredParameter) -> Transposed:
        parameter, tensor = stored.parameter, stored.tensor
        own = TensorInfo(name=info.name, dtype=tensor.dtype, shape=parameter.shape, file=Path(), begin=0)
        rows = block(0, parameter.shape[0])
        whole = Piece(tensor=info.name, rows=rows, cols=(0, own.cols), into=rows)
        slab = parameter.pieces[0].slab
        assert slab is not None, f"{info.name} is not packed"
        return Transposed(
            at=info.begin + slab * own.rows * own.cols * info.item_bytes,
            copies=tuple(copies_from(own, whole, stored, self.finder)),
            shape=parameter.shape,
            pieces=parameter.pieces,
            cast=(tensor.dtype, info.dtype),
        )

    def fp8(
        self,
        name: str,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        values_at: int | None = None,
        scales_at: int | None = None,
    ) -> Fp8:
        """Return what fills the values or the scales of a weight in FP8."""
        rows, cols = shapes[name]
        own = TensorInfo(name=name, dtype=self.dtype(name), shape=(rows, cols), file=Path(), begin=0)
        copies = [
            copy
            for stored in self.parameters[name]
            for piece in stored.parameter.pieces
            if piece.tensor == name
            for copy in copies_from(own, piece, stored, self.finder)
        ]
        return Fp8(
            copies=tuple(copies),
            shape=(rows, cols),
            dtype=own.dtype,
            values_at=values_at,
            scales_at=scales_at,
        )


def _facts(meta: ModelMeta, direction: str) -> dict[str, Any]:
    return {
        "format": 1,
        "direction": direction,
        "model_type": meta.model_type,
        "certificate": asdict(certify(meta, Layout())),
    }


def _write_common(path: Path, *, stacked: bool) -> None:
    """Write what Megatron keeps beside the tensors; version 3.0 is its order of rows in linear_qkv (checkpointing.py)."""
    content = {"non_homogeneous_layers": not stacked, "singleton_local_shards": False}
    path.write_bytes(saved_object({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}))
