"""Logits, loss and every gradient of a loaded model against transformers, for every family and on packed documents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from megaswift.config.model import ModelConfig
from megaswift.config.run import RunConfig
from megaswift.converters.export import export_hf
from megaswift.converters.load import load_weights
from megaswift.mcore.process_groups import initialise
from megaswift.metadata.read import get_model_meta
from megaswift.models.attention import packed_documents
from megaswift.models.build import build_model
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import select_platform
from tests.harness.distributed import run_distributed
from tests.harness.tiny import CHOICE_BIAS, MODELS, save_tiny

LENGTHS = (5, 23, 1, 12)  # documents of one pack; 23 is longer than the sliding window of mistral-window
RUN = RunConfig(model=ModelConfig(torch_dtype="float32"))


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 131, (length,), generator=generator) for length in LENGTHS]


def load(folder: Path, layout: Layout, rank: int) -> list[Any]:
    initialise(layout, seed=1, timeout_min=2)
    meta = get_model_meta(folder)
    chunks = build_model(meta, RUN, layout, select_platform("cpu"))
    load_weights(chunks, meta, layout, rank, folder)
    return chunks


def megatron_side(
    rank: int, world_size: int, folder: Path, gradients: Path, layout: Layout
) -> tuple[torch.Tensor, float]:
    """Return the logits of the pack [T, V/tp] and its loss; leave the gradients as a Hugging Face folder."""
    (model,) = load(folder, layout, rank)
    tokens, positions, labels, weights, packed = pack()
    model.eval()
    with torch.no_grad():
        logits = model(tokens, positions, None, packed_seq_params=packed)[0]
    losses = model(tokens, positions, None, labels=labels, loss_mask=weights, packed_seq_params=packed)
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    export_hf([model], get_model_meta(folder), layout, rank, gradients, dtype="float32")
    return logits[:, :131], float(loss)


def pack() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    docs = documents()
    tokens = torch.cat(docs)[None]
    positions = torch.cat([torch.arange(len(doc)) for doc in docs])[None]
    labels = torch.cat([torch.cat([doc[1:], doc[:1]]) for doc in docs])[None]
    weights = torch.cat([torch.cat([loss_weights(doc), torch.zeros(1)]) for doc in docs])[None]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return tokens, positions, labels, weights, packed_documents(cu_seqlens, max(LENGTHS))


def loss_weights(doc: torch.Tensor) -> torch.Tensor:
    """Return the weights of the tokens that doc[:-1] predicts: some carry no loss."""
    return (doc[1:] % 3 != 0).float()


def transformers_side(folder: Path, gradients: Path) -> tuple[torch.Tensor, float]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logits = [model(doc[None]).logits[0] for doc in documents()]
    total, weight = torch.zeros(()), torch.zeros(())
    for doc, one in zip(documents(), logits, strict=True):
        weights = loss_weights(doc)
        total = total + (F.cross_entropy(one[:-1], doc[1:], reduction="none") * weights).sum()
        weight = weight + weights.sum()
    loss = total / weight
    loss.backward()
    for name, parameter in model.named_parameters():
        # Constants stay as they are on both sides.
        if parameter.requires_grad and not name.endswith(CHOICE_BIAS):
            parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    model.save_pretrained(gradients)
    return torch.cat(logits).detach(), float(loss)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # safe_open is no mapping
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path)


@pytest.mark.parametrize(("name", "model_type"), [("deepseek_v3", "kimi_k2"), ("qwen2", "mimo")])
def test_model_types_of_remote_code_equal_the_class_that_they_repeat(
    name: str, model_type: str, tmp_path: Path
) -> None:
    compare(name, tmp_path, model_type=model_type)


def compare(name: str, tmp_path: Path, *, model_type: str | None = None) -> None:
    """Compare both sides; ours reads the model as one of `model_type` if that is given."""
    folder = save_tiny(name, tmp_path / "model")
    expected, expected_loss = transformers_side(folder, tmp_path / "theirs")
    if model_type is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    [(logits, loss)] = run_distributed(megatron_side, 1, folder, tmp_path / "ours", Layout())
    scale = expected.abs().max()
    assert (logits - expected).abs().max() <= 1e-4 * scale  # fp32; the sums run in another order
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    check_gradients(tmp_path)


def check_gradients(tmp_path: Path) -> None:
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        difference = (ours[key] - gradient).norm() / gradient.norm().clamp_min(1e-8)
        assert difference <= 1e-4, f"{key}: relative difference {difference:.2e}"


@pytest.mark.ranks(2)
def test_latent_attention_cut_over_tp_has_the_same_gradients(tmp_path: Path) -> None:
    """Without sequence parallelism the key part that all heads share gets its gradient from all ranks at once."""
    folder = save_tiny("deepseek_v3", tmp_path / "model", first_k_dense_replace=4)
    _, expected_loss = transformers_side(folder, tmp_path / "theirs")
    layout = Layout(world=2, tp=2)
    results = run_distributed(megatron_side, 2, folder, tmp_path / "ours", layout)
    assert [loss for _, loss in results] == pytest.approx([expected_loss] * 2, rel=1e-5)
    check_gradients(tmp_path)
