"""Compile every Triton kernel without a GPU, and say what ptxas says: registers, shared memory, spills.

python -m tests.harness.compile_kernels [--json]
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megaswift.kernels.block_fp8 import kernel as block_fp8
from megaswift.kernels.document_layout import kernel as document_layout
from megaswift.kernels.gather_rows import kernel as gather_rows
from megaswift.kernels.linear_cross_entropy import kernel as linear_cross_entropy
from megaswift.kernels.merge_attention import kernel as merge_attention
from megaswift.kernels.packing import kernel as packing
from megaswift.kernels.rotary import kernel as rotary

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200
FIRST_WITH_FP8 = 89  # conversion instructions


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """One kernel with the types and constants it is launched with."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What ptxas reports for one specimen and architecture."""

    name: str
    kernel: str
    architecture: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def specimens() -> Iterator[Specimen]:
    """Yield every kernel with the types of a training run."""
    for element in ("i16", "i64"):
        tile = {"BLOCK_F": packing.MAX_BLOCK_F}
        rows = {name: f"*{element}" for name in ("source", "chosen")}
        whole = {name: f"*{element}" for name in ("padded", "packed")}
        sizes = {"S": "i32", "F": "i32"}
        offsets, tile_s = {"cu_seqlens": "*i32"}, {**tile, "BLOCK_S": packing.BLOCK_S}
        yield _specimen(f"pack {element}", packing.pack_kernel, {**whole, **offsets, **sizes}, tile_s)
        yield _specimen(
            f"unpack {element}",
            packing.unpack_kernel,
            {**whole, **offsets, "padding": element, **sizes},
            tile_s,
        )
        sizes = {"C": "i32", "F": "i32"}
        index, tile_c = {"index": "*i64"}, {**tile, "BLOCK_C": gather_rows.BLOCK_C}
        yield _specimen(
            f"gather {element}",
            gather_rows.gather_kernel,
            {**rows, **index, "filler": element, **sizes},
            tile_c,
        )
        yield _specimen(f"scatter {element}", gather_rows.scatter_kernel, {**rows, **index, **sizes}, tile_c)
    documents = {"offsets": "*i32", "prompt_lengths": "*i64", "weights": "*fp32", "N": "i32", "T": "i32"}
    tokens = {"positions_out": "*i64", "weights_out": "*fp32"}
    yield _specimen(
        "document layout",
        document_layout.layout_kernel,
        {**documents, **tokens},
        {"BLOCK": document_layout.BLOCK},
    )
    for element in ("bf16", "fp32"):
        yield from _floating(element)
    for architectures in ((80,), tuple(a for a in ARCHITECTURES if a >= FIRST_WITH_FP8)):
        yield from _block_fp8(architectures, convert=architectures[0] >= FIRST_WITH_FP8)


def _specimen(
    name: str, kernel: triton.JITFunction, signature: dict[str, str], constants: dict[str, object]
) -> Specimen:
    return Specimen(name=name, kernel=kernel, signature=signature, constants=constants)


def _floating(element: str) -> Iterator[Specimen]:
    logits = {"logits": f"*{element}", "columns": "*i64", "lse": "*fp32", "row_stride": "i32", "V": "i32"}
    block = {"BLOCK": linear_cross_entropy.BLOCK}
    yield _specimen(
        f"loss statistics {element}",
        linear_cross_entropy.statistics_kernel,
        {**logits, "target": "*fp32", "maximum": "*fp32"},
        block,
    )
    yield _specimen(
        f"loss gradient {element}",
        linear_cross_entropy.gradient_kernel,
        {**logits, "weights": "*fp32"},
        block,
    )
    pointers = {"x": f"*{element}", "out": f"*{element}", "cos": "*fp32", "sin": "*fp32"}
    numbers = {"x_stride_t": "i32", "x_stride_h": "i32", "H": "i32", "K": "i32", "R": "i32", "sign": "fp32"}
    for kind, interleaved, half, rest in (
        ("half", False, 64, 0),
        ("interleaved", True, 64, 0),
        ("partial", False, 32, 64),
    ):
        tile = {
            "INTERLEAVED": interleaved,
            "BLOCK_H": rotary.MAX_BLOCK_H,
            "BLOCK_R": half,
            "BLOCK_REST": rest,
        }
        yield _specimen(f"rotary {kind} {element}", rotary.rotate_kernel, {**pointers, **numbers}, tile)
    parts = {"out_a": f"*{element}", "lse_a": "*fp32", "out_b": f"*{element}", "lse_b": "*fp32"}
    grads = {
        "grad_out": f"*{element}",
        "grad_lse": "*fp32",
        **{f"grad_{name}": kind for name, kind in parts.items()},
    }
    merged = {"out": f"*{element}", "lse": "*fp32"}
    sizes = {"M": "i32", "K": "i32"}
    tile = {"BLOCK_M": merge_attention.BLOCK_M, "BLOCK_K": 128}
    yield _specimen(f"merge {element}", merge_attention.merge_kernel, {**parts, **merged, **sizes}, tile)
    yield _specimen(
        f"merge backward {element}", merge_attention.merge_backward_kernel, {**parts, **grads, **sizes}, tile
    )


def _block_fp8(architectures: tuple[int, ...], *, convert: bool) -> Iterator[Specimen]:
    sizes = {"M": "i32", "N": "i32", "Q": "i32"}
    values = {"values": "*u8", "scales": "*fp32"}
    for mantissa, bias, largest in block_fp8.FORMATS.values():
        for rows, one_scale in ((128, True), (block_fp8.ROWS_PER_PROGRAM, False)):
            name = f"e{7 - mantissa}m{mantissa} {'128x128' if one_scale else '1x128'}"
            tile = {
                "ROWS": rows,
                "COLUMNS": 128,
                "ONE_SCALE": one_scale,
                "MANTISSA": mantissa,
                "BIAS": bias,
                "CONVERT": convert,
            }
            limits = {"LARGEST": largest, "POWER_OF_TWO": False}
            made = (
                _specimen(
                    f"quantise {name}",
                    block_fp8.quantise_kernel,
                    {"x": "*bf16", **values, **sizes},
                    {**tile, **limits},
                ),
                _specimen(
                    f"dequantise {name}",
                    block_fp8.dequantise_kernel,
                    {**values, "out": "*bf16", **sizes},
                    tile,
                ),
            )
            for specimen in made:
                yield replace(specimen, num_warps=block_fp8.NUM_WARPS[rows], architectures=architectures)


def compile_specimen(specimen: Specimen, architecture: int) -> Compiled:
    """Return what ptxas reports for `specimen` on sm_<architecture>."""
    names = specimen.kernel.arg_names
    signature = {name: specimen.signature.get(name, "constexpr") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=specimen.kernel, signature=signature, constexprs=specimen.constants, attrs=aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": specimen.num_warps}
    )
    ptx = compiled.asm["ptx"]
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert target, "PTX names its target"
    # Triton ships two assemblers: the newer one for Blackwell.
    assembler = (
        Path(triton.__file__).parent
        / "backends/nvidia/bin"
        / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [
            str(assembler),
            "-v",
            f"--gpu-name={target[1]}",
            str(file),
            "-o",
            str(file.with_suffix(".cubin")),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, said))

    return Compiled(
        name=specimen.name,
        kernel=specimen.kernel.__name__,
        architecture=architecture,
        registers=number(r"Used (\d+) registers"),
        shared_bytes=compiled.metadata.shared,
        stack_bytes=number(r"(\d+) bytes stack frame"),
        spill_bytes=number(r"(\d+) bytes spill"),
    )


def main() -> None:
    """Print the table and exit with 1 if anything spills."""
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET=1 is set. The interpreter cannot compile. Unset it.")
    rows = [
        compile_specimen(specimen, architecture)
        for specimen in specimens()
        for architecture in specimen.architectures
    ]
    if "--json" in sys.argv:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print(f"triton {triton.__version__}\n")
        print(
            "| kernel | sm | registers | shared bytes | stack bytes | spilled bytes |\n|---|--:|--:|--:|--:|--:|"
        )
        for row in rows:
            print(
                f"| {row.name} | {row.architecture} | {row.registers} | {row.shared_bytes} | {row.stack_bytes} | {row.spill_bytes} |"
            )
    sys.exit(any(row.spill_bytes for row in rows))


if __name__ == "__main__":
    main()
