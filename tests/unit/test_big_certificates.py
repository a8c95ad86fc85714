"""Certificates of big models from their public config.json alone, quantised ones included: every parameter is accounted for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megaswift.cli.main import main

GOLDEN = Path(__file__).parent.parent / "golden"

# Without multi-token-prediction layers; the router's choice biases are among them. Against what is published:
# DeepSeek-V3 671B (2412.19437), Qwen3-235B-A22B 235B (2505.09388), Llama 3.1 405B (405,853,388,800 on its model page),
# Kimi K2 1T (1,026B on its model page), gpt-oss-120b 116.83B and -20b 20.91B (2508.10925, table 1), Gemma 4 26B A4B 25.2B (its
# model card; the scalars of the layers are among them).
PARAMETERS = {
    "deepseek-v3": 671_026_419_200,
    "gemma-4-26b-a4b-text": 25_233_141_790,
    "glm-4.5": 352_797_829_024,
    "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-20b": 20_914_757_184,
    "kimi-k2": 1_026_408_232_448,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-235b-a22b": 235_093_634_560,
}
LAYOUTS = {
    "deepseek-v3": ["--tp", "2", "--pp", "16", "--ep", "64", "--decoder_first_pipeline_num_layers", "4",
                    "--decoder_last_pipeline_num_layers", "1"],
    "gemma-4-26b-a4b-text": ["--tp", "8", "--pp", "2", "--ep", "16"],
    "gpt-oss-120b": ["--pp", "4", "--ep", "8"],
    "llama-3.1-405b": ["--tp", "8", "--pp", "9", "--vpp", "2"],
}  # fmt: skip


def config_of(name: str) -> Path:
    """Return a model's public config.json; the planner's tests draw from most of them."""
    found = [folder / f"{name}.json" for folder in (GOLDEN / "model_configs", GOLDEN / "big_configs")]
    return next(path for path in found if path.is_file())


CERTIFY = """
import json, sys
from megaswift.cli.main import main
for argv in json.loads(sys.argv[1]):
    assert main(argv) == 0
assert not {"torch", "transformers", "megatron"} & set(sys.modules), "a login node has no time for them"
"""


@pytest.fixture(scope="module")
def certificates() -> dict[str, str]:
    """Print every certificate in one fresh process, which must not load torch."""
    names = sorted(PARAMETERS)
    commands = [["convert", "--model", str(config_of(name)), "--dry_run"] for name in names]
    run = subprocess.run(
        [sys.executable, "-c", CERTIFY, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    return {name: "\n".join(lines[3 * at : 3 * at + 3]) for at, name in enumerate(names)}


@pytest.mark.parametrize("name", PARAMETERS)
def test_certificate_counts_every_published_parameter(certificates: dict[str, str], name: str) -> None:
    assert f"({PARAMETERS[name]})" in certificates[name]
    assert "every element of every tensor is held by exactly one shard" in certificates[name]


def test_glm_counts_its_mtp_layer_and_leaves_its_embeddings_out() -> None:
    # 2508.06471, table 1: 355B with the MTP layer, without word embeddings and output layer.
    config = json.loads(config_of("glm-4.5").read_text())
    hidden, heads, groups, head = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    attention = (
        2 * heads * head * hidden + 2 * groups * head * hidden + (heads + 2 * groups) * head + 2 * head
    )
    expert = 3 * hidden * config["moe_intermediate_size"]
    experts = (config["n_routed_experts"] + config["n_shared_experts"]) * expert
    router = config["n_routed_experts"] * (hidden + 1)
    mtp = attention + experts + router + 2 * hidden * hidden + 5 * hidden
    counted = PARAMETERS["glm-4.5"] - 2 * config["vocab_size"] * hidden + mtp
    assert round(counted / 1e9) == 355


@pytest.mark.parametrize("name", LAYOUTS)
def test_big_layouts_are_certified(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--model", str(config_of(name)), "--dry_run", *LAYOUTS[name]]) == 0
    assert f"({PARAMETERS[name]})" in capsys.readouterr().out
