"""Loss and gradient of whole models against transformers and TRL: classifiers, reward models, embeddings, distillation."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer
from trl.experimental.gkd import GKDTrainer

from megaswift.data.encode import EncodedSet
from tests.harness.distributed import run_distributed
from tests.harness.training import WORDS, Case, curves, synthetic_rows
from tests.parity.test_trl import agree, folders, loss_and_norm, options, padded, tokenizer

LABELS, CENTER, TEMPERATURE, BETA, SFT_ALPHA = 3, 0.05, 0.2, 0.3, 0.7
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
SEED = 42  # of the new head: the default of --seed


def cases() -> dict[str, Case]:
    rows = {"data": {"padding_free": False}, "training": {"global_batch_size": 8, "micro_batch_size": 4}}
    classifiers = {
        problem: {"model": {"task_type": "seq_cls", "num_labels": LABELS, "problem_type": problem}}
        for problem in PROBLEMS
    }
    settings: dict[str, dict[str, dict[str, Any]]] = {
        **classifiers,
        "rm": {"preference": {"rlhf_type": "rm", "center_rewards_coefficient": CENTER}},
        **{
            f"gkd{' sft' * bool(alpha)}": {
                "preference": {
                    "rlhf_type": "gkd",
                    "lmbda": 0.0,
                    "beta": BETA,
                    "sft_alpha": alpha,
                    "teacher_model": str(folders()[1]),
                },
            }
            for alpha in (0.0, SFT_ALPHA)
        },
        "embedding": {
            "model": {"task_type": "embedding"},
            "embedding": {"infonce_temperature": TEMPERATURE, "infonce_hard_negatives": 1},
            "data": {},
        },
        **{
            f"{task} {loss}": {
                "model": {"task_type": task},
                "preference": {"loss_type": f"{loss}_reranker"},
                "reranker": {
                    "max_negative_samples": 3,
                    **({"listwise_reranker_temperature": TEMPERATURE} if loss == "listwise" else {}),
                },
                "data": {"padding_free": task == "generative_reranker"},
            }
            for task in ("reranker", "generative_reranker")
            for loss in ("pointwise", "listwise")
        },
    }
    found = {}
    for name, own in settings.items():
        merged = {**rows, **own}
        merged["training"] = {**rows["training"], "train_iters": 1}
        task = "rlhf" if "rlhf_type" in own.get("preference", {}) else "sft"
        found[name] = Case(name=name, settings=merged, task=task)
    return found


@cache
def ours() -> dict[str, list[tuple[float, float]]]:
    return run_distributed(curves, 1, folders()[0], list(cases().values()))[0]


def rows_of(name: str) -> EncodedSet:
    return synthetic_rows(cases()[name].run_config(folders()[0]))


def inputs_of(encoded: EncodedSet, entries: list[int]) -> dict[str, torch.Tensor]:
    whole = padded(encoded, entries)
    return {name: whole[name] for name in ("input_ids", "attention_mask")}


def scorer(num_labels: int, **config: Any) -> Any:
    """Return transformers' model with the head that ours begins with (models/score.py)."""
    found = AutoModelForSequenceClassification.from_pretrained(
        folders()[0], dtype=torch.float32, num_labels=num_labels, pad_token_id=0, **config
    )
    size = found.config.hidden_size
    head = torch.randn(num_labels, size, generator=torch.Generator().manual_seed(SEED)) / math.sqrt(size + 1)
    found.score.weight.data.copy_(head)
    return found


def differentiated(loss: torch.Tensor, model: Any) -> tuple[float, float]:
    loss.backward()
    norms = [weight.grad.double().norm() for weight in model.parameters() if weight.grad is not None]
    return float(loss.detach()), float(torch.stack(norms).norm())


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_classifier_has_the_loss_and_gradient_of_transformers(problem: str) -> None:
    model, encoded = scorer(LABELS, problem_type=problem), rows_of(problem)
    labels = torch.tensor(encoded.targets)
    labels = labels.long() if problem == "single_label_classification" else labels
    loss = model(**inputs_of(encoded, list(range(8))), labels=labels).loss
    agree(ours()[problem][0], differentiated(loss, model))


@pytest.mark.slow
def test_a_reward_model_has_the_loss_and_gradient_of_trl(tmp_path: Path) -> None:
    trainer = RewardTrainer(
        scorer(1),
        args=RewardConfig(**options(tmp_path, center_rewards_coefficient=CENTER)),
        train_dataset=Dataset.from_list([{"chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer(),
    )
    trainer.model.config.pad_token_id = 0  # of these rows, not of TRL's tokenizer
    inputs = inputs_of(rows_of("rm"), [*range(0, 16, 2), *range(1, 16, 2)])
    agree(ours()["rm"][0], loss_and_norm(trainer, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, SFT_ALPHA])
def test_a_student_has_the_loss_and_gradient_of_trl(alpha: float) -> None:
    student, teacher = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in folders())
    whole = padded(rows_of("gkd"), list(range(8)))
    inputs = {name: whole[name] for name in ("input_ids", "attention_mask")}
    labels = whole["input_ids"].masked_fill(whole["completion_mask"] == 0, -100)[:, 1:]
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits[:, :-1]
    logits = student(**inputs).logits[:, :-1]
    loss = GKDTrainer.generalized_jsd_loss(logits, teacher_logits, labels=labels, beta=BETA)
    loss = loss + alpha * torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
    agree(ours()[f"gkd{' sft' * bool(alpha)}"][0], differentiated(loss, student))


@pytest.mark.slow
def test_embeddings_have_the_gradient_of_the_whole_batch_at_once() -> None:
    model, encoded = AutoModel.from_pretrained(folders()[0], dtype=torch.float32), rows_of("embedding")
    inputs = inputs_of(encoded, list(range(24)))
    states = model(**inputs).last_hidden_state
    last = inputs["attention_mask"].sum(1) - 1
    embeddings = F.normalize(states[torch.arange(24), last], dim=1).unflatten(0, (8, 3))
    similarity = embeddings[:, 0] @ embeddings[:, 1:].flatten(0, 1).T
    loss = F.cross_entropy(similarity / TEMPERATURE, torch.arange(8) * 2)
    agree(ours()["embedding"][0], differentiated(loss, model))


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["pointwise", "listwise"])
@pytest.mark.parametrize("task", ["reranker", "generative_reranker"])
def test_rerankers_have_the_loss_and_gradient_of_transformers_scores(task: str, loss_type: str) -> None:
    name = f"{task} {loss_type}"
    encoded = rows_of(name)
    entries = [int(entry) for entry in encoded.lengths.nonzero()[0]]
    inputs = inputs_of(encoded, entries)
    if task == "reranker":
        model = scorer(1)
        scores = model(**inputs).logits[:, 0]
    else:
        model = AutoModelForCausalLM.from_pretrained(folders()[0], dtype=torch.float32)
        last = inputs["attention_mask"].sum(1) - 1
        logits = model(**inputs).logits[torch.arange(len(entries)), last]
        scores = logits[:, WORDS[0]] - logits[:, WORDS[1]]
    assert encoded.targets is not None
    groups = scores.split([int(size) for size in encoded.targets])
    if loss_type == "pointwise":
        losses = [
            -F.logsigmoid(score if place == 0 else -score)
            for one in groups
            for place, score in enumerate(one)
        ]
    else:
        losses = [-(one / TEMPERATURE).log_softmax(0)[0] for one in groups]
    agree(ours()[name][0], differentiated(torch.stack(losses).mean(), model))
