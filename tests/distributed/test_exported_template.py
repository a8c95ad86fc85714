"""A model whose tokenizer has no chat template is trained in ChatML, and whoever opens its export talks to it in ChatML."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megaswift.cli.main import main
from megaswift.config.parse import parse_run
from megaswift.data.template import Template
from tests.distributed.test_rlhf_runs import train_all
from tests.harness.distributed import run_distributed
from tests.harness.tiny_run import make_tiny_run

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


def trained(folder: Path, *more: str) -> Path:
    """Train a step, and return the checkpoint."""
    flags = [
        "--model", str(folder / "model"), "--dataset", str(folder / "rows.jsonl"), "--output_dir", str(folder / "out"),
        "--train_iters", "1", "--global_batch_size", "4", "--report_to", "none", *more,
    ]  # fmt: skip
    run_distributed(train_all, 1, [parse_run("sft", flags)])
    return folder / "out" / "checkpoint-1"


@pytest.mark.parametrize("has_template", [False, True])
def test_an_export_has_the_template_that_was_trained_with(tmp_path: Path, has_template: bool) -> None:
    model, _ = make_tiny_run(tmp_path, rows=8)
    if not has_template:
        (model / "chat_template.jinja").unlink()
    before = AutoTokenizer.from_pretrained(model)
    assert bool(before.chat_template) == has_template
    checkpoint = trained(tmp_path)
    exported = tmp_path / "exported"
    assert main(["export", "--checkpoint", str(checkpoint), "--output_dir", str(exported)]) == 0
    for folder in (checkpoint / "hf", exported):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == Template(before).chat_template
        assert "Me." in tokenizer.apply_chat_template(TURNS, tokenize=False)


def test_texts_that_are_joined_without_a_template_add_none(tmp_path: Path) -> None:
    model, _ = make_tiny_run(tmp_path, rows=8)
    (model / "chat_template.jinja").unlink()
    assert not AutoTokenizer.from_pretrained(
        trained(tmp_path, "--use_chat_template", "false") / "hf"
    ).chat_template
