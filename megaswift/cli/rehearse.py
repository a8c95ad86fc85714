"""`megaswift rehearse`: a run's exact layout on this machine's processors, with a shrunken model and the first rows."""

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from math import lcm
from pathlib import Path

from megaswift.cli.help import sections_help
from megaswift.cli.plan import find_hardware
from megaswift.config.dump import dump_run
from megaswift.config.parse import TASK_DEFAULTS, parse, take_flags
from megaswift.config.plan import PlanConfig
from megaswift.config.rules import resolve
from megaswift.errors import ConfigError, LaunchError, ModelError, nearest
from megaswift.launch.environment import NodeEnv
from megaswift.launch.host import read_host
from megaswift.launch.layout import choose_layout
from megaswift.launch.local import start_ranks, this_program
from megaswift.launch.rehearsal import RANK_GIB, STEPS, rehearsal_of, shrink
from megaswift.logs import get_logger, setup_logging
from megaswift.metadata.files import read_json
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta

log = get_logger("rehearse")

HELP = """\
usage: megaswift rehearse TASK [the flags of `megaswift TASK`] [--gpu H100-80G --num_gpus 64]

Trains two steps with the layout of the run on processors: the same process groups, pipeline, data, checkpoint and export,
with a model of the same family that is narrow and has few layers. Without parallel flags the layout is the one that the
planner chooses for the GPUs of the flags below. Nothing is kept.
"""
HEAVY = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


def run(argv: list[str]) -> int:
    """Run the command and return its exit code; raises UserError."""
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP + sections_help(PlanConfig()))
        return 0
    setup_logging(rank=0)
    task = argv[0]
    if task not in TASK_DEFAULTS:
        raise ConfigError(f"{task} is not a task.{nearest(task, TASK_DEFAULTS)}")
    hardware, rest = take_flags(PlanConfig(), argv[1:])
    parsed = parse(task, rest)
    asked = parsed.config
    if asked.model.model is None:
        raise ConfigError("model is missing. Give --model with a hub id or a folder.")
    meta = get_model_meta(asked.model.model, revision=asked.model.model_revision, use_hf=asked.model.use_hf)
    chosen = choose_layout(asked, meta, find_hardware(hardware.hardware).machine)
    if chosen is not None:
        log.info(chosen.note)
        asked = chosen.adopt(asked, parsed.given)
    parallel = asked.parallel
    copy = parallel.pp * lcm(parallel.tp * parallel.cp, parallel.ep * (parallel.etp or 1))
    ranks = 2 * copy if _has_room(2 * copy) else copy  # two replicas, so that gradients are reduced
    if not _has_room(ranks):
        raise LaunchError(
            f"the layout needs {ranks} ranks of about {RANK_GIB:.0f} GiB, and this machine has "
            f"{read_host().memory_gib:.0f} GiB. Rehearse it on a larger machine, or with smaller axes."
        )
    with tempfile.TemporaryDirectory(prefix="megaswift-rehearsal-") as name:
        folder = Path(name)
        smaller = replace(asked, model=replace(asked.model, torch_dtype="float32"))
        small = replace(smaller.training, global_batch_size=None, gradient_accumulation_steps=parallel.pp * 2)
        layout = resolve(replace(smaller, training=small), meta, ranks, "cpu").layout
        config = shrink(read_json(Path(str(meta.folder)) / "config.json"), layout)
        make_model(config, meta, folder / "model")
        rehearsed = rehearsal_of(asked, layout, model=str(folder / "model"), output_dir=str(folder / "out"))
        (folder / "run.yaml").write_text(dump_run(rehearsed), encoding="utf-8")
        log.info(
            f"rehearsing {STEPS} steps of {meta.model_type} with {ranks} ranks on this machine's processors"
        )
        words = [*this_program(), task, "--config", str(folder / "run.yaml")]
        code = start_ranks(words, nproc=ranks, node=NodeEnv())
    if code == 0:
        log.info(f"rehearsed: {ranks} ranks trained, saved and exported with this layout")
    return code


def make_model(config: dict[str, object], meta: ModelMeta, folder: Path) -> None:
    """Write a model of that config with random weights, and the tokenizer files of `meta`'s folder; raises ModelError."""
    folder.mkdir()
    for path in Path(str(meta.folder)).iterdir():
        if path.is_file() and not path.name.endswith(HEAVY):
            shutil.copy(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    from transformers import AutoConfig, AutoModelForCausalLM  # torch and transformers: seconds
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"transformers cannot build a small {meta.model_type}: {error}.") from error
    model.save_pretrained(folder)


def _has_room(ranks: int) -> bool:
    return ranks * RANK_GIB <= read_host().memory_gib
