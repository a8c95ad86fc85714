"""`megaswift data`: look at data sets before training on them."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megaswift.config.data_rules import every_set_has_its_share
from megaswift.config.field import setting
from megaswift.config.parse import TASK_DEFAULTS, parse, split_flags, take_flags
from megaswift.config.run import RunConfig
from megaswift.errors import ConfigError
from megaswift.logs import get_logger, setup_logging

if TYPE_CHECKING:  # the help waits for neither numpy nor the tokenizer
    from megaswift.data.prepared import Prepared

log = get_logger("cli")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of this command alone."""

    prepare: str | None = setting(None, "folder below which the tokenised sets are left")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The sections of this command's own flags."""

    prepare: PrepareConfig = field(default_factory=PrepareConfig)


HELP = """\
usage: megaswift data [sft|pt|rlhf] [file.yaml] --dataset ROWS... [--model MODEL] [--prepare DIR] [--flag value ...]

Shows which layouts were recognised and every bad row with file, line and reason; with --model also three rendered
samples with the trained tokens coloured, the lengths and how well they pack. All flags of the task (sft unless named) are
understood; those about data, templates and packing matter here. With --rlhf_type rows are read as preference pairs, as
judged answers (kto), or as prompts (grpo); with --task_type seq_cls as labelled texts, with rerankers as documents.

--prepare DIR tokenises the sets and, with --packing, packs them, into a folder below DIR whose name depends on the rows,
the tokenizer and the settings. Any number of such commands may run at once, such as the tasks of a Slurm array: each takes
pieces that no other has, the last one joins them, and a command that is started again does what is left. Train with
`--dataset DIR/NAME` (or DIR, if it holds one), or with the same --dataset and `--prepared_dir DIR`.
"""


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP)
        return 0
    request, rest = take_flags(Request(), argv)
    if rest and rest[0] in TASK_DEFAULTS:
        task, *rest = rest
    else:
        task = "rlhf" if "rlhf_type" in split_flags(rest) else "sft"
    parsed = parse(task, rest)
    setup_logging(verbose=parsed.config.logging.verbose)
    for note in parsed.notes:
        log.info(note)
    every_set_has_its_share(parsed.config)
    if request.prepare.prepare is not None:
        _prepare(parsed.config, Path(request.prepare.prepare).expanduser())
    else:
        _show(parsed.config)
    return 0


def _prepare(run: RunConfig, home: Path) -> None:
    from megaswift.data.first_rows import template_of
    from megaswift.data.forms import form_of
    from megaswift.data.prepare import make_plan, prepare
    from megaswift.data.prepared import read_prepared

    if run.model.model is None:
        raise ConfigError("prepare needs the tokenizer of a model. Give --model with a hub id or a folder.")
    template, stop_ids = template_of(run)
    form = form_of(run)
    assert template.max_length is not None, "a model has a context"
    packing_length = run.data.packing_length or form.per_row * template.max_length
    plan = make_plan(
        run.data,
        template,
        form=form,
        seed=run.training.seed,
        use_hf=run.model.use_hf,
        packing_length=packing_length if run.data.packing else None,
        stop_ids=stop_ids,
    )
    folder = prepare(plan, home)
    if folder is None:
        sys.stdout.write(f"{home / plan.address} is not complete yet: other processes are at work on it.\n")
        return
    _tell(read_prepared(folder))


def _tell(prepared: "Prepared") -> None:
    found = prepared.manifest
    for name in prepared.sets:
        figures = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in found[name].items())
        sys.stdout.write(f"{name}: {figures}\n")
    sys.stdout.write(
        f"{found['bad_rows']} bad rows of {found['rows_read']} (bad_rows.jsonl)\n{prepared.folder}\n"
    )


def _show(run: RunConfig) -> None:
    # The tokenizer, numpy and rich take seconds; the help must not.
    from rich.console import Console

    from megaswift.data.first_rows import template_of
    from megaswift.data.forms import form_of
    from megaswift.data.prepared import named_prepared
    from megaswift.data.preview import make_preview, render
    from megaswift.data.read import read_datasets

    prepared = named_prepared(run.data)
    if prepared is not None:
        _tell(prepared)
        return
    read = read_datasets(run.data, seed=run.training.seed, use_hf=run.model.use_hf)
    preview = make_preview(
        read,
        template_of(run)[0] if run.model.model is not None else None,
        form=form_of(run),
        packing_length=run.data.packing_length,
        processes=run.data.dataset_num_proc,
    )
    Console().print(render(preview))
