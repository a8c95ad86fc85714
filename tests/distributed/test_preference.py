"""Preference losses under every layout, padded and packed, against one rank: same weights, same rows, same curve."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megaswift.data.packing import pack
from tests.harness.distributed import run_distributed
from tests.harness.tiny import save_tiny
from tests.harness.training import Case, Curve, curves, synthetic_rows, temporary_folder

# float32 sums in another order, three Adam steps apart.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
STEPS, ROWS = 3, 8
PACKS = 4  # that all rows make, with so many tokens each
PACK = {
    "pairs": 110, "kto": 80, "seq_cls lora": 62, "embedding": 160, "gkd": 62, "reranker": 160, "judge": 260,
}  # fmt: skip

LORA = {"tuner": {"tuner_type": "lora", "lora_dropout": 0.0}, "optimizer": {"lr": 1e-2, "adam_eps": 1e-3}}
CLASSIFIER = {"task_type": "seq_cls", "problem_type": "multi_label_classification"}
# what is trained -> settings
TRAININGS: dict[str, dict[str, dict[str, Any]]] = {
    "dpo": {"preference": {"rlhf_type": "dpo", "beta": 0.5, "rpo_alpha": 0.2}},
    "mpo": {
        "preference": {
            "rlhf_type": "dpo",
            "loss_type": "sigmoid bco_pair sft",
            "loss_weights": ["0.8", "0.2", "0.5"],
            "beta": 0.5,
            "ld_alpha": 0.3,
        }
    },
    "dpo lora": {"preference": {"rlhf_type": "dpo", "beta": 0.5}, **LORA},
    "orpo": {"preference": {"rlhf_type": "orpo", "beta": 0.5}},
    "simpo": {"preference": {"rlhf_type": "simpo"}},
    "cpo": {"preference": {"rlhf_type": "cpo", "beta": 0.5}},
    "kto": {"preference": {"rlhf_type": "kto", "beta": 0.5, "undesirable_weight": 0.8}},
    "rm": {"preference": {"rlhf_type": "rm", "center_rewards_coefficient": 0.01}},
    "gkd": {
        "preference": {"rlhf_type": "gkd", "lmbda": 0.0, "beta": 0.3, "gkd_logits_topk": 9, "sft_alpha": 0.4}
    },
    "seq_cls lora": {"model": {**CLASSIFIER, "num_labels": 3}, **LORA},
    "embedding": {
        "model": {"task_type": "embedding"},
        "embedding": {"infonce_hard_negatives": 1, "mrl_dims": {"8": 0.5, "64": 1}},
    },
    "reranker": {"model": {"task_type": "reranker"}, "reranker": {"max_negative_samples": 3}},
    "judge": {
        "model": {"task_type": "generative_reranker"},
        "preference": {"loss_type": "listwise_reranker"},
        "reranker": {
            "max_positive_samples": 2,
            "max_negative_samples": 2,
            "listwise_reranker_temperature": 0.5,
        },
    },
}
# layout -> (ranks, parallel settings)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
}


@cache
def folder() -> Path:
    return save_tiny("llama", temporary_folder())


@cache
def teacher() -> Path:
    """Another model with the same vocabulary, whose output layer is its embedding."""
    return save_tiny("llama-tied", temporary_folder())


def rows_settings(training: str, rows: str) -> dict[str, dict[str, Any]]:
    """All rows are one global batch, so that padded and packed batches hold the same."""
    if rows == "padded":  # embeddings are never: their last token may be that of padding
        return {
            "data": {"padding_free": training in ("embedding", "judge")},
            "training": {"micro_batch_size": 2, "global_batch_size": ROWS},
        }
    length = PACK.get(training, PACK["pairs"])
    encoded = synthetic_rows(case_of(training, "", {}, "padded").run_config(folder()))
    assert len(pack(encoded.row_lengths, length)) == PACKS
    return {
        "data": {"packing": True, "packing_length": length, "max_length": 40},
        "training": {"micro_batch_size": 1, "global_batch_size": PACKS},
    }


def case_of(training: str, layout: str, parallel: dict[str, Any], rows: str) -> Case:
    settings = {**rows_settings(training, rows), **TRAININGS[training], "parallel": parallel}
    settings["training"] = {**settings["training"], "train_iters": STEPS}
    if training == "gkd":
        settings["preference"] = {**settings["preference"], "teacher_model": str(teacher())}
    task = "rlhf" if "preference" in settings and training != "judge" else "sft"
    return Case(name=f"{training} {layout} {rows}", settings=settings, task=task)


@cache
def all_curves(ranks: int) -> list[dict[str, Curve]]:
    """Run every training and layout of so many ranks in one set of processes; return what each rank saw."""
    layouts = {"one": (1, {}), **LAYOUTS}
    cases = [
        case_of(training, layout, parallel, rows)
        for training in TRAININGS
        for layout, (world, parallel) in layouts.items()
        if world == ranks
        for rows in (("padded", "packed") if layout in ("one", "tp2 pp2") else ("packed",))
    ]
    return run_distributed(curves, ranks, folder(), cases)


def same(found: Curve, expected: Curve) -> None:
    assert len(found) == len(expected) == STEPS
    for (loss, norm), (one_loss, one_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(one_loss, rel=LOSS_TOLERANCE)
        assert norm == pytest.approx(one_norm, rel=NORM_TOLERANCE)


@pytest.mark.parametrize("training", TRAININGS)
def test_packed_answers_train_like_padded_ones(training: str) -> None:
    seen = all_curves(1)[0]
    padded = seen[f"{training} one padded"]
    assert padded[-1][0] < 0.98 * padded[0][0], "the run must learn, or equal curves would say little"
    same(seen[f"{training} one packed"], padded)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", TRAININGS)
def test_layout_trains_preferences_like_one_rank(training: str, layout: str) -> None:
    expected = all_curves(1)[0][f"{training} one padded"]
    for seen in all_curves(LAYOUTS[layout][0]):
        for rows in ("padded", "packed"):
            if found := seen.get(f"{training} {layout} {rows}"):
                same(found, expected)
        assert f"{training} {layout} packed" in seen


@pytest.mark.ranks(2)
def test_experts_spread_over_ranks_train_preferences_like_one_rank() -> None:
    model = save_tiny("qwen3_moe", temporary_folder())
    one = run_distributed(curves, 1, model, [case_of("dpo", "one", {}, "packed")])[0]["dpo one packed"]
    for seen in run_distributed(curves, 2, model, [case_of("dpo", "ep2", {"ep": 2}, "packed")]):
        same(seen["dpo ep2 packed"], one)


@pytest.mark.ranks(4)
def test_a_judge_trains_like_one_rank_where_the_output_layer_is_the_embedding_or_frozen() -> None:
    layouts = {"one": (1, {}), **LAYOUTS}

    def cases(layout: str) -> list[Case]:
        plain = case_of("judge", layout, layouts[layout][1], "packed")
        return [plain, replace(plain, name=f"lora {layout}", settings={**plain.settings, **LORA})]

    expected = run_distributed(curves, 1, teacher(), cases("one"))[0]
    for layout in ("cp2", "tp2 pp2"):
        for seen in run_distributed(curves, layouts[layout][0], teacher(), cases(layout)):
            same(seen[f"judge {layout} packed"], expected["judge one packed"])
            same(seen[f"lora {layout}"], expected["lora one"])
