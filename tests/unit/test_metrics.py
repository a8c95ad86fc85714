"""Figures of log lines: model FLOPs against hand counts, files that survive a kill, and lines people read."""

import json
from pathlib import Path

import pytest

from megaswift.config.freeze import FreezeConfig
from megaswift.config.tuner import TunerConfig
from megaswift.converters.selection import trained_elements
from megaswift.metadata.meta import MLAMeta, ModelMeta, MoEMeta
from megaswift.training.engine import StepResult
from megaswift.training.flops import Reach, step_cost
from megaswift.training.loop import Progress, Step
from megaswift.training.metrics import Window, step_line
from megaswift.training.reporters import JsonLines, readable

DENSE = ModelMeta(
    model_type="llama",
    architecture="LlamaForCausalLM",
    family="llama",
    folder=None,
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    vocab_size=100,
    max_length=64,
)
FULL = TunerConfig()
LORA = TunerConfig(tuner_type="lora", lora_rank=3)

# One layer: qkv 8 x (8 + 4 + 4), proj 8 x 8, gate and up 8 x 48, down 24 x 8.
LAYER = 8 * 16 + 8 * 8 + 8 * 48 + 24 * 8


def test_full_training_costs_six_flops_a_parameter_and_token() -> None:
    found = step_cost(DENSE, FULL).of(lengths=[5, 3], loss_tokens=4)
    pairs = 5 * 6 // 2 + 3 * 4 // 2
    attention = (
        2 * pairs * (4 * 4 * 2) * 3
    )  # layers x pairs x (q.k and p.v, multiply and add) x (forward + backward)
    assert found == 6 * 2 * LAYER * 8 + 6 * 800 * 4 + attention


def test_adapters_save_the_weight_gradients_of_frozen_matrices() -> None:
    adapters = 2 * 3 * ((8 + 16) + (8 + 8) + (8 + 48) + (24 + 8))
    cost = step_cost(DENSE, LORA)
    assert cost.per_token == 4 * 2 * LAYER + 6 * adapters
    assert cost.per_loss_token == 4 * 800


def test_below_what_trains_there_is_no_backward_pass() -> None:
    upper = FreezeConfig(freeze_parameters=["model.embed_tokens", "model.layers.0."])
    cost = step_cost(DENSE, FULL, trained=trained_elements(DENSE, upper))
    assert cost.per_token == (2 + 6) * LAYER and cost.per_loss_token == 6 * 800
    assert sum(cost.per_pair.values()) == (2 + 6) * (2 * 4 * 2)
    head = FreezeConfig(freeze_parameters_ratio=1.0, trainable_parameters=["lm_head"])
    alone = step_cost(DENSE, FULL, trained=trained_elements(DENSE, head))
    assert alone.per_token == 2 * 2 * LAYER and alone.per_loss_token == 4 * 800
    beside = step_cost(DENSE, LORA, trained=trained_elements(DENSE, head))
    assert beside.per_token == step_cost(DENSE, LORA).per_token and beside.per_loss_token == 6 * 800


def test_a_token_meets_the_chosen_experts_alone() -> None:
    moe = MoEMeta(
        num_experts=6, topk=2, ffn_hidden_size=10, layer_is_moe=(False, True), shared_ffn_hidden_size=12
    )
    meta = ModelMeta(**{**vars(DENSE), "moe": moe})
    attention = 8 * 16 + 8 * 8
    experts = 8 * 6 + 2 * (8 * 20 + 10 * 8) + (8 * 24 + 12 * 8)
    assert step_cost(meta, FULL).per_token == 6 * (LAYER + attention + experts)


def test_a_window_limits_the_keys_of_a_query() -> None:
    meta = ModelMeta(**{**vars(DENSE), "sliding_window": (2, None)})
    cost = step_cost(meta, FULL)
    pair = 12 * 4 * 2
    whole = cost.of(lengths=[5], loss_tokens=0)
    assert whole == 5 * cost.per_token + pair * (1 + 2 * 4) + pair * 15


def test_a_chunk_ends_the_reach_of_a_query() -> None:
    assert Reach(chunk=4).pairs(10) == 10 + 10 + 3
    assert Reach(chunk=4).pairs(3) == 6
    assert Reach(window=3).pairs(5) == 6 + 2 * 3


def test_latent_attention_costs_its_small_matrices() -> None:
    mla = MLAMeta(q_rank=5, kv_rank=6, nope_head_dim=3, rope_head_dim=2, v_head_dim=4)
    meta = ModelMeta(**{**vars(DENSE), "mla": mla})
    attention = 8 * 5 + 5 * 4 * 5 + 8 * (6 + 2) + 6 * 4 * (3 + 4) + 4 * 4 * 8
    cost = step_cost(meta, FULL)
    assert cost.per_token == 6 * 2 * (attention + 8 * 48 + 24 * 8)
    assert cost.per_pair == {Reach(): 6 * 2 * 4 * (5 + 4)}


def step(number: int, loss: float = 1.0 / 3) -> Step:
    result = StepResult(
        loss=loss,
        grad_norm=0.1,
        lr=1e-5,
        updated=True,
        tokens=50,
        loss_tokens=20,
        flop=2e12,
        interrupted=False,
    )
    progress = Progress(step=number, updates=number, consumed_samples=4 * number)
    return Step(progress=progress, result=result, time_s=0.5, is_last=False)


def test_speeds_are_means_over_the_window_and_the_loss_is_the_steps_own() -> None:
    window = Window().plus(step(1, loss=9.0)).plus(step(2))
    line = step_line(step(2), window, epoch=0.5, memory_gib=1.0)
    assert line["loss"] == 1.0 / 3
    assert line["tokens_per_s"] == 100.0
    assert line["model_tflops_per_s"] == 4.0
    assert line["step_time_s"] == 0.5
    assert line["consumed_samples"] == 8


def test_floats_in_the_log_keep_every_bit(tmp_path: Path) -> None:
    log = JsonLines(tmp_path, resumed_step=0)
    value = 0.1 + 0.2
    log.report({"step": 1, "loss": value})
    log.close()
    assert json.loads((tmp_path / "logging.jsonl").read_text())["loss"] == value


def test_lines_of_steps_that_are_made_again_are_cut_off(tmp_path: Path) -> None:
    log = JsonLines(tmp_path, resumed_step=0)
    for number in (1, 2, 2, 3):  # a training and a validation line of step 2
        log.report({"step": number, "text": "two\u2028lines"})
    log.close()
    with (tmp_path / "logging.jsonl").open("a") as torn:
        torn.write('{"step": 4, "lo')  # killed in the middle of a line
    log = JsonLines(tmp_path, resumed_step=2)
    log.report({"step": 3})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "logging.jsonl").read_text().split("\n") if line]
    assert [line["step"] for line in lines] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"step": 1, "loss": 1.23456, "grad_norm": None, "lr": 1e-5}, "loss 1.2346  lr 1e-05"),
        ({"step": 1, "eval_loss": 2.0, "epoch": 0.5}, "eval_loss 2.0000  epoch 0.50"),
    ],
)
def test_lines_for_people_are_short(line: dict[str, object], text: str) -> None:
    assert readable(line) == text
