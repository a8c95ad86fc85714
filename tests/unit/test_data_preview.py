"""`megaswift data`: layouts, coloured samples, lengths, packing and every bad row."""

import json

import pytest
from rich.console import Console

from megaswift.cli.main import main
from megaswift.config.data import DataConfig
from megaswift.data.forms import PAIRS
from megaswift.data.preview import make_preview, render
from megaswift.data.read import read_datasets
from megaswift.data.template import Template
from tests.unit.chat_formats import FORMATS
from tests.unit.small_tokenizers import small_tokenizer

FORM = FORMATS["chatml"]
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 512,
    "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    lines = [json.dumps({"query": f"q{i}", "response": "yes " * (i + 1)}) for i in range(20)]
    lines.insert(3, '{"broken')
    lines.append(json.dumps({"text": "Some [bold]text[/bold]"}))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    small_tokenizer(FORM.template, special=FORM.special, eos=FORM.eos).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def template() -> Template:
    return Template(small_tokenizer(FORM.template, special=FORM.special, eos=FORM.eos), max_length=64)


def text_of(preview) -> str:
    console = Console(width=200, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(render(preview))
    return capture.get()


def test_pairs_are_shown_answer_by_answer(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        json.dumps({"prompt": "q", "chosen": "yes", "rejected": "no"})
        + "\n"
        + json.dumps({"query": "q", "response": "a"})
    )
    preview = make_preview(
        read_datasets(DataConfig(dataset=[str(path)])), template(), form=PAIRS, packing_length=None
    )
    trained = ["".join(text for text, weight in example.parts if weight) for example in preview.examples]
    assert [text[:2] for text in trained] == ["ye", "no"]
    assert [(row.source, row.kind) for row in preview.bad] == [(f"{path}:2", "pair")]
    assert (len(preview.lengths), preview.num_packs) == (2, 1)


def test_the_preview_counts_rows_layouts_and_tokens(rows):
    read = read_datasets(DataConfig(dataset=[str(rows)]))
    preview = make_preview(read, template(), packing_length=64)
    assert preview.sets[0].layouts == {"query-response": 20, "text": 1}
    assert [row.source for row in preview.bad] == [f"{rows}:4"]
    assert len(preview.lengths) == 21 and 0.8 < preview.fill <= 1
    assert {example.layout for example in preview.examples} == {"query-response", "text"}


def test_trained_text_is_told_apart(rows):
    read = read_datasets(DataConfig(dataset=[str(rows)]))
    example = make_preview(read, template(), packing_length=64).examples[0]
    assert [part for part, weight in example.parts if weight] == ["yes <|im_end|>"]
    assert "".join(part for part, _ in example.parts).startswith("<|im_start|>user\nq0<|im_end|>")


def test_everything_is_shown_as_it_is(rows):
    shown = text_of(
        make_preview(read_datasets(DataConfig(dataset=[str(rows)])), template(), packing_length=64)
    )
    for expected in (
        "query-response 20, text 1",
        "[bold]text[/bold]",
        "bad rows: 1",
        "rows.jsonl:4",
        "% filled",
        "21 entries",
    ):
        assert expected in shown


def test_without_a_model_layouts_and_bad_rows_are_shown(rows, capsys):
    assert main(["data", "--dataset", str(rows)]) == 0
    shown = capsys.readouterr().out
    assert "query-response" in shown and "bad rows: 1" in shown and "entries" not in shown


def test_the_command_shows_samples_of_a_model(rows, model, capsys):
    assert (
        main(
            [
                "data",
                "--dataset",
                str(rows),
                "--model",
                str(model),
                "--max_length",
                "32",
                "--packing_length",
                "32",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "assistant" in shown and "packed into" in shown
    assert "too long" in " ".join(shown.split())


def test_the_command_reports_errors(capsys):
    assert main(["data", "--dataset", "missing.jsonl"]) == 2
    assert "missing.jsonl is not there" in capsys.readouterr().err


def test_the_command_has_a_help(capsys):
    assert main(["data", "--help"]) == 0
    assert "usage: megaswift data" in capsys.readouterr().out
