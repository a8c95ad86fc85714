"""Rerankers: the losses of groups, the documents of a row, and the settings that they need."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from megaswift.config.rows import texts_of_a_row
from megaswift.data.batches import BatchSettings, MicroBatch, TrainData
from megaswift.data.forms import answered, asked_to_judge, form_of, ranked
from megaswift.data.sample import Sample
from megaswift.data.template import Template
from megaswift.errors import ConfigError
from megaswift.metadata.read import get_model_meta
from megaswift.tasks.catalogue import judging_words
from megaswift.tasks.reranker import METRICS, reranker_loss
from tests.harness.tiny_run import make_tiny_run
from tests.unit.chat_formats import FORMATS
from tests.unit.small_tokenizers import small_tokenizer
from tests.unit.test_config_rules import dense, resolved
from tests.unit.test_data_pairs import encoded_rows, text

# Scores and gradients are of order 1. Central differences of step 1e-4 are wrong by 1e-8 times a third derivative.
TOLERANCE, STEP = 1e-6, 1e-4
TEMPERATURE = 0.7
GROUPS = [[0.3, -0.4, 1.2], [1.5, 0.2], [-2.0, 1.0, -3.0, 0.5]]  # scores; the positive first
SIZES = [len(group) for group in GROUPS]


def pointwise(group: list[float]) -> list[float]:
    positive, *negatives = group
    return [math.log(1 + math.exp(-positive)), *(math.log(1 + math.exp(score)) for score in negatives)]


def listwise(group: list[float]) -> list[float]:
    return [math.log(sum(math.exp((score - group[0]) / TEMPERATURE) for score in group))]


FORMULAS = {"pointwise_reranker": pointwise, "listwise_reranker": listwise}


@pytest.mark.parametrize("kind", FORMULAS)
def test_loss_and_gradient_are_the_formulas(kind: str) -> None:
    def by_formula(scores: list[float]) -> list[float]:
        groups = np.split(np.array(scores), np.cumsum(SIZES)[:-1])
        return [loss for group in groups for loss in FORMULAS[kind](group.tolist())]

    flat = [score for group in GROUPS for score in group]
    scores = torch.tensor(flat, dtype=torch.float64, requires_grad=True)
    outcome = reranker_loss(scores, SIZES, loss_type=kind, temperature=TEMPERATURE)
    assert outcome.losses_R.tolist() == pytest.approx(by_formula(flat), abs=TOLERANCE)
    (gradient,) = torch.autograd.grad(outcome.losses_R.sum(), scores)
    for place in range(len(flat)):
        ahead, behind = (
            sum(by_formula([score + sign * STEP * (number == place) for number, score in enumerate(flat)]))
            for sign in (1, -1)
        )
        assert float(gradient[place]) == pytest.approx((ahead - behind) / (2 * STEP), abs=TOLERANCE)
    assert set(outcome.metrics) == set(METRICS)
    assert not any(values.requires_grad for values in outcome.metrics.values())


def test_metrics_are_of_the_place_of_the_positive() -> None:
    scores = torch.tensor([score for group in GROUPS for score in group], dtype=torch.float64)
    listwise, pointwise = (
        reranker_loss(scores, SIZES, loss_type=kind) for kind in ("listwise_reranker", "pointwise_reranker")
    )
    assert listwise.metrics["mrr"].tolist() == pytest.approx([1 / 2, 1, 1 / 3])
    assert listwise.metrics["ndcg"].tolist() == pytest.approx([1 / math.log2(3), 1, 1 / 2])
    assert listwise.metrics["accuracy"].tolist() == [0, 1, 0]
    assert pointwise.metrics["accuracy"].tolist() == [1, 1, 0, 1, 0, 0, 0, 1, 0]
    equal = reranker_loss(torch.zeros(4), [4], loss_type="listwise_reranker")
    assert equal.metrics["mrr"].tolist() == [1 / 4], "a model that tells nothing apart must not look good"


@pytest.mark.parametrize("kind", FORMULAS)
def test_no_group_has_no_loss(kind: str) -> None:
    outcome = reranker_loss(torch.zeros(0, dtype=torch.float64), [], loss_type=kind)
    assert outcome.losses_R.shape == (0,) and {len(values) for values in outcome.metrics.values()} == {0}


def doc(words: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": words}]


def row(good: list[str], poor: list[str], *, query: str = "sun") -> dict[str, object]:
    return {
        "messages": doc(query, "user"),
        "positive_messages": [doc(words) for words in good],
        "negative_messages": [doc(words) for words in poor],
    }


ANSWERED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"


def test_a_row_is_groups_of_a_positive_and_its_negatives(tmp_path: Path) -> None:
    rows = [
        row(["star"], ["tree", "leaf", "root"]),
        row(["star", "light", "day"], ["tree", "leaf", "root"]),
        row(["star"], ["tree"]),
        {"query": "sun", "positive": ["star"], "negative": "tree"},
        {"query": "sun", "response": "star", "rejected_response": "tree"},
    ]
    form = ranked(positives=2, negatives=2, fewest=2, text=answered)
    encoded, report, template = encoded_rows(tmp_path, rows, form)
    assert (report.kept, encoded.per_row, encoded.num_rows) == (5, 6, 5)
    assert encoded.targets is not None and encoded.targets.tolist() == [
        [3, 0],
        [3, 3],
        [2, 0],
        [2, 0],
        [2, 0],
    ]
    assert not encoded.loss_weights.any()
    found = [text(encoded, entry, template) for entry in range(30) if encoded.lengths[entry]]
    groups = [
        ["star", "tree", "leaf"],
        ["star", "tree", "leaf"],
        ["light", "root", "tree"],
        *[["star", "tree"]] * 3,
    ]
    assert found == [ANSWERED.format("sun", words) for group in groups for words in group]


def micro_batches(encoded, **words) -> list[MicroBatch]:
    data = TrainData(encoded, BatchSettings(shuffle=False, **words))
    return list(data.micro_batches(0, dp_rank=0, dp=1))


@pytest.mark.parametrize(
    "words",
    [
        {"global_batch_size": 2, "micro_batch_size": 2, "padding_free": False},
        {"global_batch_size": 2, "micro_batch_size": 2},
        {"global_batch_size": 1, "packing": True, "packing_length": 4096},
    ],
)
def test_documents_that_a_row_lacks_are_in_no_batch(tmp_path: Path, words: dict) -> None:
    rows = [row(["star"], ["tree"]), row(["light"], ["leaf", "root"])]
    encoded, _, _ = encoded_rows(tmp_path, rows, ranked(positives=1, negatives=3, fewest=2, text=answered))
    assert encoded.row_lengths.tolist() == [sum(encoded.lengths[:4]), sum(encoded.lengths[4:])]
    (batch,) = micro_batches(encoded, **words)
    assert batch.sample_ids == (0, 1, 4, 5, 6) and batch.lengths == tuple(
        encoded.lengths[list(batch.sample_ids)]
    )
    assert batch.targets is not None and batch.targets.tolist() == [2, 3]


QUESTION = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {}\n<Query>: sun\n'
    "<Document>: {}<|im_end|>\n<|im_start|>assistant\n"
)
SEARCH = "Given a web search query, retrieve relevant passages that answer the query"


def test_a_generative_reranker_is_asked_as_qwen3_reranker_is(tmp_path: Path) -> None:
    whole = row(["star"], ["tree"])
    own = [{"role": "system", "content": "Find plants"}, *doc("tree")]
    system = [{"role": "system", "content": "Find stars"}, *doc("sun", "user")]
    rows = [whole, {**whole, "messages": system}, {**whole, "messages": system, "negative_messages": [own]}]
    form = ranked(positives=1, negatives=1, fewest=2, text=asked_to_judge)
    encoded, report, template = encoded_rows(tmp_path, rows, form)
    assert report.kept == 3
    instructions = [SEARCH, SEARCH, "Find stars", "Find stars", "Find stars", "Find plants"]
    assert [text(encoded, entry, template) for entry in range(6)] == [
        QUESTION.format(words, ("star", "tree")[entry % 2]) for entry, words in enumerate(instructions)
    ]


def test_a_generative_reranker_answers_without_thinking() -> None:
    thinks = (
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    )
    chat = FORMATS["chatml"]
    template = Template(small_tokenizer(chat.template + thinks, special=chat.special, eos=chat.eos))
    query = Sample(source="rows:1", messages=tuple(doc("sun", "user")))
    asked = template.prompt(asked_to_judge(query, doc("star")[0]))
    assert asked == QUESTION.format(SEARCH, "star") + "<think>\n\n</think>\n\n"


def test_rows_without_groups_are_reported(tmp_path: Path) -> None:
    whole = row(["star"], ["tree", "leaf"])
    rows = [
        whole,
        row([], ["tree"]),
        row(["star"], []),
        row(["star"], ["tree"]),
        row(["star"], ["tree", " "]),  # reported when it is read
        {**whole, "messages": [*doc("sun", "user"), *doc("moon")]},
        {**whole, "positive_messages": [[*doc("star"), *doc("why", "user")]]},
    ]
    form = ranked(positives=1, negatives=3, fewest=3, text=answered)
    _, report, _ = encoded_rows(tmp_path, rows, form)
    assert report.kept == 1
    assert [(bad.source.rpartition(":")[2], bad.kind, bad.reason) for bad in report.bad] == [
        ("2", "group", "a row of layout messages has no positive_messages"),
        ("3", "group", "a row of layout messages has no negative_messages"),
        ("4", "group", "the row has 1 negatives, and a group is 3 documents or more"),
        ("6", "group", "the query (messages) does not end with a user turn"),
        ("7", "group", "a document has 2 turns, or no text; it is one turn with text"),
    ]


def test_a_judge_is_asked_about_a_query_of_one_turn(tmp_path: Path) -> None:
    talk = [*doc("sun", "user"), *doc("moon"), *doc("star", "user")]
    rows = [row(["star"], ["tree"]), {**row(["star"], ["tree"]), "messages": talk}]
    form = ranked(positives=1, negatives=1, fewest=2, text=asked_to_judge)
    _, report, _ = encoded_rows(tmp_path, rows, form)
    assert [bad.reason for bad in report.bad] == ["the query has 3 turns; it is one user turn"]


@pytest.mark.parametrize(
    ("words", "per_row", "name"),
    [
        ("--task_type reranker", 8, "answered in 1 groups of 2 to 8"),
        (
            "--task_type generative_reranker --loss_type listwise_reranker --max_positive_samples 2 --max_negative_samples 4 "
            "--listwise_reranker_min_group_size 3",
            10,
            "asked_to_judge in 2 groups of 3 to 5",
        ),
    ],
)
def test_settings_say_what_a_row_is(words: str, per_row: int, name: str) -> None:
    run = resolved(words, dense()).config
    form = form_of(run)
    assert (texts_of_a_row(run), form.per_row, form.name) == (per_row, per_row, name)
    assert run.data.packing_length == per_row * run.data.max_length


RERANKER, JUDGE = "--task_type reranker", "--task_type generative_reranker"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--max_negative_samples 3",
            "max_negative_samples=3 is for --task_type reranker or generative_reranker. Leave",
        ),
        (
            f"{RERANKER} --listwise_reranker_temperature 2",
            "listwise_reranker_temperature=2.0 is for .* --loss_type listwise",
        ),
        (
            f"{RERANKER} --generative_reranker_positive_token ja",
            "positive_token=ja is for --task_type generative_reranker",
        ),
        (f"{RERANKER} --loss_type pointwise", "loss_type=pointwise is not built for task_type=reranker. Did"),
        (
            f"{RERANKER} --max_positive_samples 0",
            "max_positive_samples=0 and max_negative_samples=7: a group has",
        ),
        (
            f"{RERANKER} --loss_type listwise_reranker --listwise_reranker_temperature 0",
            "listwise_reranker_temperature=0 is too",
        ),
        (
            f"{RERANKER} --loss_type listwise_reranker --listwise_reranker_min_group_size 9",
            r"min_group_size=9 is not from 2 to 8",
        ),
        (f"{RERANKER} --num_labels 1", "num_labels=1 is for sequence classification"),
        (
            f"{RERANKER} --calculate_per_token_loss false",
            "calculate_per_token_loss=false is for token losses",
        ),
        (f"{RERANKER} --enable_dft_loss true", "enable_dft_loss=true is for token losses"),
        (f"{JUDGE} --system hello", "system=hello does not go with task_type=generative_reranker"),
        (f"{JUDGE} --use_chat_template false", "use_chat_template=false does not go with"),
        (f"{JUDGE} --enable_thinking true", "enable_thinking=true does not go with"),
        (f"{JUDGE} --truncation_strategy right", "truncation_strategy=right does not go with"),
        (f"{JUDGE} --padding_free false", "padding_free=false does not go with"),
        (f"{JUDGE} --generative_reranker_positive_token no", "are both 'no'. Give two words"),
        ("--loss_type listwise_reranker", "loss_type=listwise_reranker is for `megaswift rlhf`"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(words, dense())


def test_the_words_of_a_judge_are_tokens_of_the_model(tmp_path: Path) -> None:
    model, _ = make_tiny_run(tmp_path, rows=1)
    meta = get_model_meta(model)
    run = resolved(
        f"{JUDGE} --generative_reranker_positive_token y --generative_reranker_negative_token n", dense()
    ).config
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert judging_words(run, meta) == tuple(tokenizer.convert_tokens_to_ids(["y", "n"]))
    run = resolved(f"{JUDGE} --generative_reranker_positive_token oui", dense()).config
    with pytest.raises(
        ConfigError, match="generative_reranker_positive_token='oui' is no token of this model"
    ):
        judging_words(run, meta)


@pytest.mark.parametrize(
    "words",
    [
        f"{RERANKER} --eval_metric reranker",
        f"{JUDGE} --eval_metric reranker",
        "--task_type embedding --eval_metric infonce",
        "--task_type embedding --eval_metric paired --loss_type cosine_similarity",
        "--task_type seq_cls --num_labels 2 --eval_metric acc",
    ],
)
def test_what_validations_report_may_be_named(words: str) -> None:
    assert resolved(words, dense()).config.logging.eval_metric
