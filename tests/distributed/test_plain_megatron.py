"""Checkpoints are Megatron-Core's own: a plain GPTModel loads what convert writes, and convert reads what it saves.

In the first test nothing of this project builds, loads or saves; only Megatron's calls to CUDA are redirected to the CPU, in
the harness.
"""

import gc
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from transformers import AutoModelForCausalLM

from megaswift.cli.main import main
from megaswift.config.model import ModelConfig
from megaswift.config.run import RunConfig
from megaswift.converters.export import export_hf
from megaswift.mcore.process_groups import initialise
from megaswift.metadata.read import get_model_meta
from megaswift.models.build import build_model
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import select_platform
from tests.harness.distributed import run_distributed
from tests.harness.quantised import tensors_of
from tests.harness.tiny import save_tiny

TOKENS = [[5, 17, 99, 130, 0, 3, 64, 8]]
VOCAB = 132  # 131 and a row of zeros, which tp=2 cuts evenly
COMMON: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 16, "normalization": "RMSNorm", "layernorm_epsilon": 1e-6, "gated_linear_unit": True,
    "activation_func": F.silu, "add_bias_linear": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "params_dtype": torch.float32, "masked_softmax_fusion": False, "bias_activation_fusion": False,
    "gradient_accumulation_fusion": False, "persist_layer_norm": False, "use_cpu_initialization": True,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0,
}  # fmt: skip
# name -> (what differs in Megatron's config, its axes). Latent attention cannot be built from Megatron's local modules
# alone (0.16.1: DotProductAttention takes no k_channels), gpt-oss's experts neither; this project's own modules stand in below.
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": ({}, {"tensor_model_parallel_size": 2}),
    "qwen2": ({"add_qkv_bias": True}, {"pipeline_model_parallel_size": 2}),
    "qwen3_moe": ({"qk_layernorm": True, **EXPERTS}, {"expert_model_parallel_size": 2}),
}
OWN_MODULES = ("deepseek_v3", "gpt_oss", "glm4_moe")


def plain_model(differs: dict[str, Any], axes: dict[str, int]) -> GPTModel:
    """Build Megatron's GPTModel on this rank, from Megatron's own calls."""
    parallel_state.initialize_model_parallel(**axes)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(**COMMON, **differs, **axes, pipeline_dtype=torch.float32)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm"
        ),
        vocab_size=VOCAB,
        max_sequence_length=512,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=10000,
    )


def load_plainly(model: GPTModel, source: Path) -> None:
    """Load as Megatron-LM does: what the checkpoint says of its own layout decides the keys of the model."""
    metadata = dist_checkpointing.load_content_metadata(str(source))
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    model.load_state_dict(dist_checkpointing.load(state, str(source))["model"], strict=True)


def save_plainly(model: GPTModel, target: Path) -> None:
    """Save by Megatron's own writer, and end the manager process that it starts and would leave behind."""
    process = multiprocessing.current_process()
    was_daemon, process._config["daemon"] = process.daemon, False  # type: ignore[attr-defined]  # daemons may start none
    try:
        dist_checkpointing.save(model.sharded_state_dict(), str(target))
    finally:
        process._config["daemon"] = was_daemon  # type: ignore[attr-defined]
        filesystem_async._results_queue = None
        gc.collect()


def load_and_save(
    rank: int, world_size: int, source: Path, target: Path, differs: dict[str, Any], axes: dict[str, int]
) -> torch.Tensor | None:
    """Load a checkpoint into a plain model, save it again, and return the logits on one rank."""
    model = plain_model(differs, axes)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    load_plainly(model, source)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    if rank == 0:
        target.mkdir()
    torch.distributed.barrier()
    save_plainly(model, target)
    if axes.get("pipeline_model_parallel_size", 1) > 1 or "num_moe_experts" in differs:
        # Megatron's router needs Transformer Engine by name (0.16.1, moe_utils.py, te_general_gemm).
        return None
    length = len(TOKENS[0])
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor(TOKENS), torch.arange(length)[None], mask)
    return logits[..., :131] if rank == 0 else None


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", CASES)
def test_plain_megatron_loads_what_we_write_and_we_read_what_it_saves(tmp_path: Path, name: str) -> None:
    differs, axes = CASES[name]
    source = save_tiny(name, tmp_path / "in")
    there = ["convert", "--model", str(source), "--to", "mcore", "--output_dir", str(tmp_path / "mcore")]
    assert main([*there, "--make_vocab_size_divisible_by", "2"]) == 0
    checkpoint = tmp_path / "mcore" / "release"
    logits = run_distributed(load_and_save, 2, checkpoint, tmp_path / "saved", differs, axes)
    if logits[0] is not None:
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(source)(torch.tensor(TOKENS)).logits
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    back = ["convert", "--model", str(tmp_path / "saved"), "--hf_model", str(source), "--to", "hf"]
    assert main([*back, "--output_dir", str(tmp_path / "hf")]) == 0
    before, after = tensors_of(source), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def load_into_own_modules(rank: int, world_size: int, source: Path, checkpoint: Path, output: Path) -> None:
    """Load a checkpoint by Megatron's calls into this project's model under ep=2, and export it."""
    layout = Layout(world=2, ep=2)
    initialise(layout, seed=1, timeout_min=2)
    meta = get_model_meta(source)
    run = RunConfig(model=ModelConfig(torch_dtype="float32"))
    (model,) = build_model(meta, run, layout, select_platform("cpu"))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.constant_(tensor, torch.nan)
    load_plainly(model, checkpoint)
    export_hf([model], meta, layout, rank, output, dtype="float32")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", OWN_MODULES)
def test_megatrons_loader_finds_every_tensor_of_other_families(tmp_path: Path, name: str) -> None:
    source = save_tiny(name, tmp_path / "in")
    argv = ["convert", "--model", str(source), "--to", "mcore", "--output_dir", str(tmp_path / "mcore")]
    assert main(argv) == 0
    run_distributed(load_into_own_modules, 2, source, tmp_path / "mcore" / "release", tmp_path / "hf")
    before, after = tensors_of(source), tensors_of(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
