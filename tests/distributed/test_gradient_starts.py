"""LoRA-GA against the decomposition of transformers' gradients, peft's, and what its exports mean."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import LoraGAConfig

from megaswift.config.parse import parse_run
from megaswift.converters.adapters import save_peft
from megaswift.converters.export import export_hf
from megaswift.platforms.platform import select_platform
from megaswift.training.run import train_in_world
from tests.harness.adapters import base_model, check_equal, logits
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import Case, prepared, steps, synthetic_set, temporary_folder

Pair = tuple[torch.Tensor, torch.Tensor]
TOGETHER = {
    "self_attention.linear_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention.linear_proj": ["self_attn.o_proj"],
    "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.linear_fc2": ["mlp.down_proj"],
}


def case(*, rank: int, **tuner: Any) -> Case:
    chosen = {
        "tuner_type": "lora",
        "lora_dropout": 0.5,
        "lora_rank": rank,
        "init_weights": "lora-ga",
        **tuner,
    }
    rows = {"data": {"padding_free": False}, "training": {"micro_batch_size": 2, "global_batch_size": 8}}
    return Case(name="one", settings={"tuner": chosen, **rows, "optimizer": {"lr": 1e-2}})


@cache
def folder_of(model: str) -> Path:
    return save_tiny(model, temporary_folder())


def starts(rank: int, world_size: int, folder: Path, of: Case) -> tuple[dict[str, Pair], list[Any]]:
    """Return A and B of every linear at the start, and the micro batches of the first global batch."""
    with prepared(folder, of) as trained:
        (chunk,) = trained.engine.chunks
        found = {
            f"{number}.{name}": (linear.lora_a.weight.detach().clone(), linear.lora_b.weight.detach().clone())
            for number, layer in enumerate(chunk.module.decoder.layers)
            for name in TOGETHER
            for linear in [layer.get_submodule(name)]
        }
        return found, trained.feed.batch(0)


def gradients(folder: Path, batches: list[Any]) -> dict[str, torch.Tensor]:
    """Return transformers' gradients of the loss over these rows, in float64, of what is one matrix in Megatron, rows in its order."""
    model = base_model(folder).double()
    for batch in batches:
        scores_BSV = model(batch.input_ids).logits
        losses = F.cross_entropy(scores_BSV.flatten(0, 1), batch.labels.flatten(), reduction="none")
        (losses * batch.loss_mask.flatten()).sum().backward()
    groups, found = model.config.num_key_value_heads, {}
    for number, layer in enumerate(model.model.layers):
        for name, parts in TOGETHER.items():
            grads = [layer.get_submodule(one).weight.grad for one in parts]
            if "qkv" in name:
                grads = [
                    rows
                    for group in zip(*(one.chunk(groups) for one in grads), strict=True)
                    for rows in group
                ]
            found[f"{number}.{name}"] = torch.cat(grads)
    return found


def turned(x_RN: torch.Tensor, y_RN: torch.Tensor) -> float:
    """Return how far the cosines of rows are from one, whatever their sign."""
    return float((1 - F.cosine_similarity(x_RN.double(), y_RN.double()).abs()).max())


# A sketch of 4 R columns is the whole of the smaller sides where R = 16; power iterations are exact to a part of 1000 where R = 4.
@pytest.mark.parametrize(("rank", "tolerance"), [(4, 1e-3), (16, 1e-7)])
def test_the_start_is_made_of_singular_vectors_of_the_gradient(rank: int, tolerance: float) -> None:
    folder = folder_of("llama")
    [(found, batches)] = run_distributed(starts, 1, folder, case(rank=rank))
    expected = gradients(folder, batches)
    assert found.keys() == expected.keys()
    for name, (a_RD, b_FR) in found.items():
        u_FK, _, vt_KD = torch.linalg.svd(expected[name], full_matrices=False)
        scale = len(u_FK) ** 0.25 / 16**0.5
        for matrix_RN in (a_RD, b_FR.t()):
            torch.testing.assert_close(matrix_RN.norm(dim=1), torch.full((rank,), scale), rtol=1e-5, atol=0)
        assert turned(a_RD, vt_KD[:rank]) < tolerance, name
        assert turned(b_FR.t(), u_FK[:, rank : 2 * rank].t()) < tolerance, name


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_directions_are_those_of_peft(direction: str) -> None:
    folder = folder_of("llama")
    [(found, batches)] = run_distributed(starts, 1, folder, case(rank=16, lora_ga_direction=direction))
    expected, model = gradients(folder, batches), base_model(folder)
    layers = model.model.layers
    for number, layer in enumerate(layers):
        layer.mlp.down_proj._peft_loraga_grad = expected[f"{number}.mlp.linear_fc2"]
    settings = LoraConfig(
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction),
        r=16,
        target_modules=["down_proj"],
    )
    get_peft_model(model, settings)
    for number, layer in enumerate(layers):
        a_RD, b_FR = found[f"{number}.mlp.linear_fc2"]
        theirs = layer.mlp.down_proj
        assert turned(a_RD, theirs.lora_A["default"].weight.detach()) < 1e-6
        # peft multiplies B by the singular values besides, which neither paper nor authors do.
        assert turned(b_FR.t(), theirs.lora_B["default"].weight.detach().t()) < 1e-6


@pytest.mark.parametrize(
    ("tuner", "factor"),
    [
        ({"lora_ga_stable_gamma": 64}, 64**-0.5),
        ({"lora_ga_scale": "unit"}, None),
        ({"lora_ga_scale": "gd", "lora_alpha": 64}, 8 / 64),
    ],
    ids=["stable", "unit", "gd"],
)
def test_scales_are_those_of_the_authors(tuner: dict[str, Any], factor: float | None) -> None:
    [(found, _)] = run_distributed(starts, 1, folder_of("llama"), case(rank=8, **tuner))
    for a_RD, b_FR in found.values():
        norm = factor or 1.0
        if "lora_ga_stable_gamma" in tuner:
            norm *= len(b_FR) ** 0.25
        for matrix_RN in (a_RD, b_FR.t()):
            torch.testing.assert_close(matrix_RN.norm(dim=1), torch.full((8,), norm), rtol=1e-5, atol=0)


def train_and_export(rank: int, world_size: int, folder: Path, output: Path, of: Case) -> None:
    """Export the adapter and the merged model before the first step, and after three."""
    with prepared(folder, of) as trained:
        chunks = [chunk.module for chunk in trained.engine.chunks]
        args, tuner = (chunks, trained.meta, trained.layout, rank), trained.run.tuner
        export_hf(*args, output / "untrained", dtype="float32", merge_lora=True)
        steps(trained, 0, 3)
        save_peft(*args, output / "adapter", tuner=tuner, dtype="float32")
        export_hf(*args, output / "merged", dtype="float32", merge_lora=True)


@pytest.mark.parametrize(
    "tuner", [{}, {"use_dora": True, "modules_to_save": ["embed_tokens"]}], ids=["alone", "and others"]
)
def test_its_adapter_opens_in_peft_beside_the_untouched_base(tmp_path: Path, tuner: dict[str, Any]) -> None:
    folder = folder_of("llama")
    run_distributed(train_and_export, 1, folder, tmp_path, case(rank=4, **tuner))
    before, merged = logits(base_model(folder)), logits(base_model(tmp_path / "merged"))
    torch.testing.assert_close(logits(base_model(tmp_path / "untrained")), before, rtol=0, atol=1e-5)
    adapted = logits(PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter"))
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4 * float(merged.abs().max()))
    assert float((merged - before).abs().max()) > 1e-2


def unseen(rank: int, world_size: int, folder: Path) -> int:
    """Return how many experts start with B = 0, which must be finite and have an A all the same."""
    rows = {"data": {"packing": True, "packing_length": 8, "max_length": 8}}
    few = case(rank=2, target_modules=["gate_proj", "up_proj", "down_proj"])
    settings = {**few.settings, **rows, "training": {"micro_batch_size": 1, "global_batch_size": 1}}
    documents = synthetic_set(entries=4, longest=4)
    with prepared(folder, Case(name="few", settings=settings), encoded=documents) as trained:
        layers = trained.engine.chunks[0].module.decoder.layers
        linears = [one.linear_fc2 for layer in layers for one in layer.mlp.experts.local_experts]
        assert all(bool(one.isfinite().all()) for linear in linears for one in linear.parameters())
        assert all(bool(linear.lora_a.weight.any(1).all()) for linear in linears)
        return sum(not linear.lora_b.weight.any() for linear in linears)


def test_an_expert_without_tokens_starts_at_zero() -> None:
    (zeros,) = run_distributed(unseen, 1, folder_of("qwen3_moe"))
    assert 0 < zeros


def run(rank: int, world_size: int, words: list[str]) -> Path:
    summary = train_in_world(parse_run("sft", words), select_platform("cpu"))
    assert summary.checkpoint is not None
    return summary.checkpoint


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "start",
    [["lora-ga"], ["loftq", "--quant_method", "bnb", "--quant_bits", "4"]],
    ids=" ".join,
)
def test_a_run_that_goes_on_ends_where_one_without_a_break_does(tmp_path: Path, start: list[str]) -> None:
    model, rows = make_tiny_run(tmp_path)
    words = [
        "--model", str(model), "--dataset", str(rows), "--global_batch_size", "4", "--learning_rate", "1e-3", "--save_steps", "2",
        "--report_to", "none", "--lr_decay_style", "constant", "--torch_dtype", "bfloat16", "--tuner_type", "lora",
        "--lora_rank", "4", "--tensor_model_parallel_size", "2", "--init_weights", *start,
    ]  # fmt: skip
    ends = {}
    for name, lasts in {"whole": ("4",), "parts": ("2", "4")}.items():
        for last in lasts:
            given = [*words, "--output_dir", str(tmp_path / name), "--train_iters", last]
            folder = Path(run_distributed(run, 2, given)[0])
        ends[name] = folder / "adapter"
    check_equal(ends["whole"], ends["parts"])
