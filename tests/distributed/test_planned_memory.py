"""What layers keep for their backward pass on a CPU, byte for byte, against what the planner counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from megaswift.parity.reference import save_random
from megaswift.tasks.task import run_model
from tests.harness.bench_memory import Model, predicted, rows_of, settings
from tests.harness.distributed import run_distributed
from tests.harness.tiny import EXPERTS, SIZES
from tests.harness.training import prepared

# Beside the large tensors a layer keeps a few numbers a row: sums of norms and scores, and tables of positions.
TOLERANCE = 0.05
WIDE: dict[str, Any] = {
    **SIZES,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1024,
}
MODELS = {
    "llama": Model(kind="llama", config=WIDE, seq_len=256),
    "qwen3": Model(kind="qwen3", config=WIDE, seq_len=256, micro_batch=2),
    "qwen3_moe": Model(
        kind="qwen3_moe", config={**WIDE, **EXPERTS, "moe_intermediate_size": 320}, seq_len=256
    ),
    "llama lora": Model(kind="llama", config=WIDE, seq_len=256, tuner={"tuner_type": "lora"}),
    "llama lora without dropout": Model(
        kind="llama", config=WIDE, seq_len=256, tuner={"tuner_type": "lora", "lora_dropout": 0.0}
    ),
    "llama dora": Model(
        kind="llama", config=WIDE, seq_len=256, tuner={"tuner_type": "lora", "use_dora": True}
    ),
    "qwen3_moe lora": Model(
        kind="qwen3_moe",
        config={**WIDE, **EXPERTS, "moe_intermediate_size": 320},
        seq_len=256,
        tuner={"tuner_type": "lora"},
    ),
    "llama full recompute": Model(
        kind="llama",
        config=WIDE,
        seq_len=512,
        training={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
}


def kept_bytes(rank: int, world_size: int, folder: Path, model: Model) -> int:
    """Return the bytes of all storages that the graph of one micro batch keeps, those of weights left out."""
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    with prepared(folder, settings(model), encoded=rows_of(model, world_size)) as trained:
        (chunk,) = trained.engine.chunks
        weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run_model(trained.feed.batch(0)[0], chunk)
        return sum(storage.nbytes() for pointer, storage in seen.items() if pointer not in weights)


@pytest.mark.parametrize("name", MODELS)
def test_what_a_graph_keeps_is_what_the_planner_counts(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    folder = save_random(AutoConfig.for_model(model.kind, **model.config), tmp_path)
    (kept,) = run_distributed(kept_bytes, 1, folder, model)
    memory = predicted(model, folder)
    hidden, vocab = model.config["hidden_size"], model.config["vocab_size"]
    rows = 0 if model.tuner else vocab  # whose gradient the loss keeps, beside that of its input
    head = 4 * hidden * (3 * model.seq_len * model.micro_batch + rows)  # beside the norm's input and output
    assert memory.activations + memory.expert_tokens + head == pytest.approx(kept, rel=TOLERANCE)
