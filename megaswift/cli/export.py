"""`megaswift export`: a training checkpoint or a model with an adapter becomes a Hugging Face or PEFT folder."""

import sys
import warnings

from megaswift.cli.help import sections_help
from megaswift.config.export import ExportConfig
from megaswift.config.parse import take_flags
from megaswift.errors import ConfigError
from megaswift.logs import get_logger, setup_logging

log = get_logger("export")

USAGE = """\
usage: megaswift export --checkpoint OUTPUT/checkpoint-N --output_dir FOLDER [--merge_lora true]
       megaswift export --model MODEL --adapters ADAPTER --merge_lora true --output_dir FOLDER
"""


def run(argv: list[str]) -> int:
    """Run the command and return its exit code; raises UserError."""
    setup_logging(rank=0)
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE + sections_help(ExportConfig()))
        return 0
    config, rest = take_flags(ExportConfig(), argv)
    if rest:
        raise ConfigError(f"{rest[0]} is not a flag of export. `megaswift export --help` lists them.")
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\b")  # about what is not installed
    from megaswift.training.export import export  # torch and Megatron-Core: seconds

    report = export(config)
    log.info(f"{report.folder}: {report.bytes_written / 1e9:.2f} GB in {report.seconds:.1f} s")
    return 0
