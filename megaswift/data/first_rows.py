"""Encode the first rows of a run's data sets: `python -m megaswift.data.first_rows run.yaml` prints what it found as JSON.

A process of its own, started before a job is queued by a program that loads neither torch nor transformers
(launch/preflight.py).
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megaswift.config.parse import parse_saved
from megaswift.config.run import RunConfig
from megaswift.data.address import template_facts
from megaswift.data.encode import encode_samples
from megaswift.data.forms import form_of
from megaswift.data.prepared import check_fits, named_prepared
from megaswift.data.read import read_first
from megaswift.data.report import BadRow, stop_at
from megaswift.data.sources import Source, parse_source
from megaswift.data.template import Template
from megaswift.data.tokenizer import load_tokenizer
from megaswift.errors import DataError, UserError
from megaswift.metadata.hub import Files
from megaswift.metadata.new_tokens import link_folder, with_new_tokens
from megaswift.metadata.read import get_model_meta

FIRST_ROWS = 32  # of each set: enough for every kind of row that people mix, and read in no time


def template_of(run: RunConfig) -> tuple[Template, tuple[int, ...]]:
    """Return the template of a run and the model's eos_token_ids, from the model's small files alone."""
    assert run.model.model is not None, "checked by the caller"
    meta = get_model_meta(
        run.model.model,
        revision=run.model.model_revision,
        use_hf=run.model.use_hf,
        trust_remote_code=run.model.trust_remote_code,
        files=Files.FACTS,
    )
    tokenizer = _tokenizer(run, meta.folder or Path(run.model.model))
    max_length = run.data.max_length or meta.max_length
    template = Template.from_config(run.data, tokenizer, max_length=max_length, stop_ids=meta.eos_token_ids)
    return template, tuple(meta.eos_token_ids)


def _tokenizer(run: RunConfig, folder: Path) -> Any:
    """Return the tokenizer of the model's folder, with the run's new tokens."""
    trust = run.model.trust_remote_code
    if not run.model.new_special_tokens:
        return load_tokenizer(folder, trust_remote_code=trust)
    with TemporaryDirectory(prefix="megaswift-") as home:
        view = Path(home) / "model"
        link_folder(folder, view, with_new_tokens(folder, run.model.new_special_tokens).texts)
        return load_tokenizer(view, trust_remote_code=trust)


def check_first_rows(run: RunConfig) -> dict[str, Any]:
    """Return how many rows were encoded, which were bad, and which sets are not on this machine's disk.

    Raises DataError as training would: for a set without a usable row, and with --strict for a bad one.
    """
    template, stop_ids = template_of(run)
    form = form_of(run)
    prepared = named_prepared(run.data)
    if prepared is not None:
        own = template_facts(template, form=form, stop_ids=stop_ids)
        check_fits(prepared, own, strict=run.data.strict)
        return {"encoded": 0, "bad": [], "elsewhere": []}
    encoded, bad, elsewhere = 0, [], []
    for name in dict.fromkeys((*run.data.dataset, *run.data.val_dataset)):
        source = parse_source(name, use_hf=run.model.use_hf)
        if not _is_here(source):
            elsewhere.append(name)
            continue
        samples, unread = read_first(source, run.data, count=FIRST_ROWS)
        if run.data.strict and unread:
            stop_at(unread[0])
        if not samples:
            raise DataError(f"dataset={name}: none of its first rows can be used. {_reasons(unread)}")
        _, report = encode_samples(
            samples, template, form=form, strict=run.data.strict, what=f"first rows of {name}"
        )
        encoded += report.kept
        bad += [str(row) for row in (*unread, *report.bad)]
    return {"encoded": encoded, "bad": bad, "elsewhere": elsewhere}


def _is_here(source: Source) -> bool:
    return source.is_self_cognition or Path(source.name).expanduser().exists()


def _reasons(bad: list[BadRow]) -> str:
    return f"The first reason: {bad[0]}." if bad else "It is empty."


def main() -> None:
    """Print the findings, or the error, of the run in the file that the command line names."""
    try:
        found = check_first_rows(parse_saved(Path(sys.argv[1])))
    except UserError as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
