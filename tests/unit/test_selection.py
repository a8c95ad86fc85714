"""Which tensors train: names, expressions and shares as ms-swift reads them, and what Megatron cannot hold."""

from typing import Any

import pytest

from megaswift.config.freeze import FreezeConfig
from megaswift.converters.selection import (
    drawn_elements,
    elements_of,
    saved_tensors,
    trained_elements,
    trained_tensors,
)
from megaswift.errors import ConfigError
from megaswift.metadata.count import count_parameters
from megaswift.parallel.layout import Layout
from megaswift.planner.job import Candidate
from megaswift.planner.memory import memory_of
from megaswift.planner.software import Software
from megaswift.planner.stages import stage_params, stages_of
from tests.harness.planning import MODELS, golden_job, golden_meta

LLAMA = "llama-3.1-8b"  # 32 layers, 8 030 261 248 parameters
TIED = "qwen3-0.6b"
EXPERTS = "mixtral-8x7b"
LAYER = 218_112_000  # of llama-3.1-8b: 4096 x (2 x 4096 + 2 x 1024 + 3 x 14336 + 2)
ENDS = 128_256 * 4096


def trained(model: str, **chosen: Any) -> frozenset[str]:
    return trained_tensors(golden_meta(model), FreezeConfig(**chosen))


@pytest.mark.parametrize("name", MODELS)
def test_everything_trains_where_nothing_is_frozen(name: str) -> None:
    meta = golden_meta(name)
    assert trained_elements(meta, FreezeConfig()).total == count_parameters(meta).total


def test_a_prefix_is_the_start_of_a_name_and_an_expression_is_found_in_it() -> None:
    without_ends = trained(LLAMA, freeze_parameters=["model.embed_tokens", "lm_head"])
    assert "lm_head.weight" not in without_ends and "model.norm.weight" in without_ends
    tenths = trained(LLAMA, freeze_parameters=["model.layers.1"])  # and 10 to 19: so does ms-swift
    assert not any(name.startswith(("model.layers.1.", "model.layers.17.")) for name in tenths)
    assert "model.layers.1.mlp.up_proj.weight" in trained(LLAMA, freeze_parameters=["model.layers.10"])
    assert all("mlp" not in name for name in trained(LLAMA, freeze_parameters_regex="mlp"))


def test_what_is_frozen_is_opened_again() -> None:
    opened = trained(
        LLAMA,
        freeze_parameters_ratio=1.0,
        trainable_parameters=["lm_head"],
        trainable_parameters_regex=r"layers\.(30|31)\.mlp\.down",
    )
    layers = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (30, 31)}
    assert opened == {"lm_head.weight", *layers}


@pytest.mark.parametrize(("share", "layers"), [(0.0, 0), (0.06, 0), (0.07, 0), (0.1, 1), (0.5, 16)])
def test_a_share_is_of_whole_modules_from_below(share: float, layers: int) -> None:
    found = trained_elements(golden_meta(LLAMA), FreezeConfig(freeze_parameters_ratio=share))
    whole = count_parameters(golden_meta(LLAMA)).total
    largest_module = 2 * 14336 * 4096
    assert 0 <= share * whole - (whole - found.total) < max(largest_module, ENDS * (share < 0.066))
    assert found.layers[-1] == LAYER and found.head == ENDS
    assert [layer for layer, trains in enumerate(found.layers) if not trains] == list(range(layers))


def test_megatrons_names_are_tried_where_no_tensor_has_the_name() -> None:
    by_megatron = trained(LLAMA, freeze_parameters_regex=r"^decoder\.layers\.3\.mlp\.linear_fc1")
    everything = trained(LLAMA)
    assert everything - by_megatron == {f"model.layers.3.mlp.{name}_proj.weight" for name in ("gate", "up")}
    # Everything that is no layer: Megatron's names, none of which begins like this, are not looked at.
    outside = everything - trained(LLAMA, freeze_parameters_regex=r"^(?!model\.layers)")
    assert outside == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_a_tied_matrix_has_either_name() -> None:
    one, other = (
        trained(TIED, freeze_parameters=["lm_head"]),
        trained(TIED, freeze_parameters=["model.embed"]),
    )
    assert one == other == trained(TIED) - {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("model", "chosen", "message"),
    [
        (LLAMA, {"freeze_parameters": ["lm_heads"]}, "freeze_parameters=lm_heads matches no tensor of llama. Did you mean lm_head?"),
        (LLAMA, {"freeze_parameters_ratio": 1.0, "trainable_parameters_regex": "wte"}, "trainable_parameters_regex=wte matches no"),
        (LLAMA, {"freeze_parameters_regex": r"layers\.0\..*q_proj"}, "freezes model.layers.0.self_attn.q_proj.weight without model.layers.0.self_attn.k_proj.weight, model.layers.0.self_attn.v_proj.weight: Megatron keeps them in one matrix (decoder.layers.0.self_attention.linear_qkv.weight)"),
        (LLAMA, {"freeze_parameters_ratio": 1.0, "trainable_parameters_regex": "up_proj"}, "freezes model.layers.0.mlp.gate_proj.weight without model.layers.0.mlp.up_proj.weight"),
        (EXPERTS, {"freeze_parameters_regex": r"layers\.0\..*experts\.[0-3]\."}, "the experts of a layer are one product"),
        (LLAMA, {"freeze_parameters_ratio": 1.0}, "leaves nothing to train"),
        ("gpt-oss-20b", {"freeze_parameters_ratio": 1.0, "trainable_parameters_regex": "o_proj.bias"}, "is computed with that of its matrix"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_refused_by_name(model: str, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        trained(model, **chosen)
    assert message in str(refused.value)


def test_a_share_does_not_part_a_bias_from_its_matrix() -> None:
    meta = golden_meta("gpt-oss-20b")
    for percent in range(0, 100, 3):
        trained_tensors(meta, FreezeConfig(freeze_parameters_ratio=percent / 100))


@pytest.mark.parametrize("model", [LLAMA, EXPERTS, TIED])
def test_the_planner_counts_gradients_and_optimizer_state_of_what_trains(model: str) -> None:
    chosen = FreezeConfig(
        freeze_parameters_ratio=1.0, trainable_parameters_regex=r"layers\.2[0-3]\.|embed_tokens"
    )
    elements = trained_elements(golden_meta(model), chosen)
    job = golden_job(model, trained_elements=elements)
    (stage,) = stages_of(job.parts, Layout())
    params = stage_params(job, Layout(), stage)
    assert params.trained + params.trained_experts == pytest.approx(elements.total)
    one = memory_of(job, Candidate(layout=Layout()), stage, software=Software())
    assert one.gradients == pytest.approx(Software().gradient_bytes * elements.total)
    assert one.optimizer == pytest.approx(12 * elements.total)
    full = golden_job(model)
    whole = memory_of(
        full, Candidate(layout=Layout()), stages_of(full.parts, Layout())[0], software=Software()
    )
    assert whole.weights == one.weights and whole.gradients > one.gradients
    layout = Layout(world=2, pp=2)
    first, last = (stage_params(job, layout, one) for one in stages_of(job.parts, layout))
    copy = elements.embedding if job.parts.head == 0 else 0
    spread = first.trained + first.trained_experts + last.trained + last.trained_experts
    assert spread == pytest.approx(elements.total + copy)


@pytest.mark.parametrize("model", [LLAMA, TIED])
def test_the_planner_counts_as_many_drawn_layers_on_every_stage_as_may_be_there(model: str) -> None:
    meta = golden_meta(model)
    elements, drawn = trained_elements(meta, FreezeConfig()), golden_job(model, drawn_layers=2)
    layer = elements.layers[0]
    ends = elements.total - sum(elements.layers)
    (stage,) = stages_of(drawn.parts, Layout())
    one = memory_of(drawn, Candidate(layout=Layout()), stage, software=Software())
    assert one.optimizer == pytest.approx(12 * (ends + 2 * layer))
    assert one.gradients == pytest.approx(Software().gradient_bytes * (ends + 2 * layer))
    layout = Layout(world=4, pp=4)
    stages = [stage_params(drawn, layout, one).trained for one in stages_of(drawn.parts, layout)]
    assert stages[1] == stages[2] == pytest.approx(2 * layer)
    mean = drawn_elements(meta, 2)
    assert mean.total == pytest.approx(ends + 2 * layer, rel=1e-6)
    assert mean.embedding == elements.embedding and len(set(mean.layers)) == 1


def test_modules_that_train_whole_beside_adapters_are_counted_with_them() -> None:
    meta = golden_meta(LLAMA)
    elements = elements_of(
        meta, saved_tensors(meta, ["lm_head", "norm"])
    )  # what ends in norm: of the layers too
    assert elements.total == ENDS + (2 * 32 + 1) * 4096
    job, plain = (
        golden_job(LLAMA, trained="lora", trained_elements=elements),
        golden_job(LLAMA, trained="lora"),
    )
    one, other = (
        memory_of(each, Candidate(layout=Layout()), stages_of(each.parts, Layout())[0], software=Software())
        for each in (job, plain)
    )
    assert one.weights == other.weights
    assert one.optimizer - other.optimizer == pytest.approx(12 * elements.total)
