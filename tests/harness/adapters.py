"""Models with adapters, ours and those of peft, as several test files make them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megaswift.config.model import ModelConfig
from megaswift.config.run import RunConfig
from megaswift.config.tuner import TunerConfig
from megaswift.converters.adapters import load_peft, save_peft
from megaswift.converters.export import export_hf
from megaswift.converters.load import load_weights
from megaswift.converters.lora_targets import adapted_modules
from megaswift.converters.peft_folder import read_adapter
from megaswift.mcore.process_groups import initialise
from megaswift.metadata.read import get_model_meta
from megaswift.models.build import build_model
from megaswift.models.lora import apply_lora
from megaswift.models.tuner import finish_tuner
from megaswift.parallel.layout import Layout
from megaswift.platforms.platform import select_platform
from megaswift.training.freeze import open_modules

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(world=2, tp=2),
    "tp4": Layout(world=4, tp=4),  # more ranks than kv heads
    "tp2_pp2": Layout(world=4, tp=2, pp=2),
    "tp2_ep2_etp2": Layout(world=4, tp=2, ep=2, etp=2, sequence_parallel=True),
}
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RUN = RunConfig(model=ModelConfig(torch_dtype="float32"))
TOKENS = torch.tensor([[5, 17, 99, 3, 42, 130, 1]])
# The Megatron model and transformers round differently; logits are of order 1.
TOLERANCE = 2e-5


def build(
    rank: int, folder: Path, layout: Layout, tuner: TunerConfig, ranks: Mapping[str, int] | None = None
) -> list[Any]:
    """Return this rank's chunks of a model with new adapters, its weights loaded."""
    initialise(layout, seed=1, timeout_min=2)
    meta = get_model_meta(folder)
    chunks = build_model(meta, RUN, layout, select_platform("cpu"))
    apply_lora(chunks, tuner, meta, seed=3, ranks=ranks, modules=adapted_modules(meta, tuner))
    open_modules(chunks, meta, layout, rank, tuner)
    load_weights(chunks, meta, layout, rank, folder)
    finish_tuner(chunks, tuner, device=torch.device("cpu"), seed=1, fresh=True)
    return chunks


def from_peft(
    rank: int, world_size: int, folder: Path, adapter_folder: Path, output: Path, layout: Layout
) -> dict[str, int]:
    """Load an adapter, then save it as a PEFT folder and merged into the model; return the ranks that differ."""
    meta = get_model_meta(folder)
    adapter = read_adapter(adapter_folder, meta)
    tuner = adapter.adopt(TunerConfig(tuner_type="lora"), meta)
    chunks = build(rank, folder, layout, tuner, adapter.ranks(meta))
    load_peft(chunks, meta, layout, rank, adapter)
    save_peft(chunks, meta, layout, rank, output / "adapter", tuner=tuner, dtype="float32")
    export_hf(chunks, meta, layout, rank, output / "merged", dtype="float32", merge_lora=True)
    return adapter.ranks(meta)


def trained(
    rank: int, world_size: int, folder: Path, output: Path, layout: Layout, tuner: TunerConfig
) -> None:
    """Make adapters with a B that is the same under every layout, and save them both ways."""
    meta = get_model_meta(folder)
    chunks = build(rank, folder, layout, tuner)
    randomise(chunks, folder, layout, rank, tuner)
    save_peft(chunks, meta, layout, rank, output / "adapter", tuner=tuner, dtype="float32")
    export_hf(chunks, meta, layout, rank, output / "merged", dtype="float32", merge_lora=True)


def randomise(chunks: list[Any], folder: Path, layout: Layout, rank: int, tuner: TunerConfig) -> None:
    """Give every B random elements; copies of one element on several ranks get one value by being loaded."""
    generator = torch.Generator().manual_seed(rank)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("lora_b.weight"):
                parameter.data.normal_(generator=generator, std=0.3)
            elif parameter.requires_grad and "lora_" not in name:
                parameter.data *= 1.25


def start(
    rank: int, world_size: int, folder: Path, tuner: TunerConfig
) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return A, B and their gradients at the start where no weights are fused, by transformers' name of the linear, and the logits."""
    (chunk,) = build(rank, folder, Layout(), tuner)
    seen = chunk(TOKENS, torch.arange(TOKENS.shape[1])[None], None)[..., : chunk.logical_vocab_size]
    seen.float().square().mean().backward()
    found = {}
    for number, layer in enumerate(chunk.decoder.layers):
        linears = {
            "self_attn.o_proj": layer.self_attention.linear_proj,
            "mlp.down_proj": layer.mlp.linear_fc2,
        }
        for name, linear in linears.items():
            pair = linear.lora_a.weight, linear.lora_b.weight
            found[f"layers.{number}.{name}"] = tuple(x.detach() for w in pair for x in (w, w.grad))
    return {**found, "logits": (seen.detach(),)}


def check_start(
    found: Mapping[str, tuple[torch.Tensor, ...]], model: Any, *, tolerance: float = TOLERANCE
) -> None:
    """Compare what start() returned with a peft model that adapts the same linears; their vectors have no sign of their own."""
    model(TOKENS).logits.square().mean().backward()
    theirs = dict(model.named_parameters())
    assert len(found) == 2 * 4 + 1
    for name in sorted(found.keys() - {"logits"}):
        a_RD, grad_a_RD, b_FR, grad_b_FR = found[name]
        ours = a_RD, grad_a_RD, b_FR.t(), grad_b_FR.t()
        a, b = (theirs[f"base_model.model.model.{name}.lora_{letter}.default.weight"] for letter in "AB")
        assert a.grad is not None and b.grad is not None
        signs_R1 = (ours[0] * a.detach()).sum(1).sign()[:, None]
        for x_R, y_R in zip(ours, (a.detach(), a.grad, b.detach().t(), b.grad.t()), strict=True):
            scale = float(y_R.abs().max())
            assert scale > 0 and float((signs_R1 * x_R - y_R).abs().max()) <= tolerance * scale, name


def logits(model: Any) -> torch.Tensor:
    """Return a transformers or peft model's logits of TOKENS."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def base_model(folder: Path) -> Any:
    """Open a folder with transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_peft(folder: Path, output: Path, *, seed: int = 0, **settings: Any) -> torch.Tensor:
    """Save a random adapter with peft itself and return the adapted model's logits."""
    torch.manual_seed(seed)
    model = get_peft_model(
        base_model(folder), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    )
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # peft starts with the norms of the rows, which change nothing
            parameter.data *= 0.5 + torch.rand(parameter.shape)
    model.save_pretrained(output)
    return logits(model)


def check_equal(a: Path, b: Path) -> None:
    """Compare two adapter files bit by bit."""
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
