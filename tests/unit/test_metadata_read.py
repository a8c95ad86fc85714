"""A model folder: tokenizer, generation config, dtype, public configs and their sizes; and what reading costs."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megaswift.errors import ModelError
from megaswift.metadata.count import ParameterCount, count_parameters
from megaswift.metadata.read import get_model_meta, meta_from_config

CONFIGS = (
    Path(__file__).parent.parent / "golden" / "model_configs"
)  # public config.json files, text parts only

# Parameters as the model's publisher states them, in billions, or exactly where the weight files are public knowledge:
# Llama 3.1 model cards, Qwen3 technical report (table 1), DeepSeek-V3 report (671B, 37B active), Kimi-K2 model card
# (1T, 32B), gpt-oss model card (116.83B and 20.91B; 5.13B and 3.61B active without the input embedding),
# MiniMax-M2 (230B, 10B without embeddings), Llama 4 model card (109B and 400B with vision, 17B active), GLM-4.7
# (355B, 32B), Qwen3-Next (80B, 3B), Qwen3.5 (27B, 35B-A3B), Gemma 4 (26B-A4B), Mixtral (46.7B, 12.9B).
PUBLISHED: dict[str, tuple[float, float]] = {
    "deepseek-v3": (671.0, 37.6),
    "gemma-4-26b-a4b-text": (25.2, 3.8),
    "glm-4.7": (352.8, 33.6),
    "gpt-oss-120b": (116.8, 5.7),
    "gpt-oss-20b": (20.9, 4.2),
    "kimi-k2": (1026.4, 32.9),
    "llama-3.1-405b": (405.9, 405.9),
    "llama-3.1-8b": (8.0, 8.0),
    "llama-4-maverick-text": (400.7, 17.2),
    "llama-4-scout-text": (107.8, 17.2),
    "mimo-7b": (7.6, 7.6),
    "minimax-m2.5": (228.7, 11.0),
    "mixtral-8x7b": (46.7, 12.9),
    "qwen3-0.6b": (0.6, 0.6),
    "qwen3-235b-a22b": (235.1, 22.2),
    "qwen3-coder-480b-a35b": (480.2, 35.5),
    "qwen3-next-80b-a3b": (79.7, 3.9),
    "qwen3.5-27b-text": (26.9, 26.9),
    "qwen3.5-35b-a3b-text": (34.7, 3.5),
}
EXACT = {"llama-3.1-8b": 8030261248, "llama-3.1-405b": 405853388800, "qwen3-0.6b": 596049920}


def write(folder: Path, name: str, values: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "config.json", {"model_type": "llama", "eos_token_id": 2})
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_public_configs_are_read_and_have_the_published_size(name: str) -> None:
    count = count_parameters(meta_from_config(json.loads((CONFIGS / f"{name}.json").read_text())))
    assert (round(count.total / 1e9, 1), round(count.active / 1e9, 1)) == PUBLISHED[name]
    assert count.total == EXACT.get(name, count.total)


def test_every_public_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED)


def test_idle_experts_are_not_active_and_tied_embeddings_count_once() -> None:
    config = {
        "model_type": "mixtral", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 5, "num_experts_per_tok": 2,
    }  # fmt: skip
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 5 * 8 + 2 * 8  # q, k and v, o, router, norms
    expert = 3 * 8 * 10
    total = 2 * 800 + 3 * (layer + 5 * expert) + 8
    untied = count_parameters(meta_from_config(config))
    assert untied == ParameterCount(total=total, active=total - 3 * 3 * expert, embedding=1600)
    assert count_parameters(meta_from_config({**config, "tie_word_embeddings": True})).total == total - 800


def test_chat_template_is_text_or_the_default_of_a_named_list(folder: Path) -> None:
    assert get_model_meta(folder).template is None
    write(folder, "tokenizer_config.json", {"chat_template": "plain"})
    assert get_model_meta(folder).template == "plain"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chosen"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert get_model_meta(folder).template == "chosen"
    write(folder, "chat_template.jinja", "from a file")
    assert get_model_meta(folder).template == "from a file"
    write(folder, "additional_chat_templates/tool_use.jinja", "tools")
    assert get_model_meta(folder).template == "from a file"


def test_a_chat_template_of_another_shape_is_refused(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": [{"title": "default"}]})
    with pytest.raises(ModelError, match="neither text nor a list of name and template"):
        get_model_meta(folder)


def test_special_tokens_are_text_dictionaries_or_null(folder: Path) -> None:
    write(
        folder, "tokenizer_config.json", {"bos_token": None, "eos_token": {"content": "<e>", "lstrip": False}}
    )
    write(folder, "special_tokens_map.json", {"bos_token": "<b>", "pad_token": "<p>"})
    meta = get_model_meta(folder)
    assert (meta.bos_token, meta.eos_token, meta.pad_token) == (None, "<e>", "<p>")


def test_generation_ends_where_generation_config_says_before_config(folder: Path) -> None:
    assert get_model_meta(folder).eos_token_ids == (2,)
    write(folder, "generation_config.json", {"eos_token_id": [5, 7], "temperature": 0.6})
    meta = get_model_meta(folder)
    assert meta.eos_token_ids == (5, 7) and meta.generation["temperature"] == 0.6


def test_dtype_is_that_of_the_weights_where_the_config_is_silent(folder: Path) -> None:
    assert get_model_meta(folder).dtype == "bfloat16"
    header = json.dumps({"w": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    assert get_model_meta(folder).dtype == "float16"
    write(folder, "config.json", {"model_type": "llama", "dtype": "float32", "torch_dtype": "float16"})
    assert get_model_meta(folder).dtype == "float32"


def test_packed_weights_are_noted_from_either_file(folder: Path) -> None:
    assert get_model_meta(folder).quantization is None
    write(folder, "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}})
    assert get_model_meta(folder).quantization == {"quantization": {"quant_algo": "NVFP4"}}
    write(folder, "config.json", {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}})
    assert get_model_meta(folder).quantization == {"quant_method": "fp8"}


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00"])
def test_a_broken_config_is_named(folder: Path, text: str) -> None:
    write(folder, "config.json", text)
    with pytest.raises(ModelError, match=r"config\.json"):
        get_model_meta(folder)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        get_model_meta(tmp_path)


def test_reading_metadata_loads_nothing_heavy() -> None:
    script = (
        "import sys, megaswift.metadata.read; "
        "heavy = {'torch', 'transformers', 'datasets', 'megatron', 'numpy', 'huggingface_hub'} & set(sys.modules); "
        "print(*sorted(heavy))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.split() == []
