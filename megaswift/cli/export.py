"""`megaswift export`: a training checkpoint or a model with an adapter becomes a Hugging Face or PEFT folder."""

import sys
import warnings

from megaswift.cli import data
from megaswift.cli.help import sections_help
from megaswift.config.export import ExportConfig
from megaswift.config.parse import split_flags, take_flags
from megaswift.config.value import truth_of
from megaswift.errors import ConfigError
from megaswift.logs import get_logger, setup_logging

log = get_logger("export")

USAGE = """\
usage: megaswift export --checkpoint OUTPUT/checkpoint-N --output_dir FOLDER [--merge_lora true]
       megaswift export --model MODEL --adapters ADAPTER --merge_lora true --output_dir FOLDER
       megaswift export --to_cached_dataset true --model MODEL --dataset ROWS --output_dir FOLDER   (megaswift data --prepare FOLDER)
"""
# ms-swift's --template_mode -> the task whose rows are tokenised
MODES = {"train": (), "rlhf": ("--rlhf_type", "dpo"), "kto": ("--rlhf_type", "kto")}


def run(argv: list[str]) -> int:
    """Run the command and return its exit code; raises UserError."""
    setup_logging(rank=0)
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE + sections_help(ExportConfig()))
        return 0
    words = split_flags(argv)
    if truth_of("to_cached_dataset", words.pop("to_cached_dataset", "false")):
        return _tokenise(words)
    config, rest = take_flags(ExportConfig(), argv)
    if rest:
        raise ConfigError(f"{rest[0]} is not a flag of export. `megaswift export --help` lists them.")
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\b")  # about what is not installed
    from megaswift.training.export import export  # torch and Megatron-Core: seconds

    report = export(config)
    log.info(f"{report.folder}: {report.bytes_written / 1e9:.2f} GB in {report.seconds:.1f} s")
    return 0


def _tokenise(words: dict[str, list[str]]) -> int:
    """Do what ms-swift's export does with --to_cached_dataset: `megaswift data --prepare`."""
    home, mode = words.pop("output_dir", []), " ".join(words.pop("template_mode", ["train"]))
    if len(home) != 1:
        raise ConfigError("to_cached_dataset=true needs a folder. Give --output_dir.")
    if mode not in MODES:
        raise ConfigError(f"template_mode={mode} is not known. Choose from {', '.join(MODES)}.")
    rest = [word for name, given in words.items() for word in (f"--{name}", *given)]
    return data.run([*rest, *MODES[mode], "--prepare", *home])
