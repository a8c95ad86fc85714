"""Embeddings: the losses of the papers, the texts of a row, and the settings that they need."""

import json
import math
from pathlib import Path

import pytest
import torch

from megaswift.config.data import DataConfig
from megaswift.config.embedding import EmbeddingConfig
from megaswift.config.head_rules import variables_are_flags
from megaswift.config.parse import parse, parse_run
from megaswift.config.rules import resolve
from megaswift.data.encode import encode_samples
from megaswift.data.forms import COMPARED, grouped
from megaswift.data.read import read_datasets
from megaswift.data.sample import Sample
from megaswift.data.template import Template
from megaswift.errors import ConfigError, DataError
from megaswift.tasks.embedding import METRICS, _same_random_numbers, embedding_loss
from tests.unit.small_tokenizers import small_tokenizer
from tests.unit.test_config_rules import dense, resolved
from tests.unit.test_data_pairs import encoded_rows, text

# Losses are of order 1. Central differences of step 1e-4 are wrong by 1e-8 times a third derivative.
TOLERANCE, STEP = 1e-6, 1e-4
TEMPERATURE = 0.5
LABELS = [0.8, 0.0, 1.0]  # of three rows


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def nce(anchor: list[float], positive: list[float], others: list[list[float]]) -> float:
    top = math.exp(dot(anchor, positive) / TEMPERATURE)
    return -math.log(top / (top + sum(math.exp(dot(anchor, other) / TEMPERATURE) for other in others)))


def in_batch(rows: list[list[list[float]]]) -> list[float]:
    every = [(number, place, e) for number, row in enumerate(rows) for place, e in enumerate(row) if place]
    return [
        nce(row[0], row[1], [e for where, place, e in every if (where, place) != (number, 1)])
        for number, row in enumerate(rows)
    ]


def contrastive(similarity: float, label: float) -> float:
    apart = 1 - similarity
    return 0.5 * (label * apart**2 + (1 - label) * max(0.0, 0.5 - apart) ** 2)


def cut(row: list[list[float]], size: int) -> list[list[float]]:
    """The first numbers of embeddings, brought to length 1."""
    return [[value / math.sqrt(dot(e[:size], e[:size])) for value in e[:size]] for e in row]


def nested(rows: list[list[list[float]]]) -> list[float]:
    """Kusupati et al. 2022, eq. 1, for 2 of the 5 numbers with weight 0.3, and all with weight 2."""
    short, long = (in_batch([cut(row, size) for row in rows]) for size in (2, 5))
    return [0.3 * a + 2 * b for a, b in zip(short, long, strict=True)]


# name -> (loss_type, settings, the paper's losses of all rows, each a list of embeddings)
CASES = {
    "in-batch negatives": ("infonce", {}, in_batch),
    "nested": ("infonce", {"mrl_dims": {"2": 0.3, "5": 2}, "infonce_hard_negatives": 1}, nested),
    "in-batch and hard negatives": ("infonce", {"infonce_hard_negatives": 2}, in_batch),
    "hard negatives": (
        "infonce",
        {"infonce_hard_negatives": 2, "infonce_use_batch": False},
        lambda rows: [nce(row[0], row[1], row[2:]) for row in rows],
    ),
    "cosine_similarity": (
        "cosine_similarity",
        {},
        lambda rows: [(dot(*row) - label) ** 2 for row, label in zip(rows, LABELS, strict=True)],
    ),
    "contrastive": (
        "contrastive",
        {},
        lambda rows: [contrastive(dot(*row), label) for row, label in zip(rows, LABELS, strict=True)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_paper(name: str) -> None:
    kind, words, paper = CASES[name]
    settings = EmbeddingConfig(infonce_temperature=TEMPERATURE, **words)
    texts = 2 + settings.infonce_hard_negatives
    start = torch.randn(3 * texts, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 2
    labels = torch.tensor(LABELS, dtype=torch.float64)

    def by_paper(embeddings: torch.Tensor) -> list[float]:
        return paper(embeddings.unflatten(0, (3, texts)).tolist())

    embeddings = start.clone().requires_grad_()
    outcome = embedding_loss(embeddings, labels, loss_type=kind, settings=settings)
    assert outcome.losses_R.tolist() == pytest.approx(by_paper(start), abs=TOLERANCE)
    (gradient,) = torch.autograd.grad(outcome.losses_R.sum(), embeddings)
    for place in range(start.numel()):
        step = torch.zeros(start.numel(), dtype=torch.float64)
        step[place] = STEP
        ahead, behind = (sum(by_paper(start + sign * step.view_as(start))) for sign in (1, -1))
        assert float(gradient.view(-1)[place]) == pytest.approx((ahead - behind) / (2 * STEP), abs=TOLERANCE)
    assert set(outcome.metrics) == set(METRICS[kind])
    assert not any(values.requires_grad for values in outcome.metrics.values())


@pytest.mark.parametrize("in_batch", [True, False])
def test_margins_and_similarities_are_those_of_the_texts(in_batch: bool) -> None:
    rows = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    settings = EmbeddingConfig(infonce_hard_negatives=2, infonce_use_batch=in_batch)
    outcome = embedding_loss(rows.flatten(0, 1), None, loss_type="infonce", settings=settings)
    for number, row in enumerate(rows.tolist()):
        others = [
            dot(row[0], text)
            for where, own in enumerate(rows.tolist())
            for place, text in enumerate(own)
            if place and (where, place) != (number, 1) and (in_batch or where == number)
        ]
        found = {name: float(values[number]) for name, values in outcome.metrics.items()}
        assert found["margin"] == pytest.approx(dot(row[0], row[1]) - max(others))
        assert found["similarity/negative"] == pytest.approx(sum(others) / len(others))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ('{"0": 1}', "mrl_dims names 0 of the"),
        ('{"100000": 1}', "mrl_dims names 100000 of the"),
        ('{"all": 1}', "mrl_dims names all of the"),
        ('{"4": 0}', "mrl_dims weighs 4 with 0. Give a number above 0"),
    ],
)
def test_parts_of_embeddings_that_are_not_there_are_refused(words: str, message: str) -> None:
    asked = parse_run(
        "sft", ["--model", "m", "--dataset", "d", "--task_type", "embedding", "--mrl_dims", words]
    )
    with pytest.raises(ConfigError, match=message):
        resolve(asked, dense(), 1, "cpu")
    with pytest.raises(ConfigError, match=r"mrl_dims=.* is for --task_type embedding"):
        resolve(parse_run("sft", ["--model", "m", "--dataset", "d", "--mrl_dims", words]), dense(), 1, "cpu")


@pytest.mark.parametrize(("task", "words"), [("rlhf", ""), ("sft", "--task_type embedding")])
def test_weights_by_probability_are_of_tokens(task: str, words: str) -> None:
    with pytest.raises(ConfigError, match="enable_dft_loss=true is for token losses"):
        resolved(f"{words} --enable_dft_loss true", dense(), task=task)


def test_two_passes_draw_the_same_random_numbers() -> None:
    with _same_random_numbers():
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), first)


def turns(words: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": words}]


def test_a_row_is_a_text_its_positive_and_its_negatives(tmp_path: Path) -> None:
    rows = [
        {
            "messages": turns("sun"),
            "positive_messages": [turns("star")],
            "negative_messages": [turns("tree"), turns("leaf"), turns("root")],
        },
        {"query": "sun", "response": "star", "rejected_response": "tree"},
    ]
    encoded, report, template = encoded_rows(tmp_path, rows, grouped(2))
    assert (report.kept, encoded.per_row, len(encoded)) == (2, 4, 8)
    assert encoded.targets is None and not encoded.loss_weights.any()
    found = [text(encoded, entry, template) for entry in range(8)]
    expected = ["sun", "star", "tree", "leaf", "sun", "star", "tree", "tree"]
    assert found == [f"<|im_start|>user\n{word}<|im_end|>\n<|im_start|>assistant\n" for word in expected]


def test_two_texts_have_a_similarity(tmp_path: Path) -> None:
    rows = [
        {"query": "sun", "response": "star", "label": 0.8},
        {"messages": turns("sun"), "positive_messages": [turns("tree")], "label": 0},
    ]
    encoded, report, template = encoded_rows(tmp_path, rows, COMPARED)
    assert (report.kept, encoded.per_row) == (2, 2)
    assert encoded.targets is not None and encoded.targets.tolist() == pytest.approx([0.8, 0.0])
    assert "tree" in text(encoded, 3, template)


def test_rows_without_what_the_loss_needs_are_reported(tmp_path: Path) -> None:
    whole = {"messages": turns("sun"), "positive_messages": [turns("star")]}
    rows = [
        whole,
        {"messages": turns("sun")},
        {**whole, "negative_messages": [turns("tree")]},
        {**whole, "positive_messages": [turns("star"), turns("tree")]},
    ]
    _, report, _ = encoded_rows(tmp_path, rows, grouped(0))
    assert [bad.reason for bad in report.bad] == [
        "a row of layout messages has 0 positive_messages, not one",
        "the row has 1 negatives, and infonce_hard_negatives=0 asks for others",
        "a row of layout messages has 2 positive_messages, not one",
    ]


def test_texts_without_a_token_are_reported(tmp_path: Path) -> None:
    """An entry of no tokens has no last one to read: what is read there belongs to another text."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "sun", "positive_messages": [turns("")]}))
    with pytest.raises(DataError, match="empty text: a text of positive_messages is empty"):
        read_datasets(DataConfig(dataset=[str(tmp_path / "rows.jsonl")]))
    made = Sample(source="f:1", messages=tuple(turns("sun")), positives=(tuple(turns("")),))
    template = Template(small_tokenizer(), use_chat_template=False)
    with pytest.raises(DataError, match="empty text: the text has no tokens"):
        encode_samples([made], template, form=grouped(0))


@pytest.mark.parametrize("label", [math.nan, math.inf, 1e39])
def test_a_similarity_is_a_finite_number(tmp_path: Path, label: float) -> None:
    rows = [{"query": "sun", "response": "star", "label": one} for one in (0.5, label)]
    _, report, _ = encoded_rows(tmp_path, rows, COMPARED)
    assert [bad.kind for bad in report.bad] == ["label"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--infonce_temperature 0.05",
            "infonce_temperature=0.05 is for --task_type embedding --loss_type infonce",
        ),
        (
            "--task_type embedding --loss_type contrastive --infonce_hard_negatives 1",
            "infonce_hard_negatives=1 is for --task_type embedding --loss_type infonce",
        ),
        (
            "--task_type embedding --loss_type infonse",
            "loss_type=infonse is not built for task_type=embedding. Did",
        ),
        ("--task_type embedding --infonce_temperature 0", "infonce_temperature=0 must be above 0"),
        ("--task_type embedding --infonce_use_batch false", "infonce_use_batch=false leaves no negatives"),
        (
            "--task_type embedding --padding_free false",
            "padding_free=false does not go with task_type=embedding",
        ),
        ("--task_type embedding --num_labels 2", "num_labels=2 is for sequence classification"),
        ("--loss_type infonce", "loss_type=infonce is for `megaswift rlhf`"),
        (
            "--task_type embedding --infonce_hard_negatives 1 --packing --max_length 100 --packing_length 200",
            "packing_length=200 is below 3 x max_length=100: all 3 texts of a row",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(words, dense())


def test_variables_of_ms_swift_are_flags_here() -> None:
    environ = {"INFONCE_TEMPERATURE": "0.02", "MAX_NEGATIVE_SAMPLES": "3"}
    words = "--model m --dataset d --task_type embedding --infonce_temperature 0.02 --max_negative_samples 3".split()
    for own in (words, words[:4]):  # told already, or of a task that does not read them
        parsed = parse("sft", own)
        variables_are_flags(parsed.config, parsed.given, environ)
    parsed = parse("sft", words[:8])
    with pytest.raises(
        ConfigError,
        match=r"MAX_NEGATIVE_SAMPLES=3 of the environment is not read\. Give --max_negative_samples 3",
    ):
        variables_are_flags(parsed.config, parsed.given, environ)
