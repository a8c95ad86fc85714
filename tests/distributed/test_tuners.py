"""Kinds of LoRA against peft: DoRA, PiSSA, OLoRA, LoRA+, and adapters of recomputed parts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from megaswift.config.tuner import TunerConfig
from megaswift.converters.adapters import load_peft, save_peft
from megaswift.converters.peft_folder import read_adapter
from megaswift.errors import ConfigError
from megaswift.metadata.read import get_model_meta
from megaswift.parallel.layout import Layout
from tests.harness.adapters import TOKENS, base_model, build, check_start, logits, start, trained
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, prepared, steps


def feed_forward_gradients(rank: int, world_size: int, folder: Path) -> list[float]:
    """Return the largest gradient of each layer's B where the feed-forward part alone has adapters and is recomputed."""
    tuner = {"tuner_type": "lora", "lora_dropout": 0.0, "target_regex": r".*\.(gate|up)_proj"}
    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    with prepared(folder, Case(name="mlp", settings={"tuner": tuner, "training": recomputed})) as trained:
        steps(trained, 0, 1)
        layers = trained.engine.chunks[0].module.decoder.layers
        return [float(layer.mlp.linear_fc1.lora_b.weight.abs().max()) for layer in layers]


def test_adapters_of_recomputed_parts_train_in_the_first_layer_too(tmp_path: Path) -> None:
    (largest,) = run_distributed(feed_forward_gradients, 1, save_tiny("llama", tmp_path))
    assert min(largest) > 0


def dora_gradients(rank: int, world_size: int, folder: Path, adapter: Path, output: Path) -> None:
    """Write the gradients of the mean square of the logits as if they were an adapter, and the logits."""
    meta = get_model_meta(folder)
    found = read_adapter(adapter, meta)
    tuner = found.adopt(TunerConfig(tuner_type="lora", lora_dropout=0.0), meta)
    layout = Layout()
    (chunk,) = chunks = build(rank, folder, layout, tuner)
    load_peft(chunks, meta, layout, rank, found)
    seen = chunk(TOKENS, torch.arange(TOKENS.shape[1])[None], None)
    seen.float().square().mean().backward()
    for parameter in chunk.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(parameter.grad)
    save_peft(chunks, meta, layout, rank, output, tuner=tuner, dtype="float32")


def test_gradients_of_dora_are_those_of_peft(tmp_path: Path) -> None:
    folder = save_tiny("qwen2", tmp_path / "model")
    tuner = TunerConfig(tuner_type="lora", lora_rank=4, lora_dropout=0.0, use_dora=True)
    run_distributed(trained, 1, folder, tmp_path, Layout(), tuner)  # weights that Megatron fuses share A
    model = PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter", is_trainable=True)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "peft")
    model(TOKENS).logits.square().mean().backward()
    run_distributed(dora_gradients, 1, folder, tmp_path / "peft", tmp_path / "gradients")
    found = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_file = name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
            if "lora_A" in name and not any(alone in name for alone in ("o_proj", "down_proj")):
                continue  # a shared A has the sum of these
            scale = float(parameter.grad.abs().max())
            assert scale > 0
            assert float((found[in_file] - parameter.grad).abs().max()) <= 1e-5 * scale, name
            compared += 1
    assert compared == 4 * (7 + 7 + 2)  # layers; norms, B, and A


PISSA = TunerConfig(
    tuner_type="lora",
    lora_rank=4,
    lora_alpha=8,
    lora_dropout=0.0,
    init_weights="pissa",
    target_modules=["o_proj", "down_proj"],
)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_the_start_from_weights_and_its_gradients_are_those_of_peft(tmp_path: Path, how: str) -> None:
    folder = save_tiny("llama", tmp_path)
    base = base_model(folder)
    before = base(TOKENS).logits.detach()
    settings = LoraConfig(
        init_lora_weights=how,
        r=4,
        lora_alpha=8,
        target_modules=PISSA.target_modules,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, settings)
    [found] = run_distributed(start, 1, folder, replace(PISSA, init_weights=how))
    # The base is not touched, so that nothing changes at the start: B A - B_0 A_0 = 0.
    torch.testing.assert_close(found["logits"][0], before, rtol=0, atol=1e-5)
    check_start(found, model)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_starts_from_weights_opens_in_peft_beside_the_untouched_base(
    tmp_path: Path, how: str
) -> None:
    folder = save_tiny("qwen2", tmp_path / "model")
    tuner = TunerConfig(tuner_type="lora", lora_rank=4, lora_dropout=0.0, init_weights=how)
    run_distributed(trained, 1, folder, tmp_path, Layout(), tuner)
    adapted = logits(PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter"))
    merged = logits(base_model(tmp_path / "merged"))
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4 * float(merged.abs().max()))
    assert float((merged - logits(base_model(folder))).abs().max()) > 1e-2


def first_moves(rank: int, world_size: int, folder: Path, ratio: float | None) -> dict[str, torch.Tensor]:
    """Return how far the first step moves each matrix of the adapters."""
    case = Case(
        name="lora+",
        settings={"tuner": {"tuner_type": "lora", "lora_dropout": 0.0, "lorap_lr_ratio": ratio}},
    )
    with prepared(folder, case) as trained:
        (chunk,) = trained.engine.chunks
        matrices = {name: weight for name, weight in chunk.named_parameters() if weight.requires_grad}
        before = {name: weight.detach().clone() for name, weight in matrices.items()}
        steps(trained, 0, 1)
        return {name: weight.detach() - before[name] for name, weight in matrices.items()}


def test_lora_plus_moves_b_so_many_times_as_far(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    (plain,), (faster,) = (run_distributed(first_moves, 1, folder, ratio) for ratio in (None, 16.0))
    for name, move in plain.items():
        if name.endswith("lora_b.weight"):  # from zero: no weight decay yet
            torch.testing.assert_close(faster[name], 16 * move, rtol=1e-5, atol=0)
            assert move.any()
        else:
            assert torch.equal(faster[name], move)


def dora_on_experts(rank: int, world_size: int, folder: Path) -> str:
    """Return what is said about DoRA on the linears of experts."""
    with pytest.raises(ConfigError) as refused:
        build(rank, folder, Layout(), TunerConfig(tuner_type="lora", use_dora=True))
    return str(refused.value)


def test_dora_on_experts_is_refused(tmp_path: Path) -> None:
    (said,) = run_distributed(dora_on_experts, 1, save_tiny("qwen3_moe", tmp_path))
    assert said.startswith("use_dora=true is not built for experts")
