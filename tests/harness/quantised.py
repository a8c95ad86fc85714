"""Model folders in block FP8 and MXFP4, and the bfloat16 tensors that transformers' own code makes of them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megaswift.kernels.block_fp8 import reference
from tests.harness.tiny import save_tiny

FP8_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def save_fp8(
    name: str, folder: Path, *, scale_dtype: torch.dtype = torch.float32, **overrides: Any
) -> dict[str, torch.Tensor]:
    """Save a tiny model with its layers' matrices in FP8, routers left out; return what it reads as."""
    save_tiny(name, folder, dtype=torch.bfloat16, **overrides)
    tensors = load_file(folder / "model.safetensors")
    if "deepseek" in name:
        tensors["model.layers.4.eh_proj.weight"] = torch.randn(64, 300).bfloat16()  # of its MTP layer
    in_file, plain = {}, {}
    for key, tensor in tensors.items():
        in_file[key] = plain[key] = tensor
        if tensor.dim() == 2 and ".layers." in key and not key.endswith("mlp.gate.weight"):
            values, scales = reference.quantise(
                tensor, block_rows=128, block_columns=128, dtype=torch.float8_e4m3fn, power_of_two=False
            )
            in_file[key], in_file[f"{key}_scale_inv"] = values, scales.to(scale_dtype)
            # Its loader refuses sizes that the blocks do not divide; its backward pass knows them.
            wide = _dequantize_fp8_weight(values, scales.to(scale_dtype), [128, 128], torch.float32)
            plain[key] = wide.bfloat16()
    save_file(in_file, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=FP8_CONFIG)
    return plain


def save_mxfp4(folder: Path, **overrides: Any) -> dict[str, torch.Tensor]:
    """Save a tiny gpt-oss with its experts in MXFP4; return what it reads as."""
    save_tiny("gpt_oss", folder, dtype=torch.bfloat16, **overrides)
    generator = torch.Generator().manual_seed(3)
    in_file, plain = {}, {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if not key.endswith("_proj") or ".experts." not in key:
            in_file[key] = plain[key] = tensor
            continue
        experts, cols, rows = tensor.shape
        blocks = torch.randint(
            0, 256, (experts, rows, cols // 32, 16), generator=generator, dtype=torch.uint8
        )
        scales = torch.randint(118, 124, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
        in_file[f"{key}_blocks"], in_file[f"{key}_scales"] = blocks, scales
        plain[key] = convert_moe_packed_tensors(blocks, scales)
    save_file(in_file, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return plain


def edit_config(folder: Path, **values: Any) -> None:
    """Change keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a model folder."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found
