"""Whole runs of `megaswift rlhf` and of classifiers: what is logged is what transformers and PEFT compute from the export; stopping changes nothing."""

import gc
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from megaswift.config.parse import parse_run
from megaswift.config.rules import resolve
from megaswift.config.run import RunConfig
from megaswift.data.encode import EncodedSet
from megaswift.data.forms import form_of
from megaswift.data.load import load_data
from megaswift.data.tokenizer import load_tokenizer, pad_id_of
from megaswift.kernels.linear_divergence.reference import generalised_jsd
from megaswift.mcore import process_groups
from megaswift.metadata.read import get_model_meta
from megaswift.platforms.platform import select_platform
from megaswift.rollout.reward_models import load_reward_models
from megaswift.tasks.catalogue import logged_beside_the_loss, trained_model
from megaswift.training.run import train_in_world
from tests.harness.distributed import run_distributed
from tests.harness.tiny_run import make_tiny_run
from tests.harness.training import temporary_folder

TOLERANCE = 1e-5  # float32 on both sides, sums of about ten log-probabilities
STEPS = 4
TP2 = ("--tensor_model_parallel_size", "2", "--sequence_parallel", "true")
CP2 = ("--context_parallel_size", "2", "--cp_comm_type", "p2p")
LABELS = ("--task_type", "seq_cls", "--num_labels", "3")
TWO_NEGATIVES = ("--max_negative_samples", "2")
JUDGE = tuple(
    "--task_type generative_reranker --loss_type listwise_reranker --generative_reranker_positive_token y "
    "--generative_reranker_negative_token n".split()
)
LORA = ("--tuner_type", "lora", "--lora_dropout", "0")
# run -> (ranks, flags)
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dpo": (2, ("--rlhf_type", "dpo", "--packing", "true", "--max_length", "64", *TP2)),
    "dpo precomputed": (1, ("--rlhf_type", "dpo", "--precompute_ref_log_probs", "true")),
    "dpo copied": (1, ("--rlhf_type", "dpo")),
    "dpo lora": (1, ("--rlhf_type", "dpo", *LORA)),
    "kto precomputed": (1, ("--rlhf_type", "kto", "--precompute_ref_log_probs", "true", *LORA)),
    "kto lora": (1, ("--rlhf_type", "kto", *LORA)),
    "orpo": (1, ("--rlhf_type", "orpo", *LORA)),
    "simpo": (1, ("--rlhf_type", "simpo", *LORA)),
    "cpo": (1, ("--rlhf_type", "cpo", *LORA)),
    "rm": (2, ("--rlhf_type", "rm", *TP2)),
    "dpo precomputed spread": (2, ("--rlhf_type", "dpo", "--precompute_ref_log_probs", "true", *CP2)),
    "rm lora spread": (2, ("--rlhf_type", "rm", *CP2, *LORA)),
    "labels": (2, (*LABELS, "--packing", "true", "--max_length", "64", *TP2)),
    "labels lora": (1, (*LABELS, *LORA)),
    "gkd lora": (1, ("--rlhf_type", "gkd", "--lmbda", "0", "--beta", "0.3", *LORA)),
    "dpo after merged": (1, ("--rlhf_type", "dpo")),
    "dpo after adapter": (1, ("--rlhf_type", "dpo")),
    "dpo after adapter precomputed": (1, ("--rlhf_type", "dpo", "--precompute_ref_log_probs", "true")),
    "dpo after adapter spread": (2, ("--rlhf_type", "dpo", *TP2)),
    "ranked": (2, ("--task_type", "reranker", *TWO_NEGATIVES, "--packing", "true", "--max_length", "64", *TP2)),
    "judge": (1, (*JUDGE, *TWO_NEGATIVES, *LORA)),
    "texts": (2, ("--task_type", "embedding", "--infonce_hard_negatives", "1", "--micro_batch_size", "2")),
}


@cache
def folder() -> Path:
    """A model, and rows that are pairs, judged answers, or questions with labels."""
    folder = temporary_folder()
    model, rows = make_tiny_run(folder, rows=24)
    save_references(model, folder)
    make_tiny_run(folder / "teacher", rows=1, name="llama-tied")
    kinds = ("judged", "pairs", "labelled", "texts", "groups")
    more: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number, line in enumerate(rows.read_text().splitlines()):
        row = json.loads(line)
        more["judged"].append({**row, "label": number % 3 != 0})
        more["pairs"].append({**row, "rejected_response": "no " * (1 + number % 4)})
        more["labelled"].append({"query": row["messages"][0]["content"], "label": number % 3})
        negatives = [[{"role": "user", "content": "no " * (1 + number % 4)}]]
        positives = [[{"role": "user", "content": row["messages"][1]["content"]}]]
        more["texts"].append(
            {"messages": row["messages"][:1], "positive_messages": positives, "negative_messages": negatives}
        )
        more["groups"].append({**more["texts"][-1], "negative_messages": negatives * (1 + number % 2)})
    for name, each in more.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return folder


def save_references(model: Path, folder: Path) -> None:
    """Write an adapter of some modules to "adapter", and the model with it inside to "merged"."""
    torch.manual_seed(3)
    chosen = LoraConfig(
        r=3, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), chosen)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")


def references(name: str) -> tuple[str, ...]:
    """Return the flags that say what the model of a run is compared with."""
    if "gkd" in name:
        return "--teacher_model", str(folder() / "teacher" / "model")
    if "merged" in name:
        return "--ref_model", str(folder() / "merged")
    return ("--ref_adapters", str(folder() / "adapter")) if "adapter" in name else ()


def flags(name: str, output: str) -> list[str]:
    kinds = {"kto": "judged", "labels": "labelled", "texts": "texts", "ranked": "groups", "judge": "groups"}
    rows = kinds.get(name.split()[0], "pairs")
    return [
        "--model", str(folder() / "model"), "--dataset", str(folder() / f"{rows}.jsonl"), "--split_dataset_ratio", "0.25",
        "--output_dir", str(folder() / output), "--train_iters", str(STEPS), "--global_batch_size", "4", "--learning_rate", "1e-2",
        "--lr_decay_style", "constant", "--save_steps", "2", "--save_total_limit", "2", "--logging_steps", "1", "--report_to", "none",
        *RUNS[name][1], *references(name),
    ]  # fmt: skip


def run_of(name: str) -> RunConfig:
    return parse_run("sft" if "--task_type" in RUNS[name][1] else "rlhf", flags(name, name))


def train_all(rank: int, world_size: int, runs: list[RunConfig]) -> None:
    for run in runs:
        train_in_world(run, select_platform("cpu"))
        for found in gc.get_objects():  # see prepared() in tests/harness/training.py
            if isinstance(found, DistributedDataParallel):
                vars(found).clear()
        process_groups.destroy()


def lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder() / output / "logging.jsonl").read_text().splitlines()]


@cache
def trained(ranks: int) -> None:
    """Make every run of so many ranks."""
    names = [name for name, (world, _) in RUNS.items() if world == ranks]
    run_distributed(train_all, ranks, [run_of(name) for name in names])


def output_of(name: str) -> Path:
    trained(RUNS[name][0])
    return folder() / name


def validation_set(name: str) -> EncodedSet:
    run = run_of(name)
    data = load_data(run.data, load_tokenizer(folder() / "model"), max_length=None, form=form_of(run))
    assert data.val is not None
    return data.val


def documents(encoded: EncodedSet) -> list[tuple[torch.Tensor, torch.Tensor]]:
    spans = [
        slice(int(start), int(end))
        for start, end in zip(encoded.starts, encoded.starts[1:], strict=False)
        if end > start
    ]
    return [
        (
            torch.tensor(np.array(encoded.input_ids[span]))[None].long(),
            torch.tensor(np.array(encoded.loss_weights[span] > 0)),
        )
        for span in spans
    ]


@torch.no_grad()
def logps(model: Any, encoded: EncodedSet) -> list[float]:
    """Return log p(answer | prompt) of each entry, as transformers computes it."""
    found = []
    for ids_1S, is_answer_S in documents(encoded):
        log_p = model(ids_1S).logits[0, :-1].double().log_softmax(-1)
        each = log_p.gather(1, ids_1S[0, 1:, None])[:, 0]
        found.append(float(each[is_answer_S[1:]].sum()))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def opened(name: str) -> tuple[Any, Any]:
    """Return the exported policy and the model it started from."""
    base = AutoModelForCausalLM.from_pretrained(folder() / "model", dtype=torch.float32).eval()
    start = AutoModelForCausalLM.from_pretrained(folder() / "model", dtype=torch.float32).eval()
    newest = output_of(name) / f"checkpoint-{STEPS}"
    if (newest / "adapter").exists():
        return PeftModel.from_pretrained(base, str(newest / "adapter")).eval(), start
    return AutoModelForCausalLM.from_pretrained(newest / "hf", dtype=torch.float32).eval(), start


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", [name for name in RUNS if "after" not in name and "pre" not in name])
def test_figures_of_validations_are_known_before(name: str) -> None:
    run, meta = run_of(name), get_model_meta(str(folder() / "model"))
    resolved = resolve(run, meta, RUNS[name][0], "cpu").config
    known = {"loss", *logged_beside_the_loss(resolved, trained_model(run, meta))}
    line = next(line for line in lines(output_of(name).name) if "eval_loss" in line)
    found = {word.removeprefix("eval_") for word in line if word.startswith("eval_")}
    # DPO has a likelihood of its own only with --rpo_alpha or loss_type=sft.
    assert found == known - ({"nll_loss"} if name.startswith("dpo") else set())


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["dpo", "dpo lora"])
def test_logged_rewards_are_those_of_the_exported_model(name: str) -> None:
    policy, start = opened(name)
    encoded = validation_set(name)
    now, before = logps(policy, encoded), logps(start, encoded)
    rewards = [0.1 * (a - b) for a, b in zip(now, before, strict=True)]
    line = lines(name)[-1]
    assert line["eval_logps/chosen"] == pytest.approx(mean(now[0::2]), rel=TOLERANCE)
    assert line["eval_rewards/chosen"] == pytest.approx(mean(rewards[0::2]), abs=TOLERANCE)
    assert line["eval_rewards/rejected"] == pytest.approx(mean(rewards[1::2]), abs=TOLERANCE)
    won = [float(a > b) for a, b in zip(rewards[0::2], rewards[1::2], strict=True)]
    assert line["eval_rewards/accuracies"] == pytest.approx(mean(won))
    losses = [float(np.logaddexp(0, b - a)) for a, b in zip(rewards[0::2], rewards[1::2], strict=True)]
    assert line["eval_loss"] == pytest.approx(mean(losses), rel=TOLERANCE)
    assert abs(mean(rewards[0::2])) > 1e-3, "the model must have moved"


@pytest.mark.slow
def test_logged_kto_rewards_are_those_of_the_exported_adapter() -> None:
    policy, start = opened("kto lora")
    encoded = validation_set("kto lora")
    rewards = [0.1 * (a - b) for a, b in zip(logps(policy, encoded), logps(start, encoded), strict=True)]
    good = [reward for reward, label in zip(rewards, encoded.targets, strict=True) if label]
    poor = [reward for reward, label in zip(rewards, encoded.targets, strict=True) if not label]
    line = lines("kto lora")[-1]
    assert good and poor
    assert line["eval_rewards/chosen"] == pytest.approx(mean(good), abs=TOLERANCE)
    assert line["eval_rewards/rejected"] == pytest.approx(mean(poor), abs=TOLERANCE)
    assert line["eval_rewards/margins"] == pytest.approx(mean(good) - mean(poor), abs=TOLERANCE)
    assert line["eval_kl"] >= 0


def opened_scorer(name: str, *, num_labels: int) -> Any:
    """Return the exported model as transformers opens it for sequence classification, or the adapter as PEFT does."""
    newest = output_of(name) / f"checkpoint-{STEPS}"
    if not (newest / "adapter").exists():
        return AutoModelForSequenceClassification.from_pretrained(newest / "hf", dtype=torch.float32).eval()
    # An adapter has no config.json: the base must be told which token is padding, or transformers reads the very last one.
    pad_id = pad_id_of(load_tokenizer(folder() / "model"))
    base = AutoModelForSequenceClassification.from_pretrained(
        folder() / "model", dtype=torch.float32, num_labels=num_labels, pad_token_id=pad_id
    )
    return PeftModel.from_pretrained(base, str(newest / "adapter")).eval()


@torch.no_grad()
def scores(name: str, *, num_labels: int) -> torch.Tensor:
    """Return the scores of the validation rows, as transformers computes them [documents, num_labels]."""
    model = opened_scorer(name, num_labels=num_labels)
    return torch.cat([model(ids_1S).logits.double() for ids_1S, _ in documents(validation_set(name))])


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["rm", "rm lora spread"])
def test_exported_reward_model_gives_the_logged_rewards(name: str) -> None:
    rewards = scores(name, num_labels=1)[:, 0]
    line = lines(name)[-1]
    assert line["eval_rewards/chosen"] == pytest.approx(float(rewards[0::2].mean()), abs=TOLERANCE)
    assert line["eval_rewards/rejected"] == pytest.approx(float(rewards[1::2].mean()), abs=TOLERANCE)
    assert lines(name)[-2]["loss"] < lines(name)[0]["loss"]


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_exported_reward_model_rewards_completions() -> None:
    model = str(output_of("rm") / f"checkpoint-{STEPS}" / "hf")
    words = [
        "--rlhf_type",
        "grpo",
        "--model",
        str(folder() / "model"),
        "--dataset",
        "d",
        "--reward_model",
        model,
    ]
    reward = load_reward_models(parse_run("rlhf", words), device=torch.device("cpu"), dtype=torch.float32)
    run = run_of("rm")
    read = load_data(run.data, load_tokenizer(folder() / "model"), max_length=None, form=form_of(run)).read
    assert read is not None
    talks = [list(messages) for row in read.val for messages in (row.messages, row.rejected)]
    found = reward["reward_model"](["" for _ in talks], talks)
    assert found == pytest.approx(scores("rm", num_labels=1)[:, 0].tolist(), abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["labels", "labels lora"])
def test_exported_classifier_has_the_logged_loss_and_accuracy(name: str) -> None:
    found = scores(name, num_labels=3)
    labels = torch.tensor(np.array(validation_set(name).targets)).long()
    line = lines(name)[-1]
    expected = float(torch.nn.functional.cross_entropy(found, labels))
    assert line["eval_loss"] == pytest.approx(expected, abs=TOLERANCE)
    assert line["eval_accuracy"] == pytest.approx(float((found.argmax(1) == labels).double().mean()))
    first, last = (one["eval_loss"] for one in lines(name) if "eval_loss" in one)
    assert abs(last - first) > 1e-3, "the model must have moved"


@pytest.mark.slow
@torch.no_grad()
def test_exported_student_has_the_logged_divergence_from_its_teacher() -> None:
    student, _ = opened("gkd lora")
    teacher = AutoModelForCausalLM.from_pretrained(folder() / "teacher" / "model", dtype=torch.float32).eval()
    losses = []
    for ids_1S, is_answer_S in documents(validation_set("gkd lora")):
        logits = [model(ids_1S).logits[0, :-1].double() for model in (student, teacher)]
        losses.append(generalised_jsd(*logits, beta=0.3)[is_answer_S[1:]])
    assert lines("gkd lora")[-1]["eval_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=TOLERANCE)
    assert lines("gkd lora")[-2]["loss"] < lines("gkd lora")[0]["loss"]


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_exported_embedding_model_has_the_logged_loss() -> None:
    newest = output_of("texts") / f"checkpoint-{STEPS}" / "hf"
    model = AutoModel.from_pretrained(newest, dtype=torch.float32).eval()
    assert not [name for name in load_file(newest / "model.safetensors") if "lm_head" in name]
    with torch.no_grad():
        states = [model(ids_1S).last_hidden_state[0, -1] for ids_1S, _ in documents(validation_set("texts"))]
    embeddings = torch.nn.functional.normalize(torch.stack(states).double(), dim=1).unflatten(0, (-1, 3))
    losses, correct = [], []
    for rows in embeddings.split(4):  # the last global batch is smaller
        similarity = rows[:, 0] @ rows[:, 1:].flatten(0, 1).T
        positives = torch.arange(len(rows)) * 2
        losses.append(torch.nn.functional.cross_entropy(similarity / 0.1, positives, reduction="none"))
        correct.append(similarity.argmax(1) == positives)
    line = lines("texts")[-1]
    assert line["eval_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=TOLERANCE)
    assert line["eval_accuracy"] == pytest.approx(float(torch.cat(correct).double().mean()))
    assert lines("texts")[-2]["loss"] < lines("texts")[0]["loss"]


def groups_of(scores_N: torch.Tensor, encoded: EncodedSet) -> list[torch.Tensor]:
    assert encoded.targets is not None and set(encoded.targets.tolist()) == {2, 3}
    return list(scores_N.split([int(size) for size in encoded.targets]))


def reciprocal_ranks(groups: list[torch.Tensor]) -> list[float]:
    return [1 / float(1 + (one[1:] >= one[0]).sum()) for one in groups]


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_exported_reranker_has_the_logged_loss_and_ranks() -> None:
    encoded = validation_set("ranked")
    groups = groups_of(scores("ranked", num_labels=1)[:, 0], encoded)
    signs = torch.cat([1.0 - 2.0 * (torch.arange(len(one)) > 0) for one in groups])
    losses = torch.nn.functional.softplus(-signs * torch.cat(groups))
    line = lines("ranked")[-1]
    assert line["eval_loss"] == pytest.approx(float(losses.mean()), abs=TOLERANCE)
    assert line["eval_mrr"] == pytest.approx(mean(reciprocal_ranks(groups)))
    assert lines("ranked")[-2]["loss"] < lines("ranked")[0]["loss"]


@pytest.mark.slow
@torch.no_grad()
def test_exported_judge_has_the_logged_loss_and_ranks() -> None:
    encoded, (model, _) = validation_set("judge"), opened("judge")
    yes, no = load_tokenizer(folder() / "model").convert_tokens_to_ids(["y", "n"])
    logits = torch.stack([model(ids_1S).logits[0, -1].double() for ids_1S, _ in documents(encoded)])
    groups = groups_of(logits[:, yes] - logits[:, no], encoded)
    expected = mean([float(-one.log_softmax(0)[0]) for one in groups])
    line = lines("judge")[-1]
    assert line["eval_loss"] == pytest.approx(expected, abs=TOLERANCE)
    assert line["eval_mrr"] == pytest.approx(mean(reciprocal_ranks(groups)))
    assert lines("judge")[-2]["loss"] < lines("judge")[0]["loss"]


@pytest.mark.slow
def test_a_classifier_goes_on_from_its_adapter_and_head() -> None:
    adapter = output_of("labels lora") / f"checkpoint-{STEPS}" / "adapter"
    words = [
        "0" if word == "1e-2" else word for word in flags("labels lora", "labels again")
    ]  # nothing is learnt
    run_distributed(train_all, 1, [parse_run("sft", [*words, "--adapters", str(adapter)])])
    expected = lines("labels lora")[-1]["eval_loss"]
    assert lines("labels again")[-1]["eval_loss"] == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.ranks(2)
def test_exported_classifier_says_what_its_labels_are() -> None:
    config = opened_scorer("labels", num_labels=3).config
    assert (config.num_labels, config.problem_type) == (3, "single_label_classification")
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.pad_token_id is not None, "without it transformers reads no batch of rows"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("computed", "at_hand"),
    [
        ("dpo precomputed", "dpo copied"),
        ("dpo precomputed spread", "dpo copied"),
        ("kto precomputed", "kto lora"),
    ],
)
def test_references_computed_once_train_as_those_at_hand(computed: str, at_hand: str) -> None:
    trained(1)
    assert list((output_of(computed) / "reference_logps").glob("*.npy"))
    # Another layout adds in another order, which shows in the last digits of sums of tens.
    rel = TOLERANCE if "spread" in computed else 0.0
    for found, expected in zip(lines(computed), lines(at_hand), strict=True):
        shared = [
            name
            for name in expected
            if name.startswith(("loss", "grad_norm", "rewards", "logps", "kl", "eval_"))
        ]
        assert {name: found[name] for name in shared} == pytest.approx(
            {name: expected[name] for name in shared}, abs=TOLERANCE, rel=rel
        )


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("dpo after adapter")])
def test_reference_with_an_adapter_is_that_with_the_adapter_inside(name: str) -> None:
    assert output_of("dpo after merged") and output_of(name)
    first, plain = lines("dpo after merged")[0], lines("dpo copied")[0]
    assert abs(first["rewards/chosen"] - plain["rewards/chosen"]) > 1e-2, "the adapter must say something"
    for found, expected in zip(lines(name), lines("dpo after merged"), strict=True):
        for figure in expected:
            if figure.startswith(("loss", "rewards", "logps", "eval_")):
                assert found[figure] == pytest.approx(expected[figure], abs=TOLERANCE, rel=TOLERANCE), figure


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "name",
    "dpo copied|kto precomputed|orpo|simpo|cpo|labels lora|gkd lora|rm|labels|texts|ranked|judge".split("|"),
)
def test_resumed_run_repeats_every_figure(name: str) -> None:
    before = lines(name) if output_of(name) else []
    (output_of(name) / f"checkpoint-{STEPS}" / "manifest.json").unlink()
    run_distributed(train_all, RUNS[name][0], [run_of(name)])
    after = lines(name)
    assert len(after) == len(before) >= STEPS
    timed = ("step_time_s", "tokens_per_s", "model_tflops_per_s", "memory_gib")
    assert [{k: v for k, v in line.items() if k not in timed} for line in after] == [
        {k: v for k, v in line.items() if k not in timed} for line in before
    ]
