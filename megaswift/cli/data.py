"""`megaswift data`: look at data sets before training on them."""

import sys
from pathlib import Path

from megaswift.config.parse import parse, split_flags
from megaswift.config.run import RunConfig
from megaswift.logs import get_logger, setup_logging

log = get_logger("cli")

HELP = """\
usage: megaswift data [file.yaml] --dataset ROWS... [--model MODEL] [--flag value ...]

Shows which layouts were recognised and every bad row with file, line and reason; with --model also three rendered
samples with the trained tokens coloured, the lengths and how well they pack. All flags of `megaswift sft` are
understood; those about data, templates and packing matter here. With --rlhf_type rows are read as preference pairs, as
judged answers (kto), or as prompts (grpo).
"""


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP)
        return 0
    parsed = parse("rlhf" if "rlhf_type" in split_flags(argv) else "sft", argv)
    setup_logging(verbose=parsed.config.logging.verbose)
    for note in parsed.notes:
        log.info(note)
    _show(parsed.config)
    return 0


def _show(run: RunConfig) -> None:
    # The tokenizer, numpy and rich take seconds; the help must not.
    from rich.console import Console

    from megaswift.data.forms import form_for
    from megaswift.data.preview import make_preview, render
    from megaswift.data.read import read_datasets
    from megaswift.data.template import Template
    from megaswift.data.tokenizer import load_tokenizer

    read = read_datasets(run.data, seed=run.training.seed, use_hf=run.model.use_hf)
    template = None
    if run.model.model is not None:
        from megaswift.metadata.read import get_model_meta

        meta = get_model_meta(
            run.model.model,
            revision=run.model.model_revision,
            use_hf=run.model.use_hf,
            trust_remote_code=run.model.trust_remote_code,
        )
        folder = meta.folder or Path(run.model.model)
        tokenizer = load_tokenizer(folder, trust_remote_code=run.model.trust_remote_code)
        max_length = run.data.max_length or meta.max_length
        template = Template.from_config(
            run.data, tokenizer, max_length=max_length, stop_ids=meta.eos_token_ids
        )
    preview = make_preview(
        read,
        template,
        form=form_for(run.preference.rlhf_type if run.task == "rlhf" else None),
        packing_length=run.data.packing_length,
        processes=run.data.dataset_num_proc,
    )
    Console().print(render(preview))
