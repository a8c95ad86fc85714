"""Command line and YAML file to a RunConfig: every flag is understood, refused by name, or unknown; never ignored."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from megaswift.config.aliases import ALWAYS_SO, TRANSLATIONS, join_cached_sets, join_resume_point, translate
from megaswift.config.field import Setting, declared
from megaswift.config.refused import REFUSED, check_refused
from megaswift.config.run import RunConfig
from megaswift.config.tokens import tokens_of
from megaswift.config.value import Raw, text_of, value_of
from megaswift.errors import ConfigError, nearest
from megaswift.logs import get_logger
from megaswift.metadata.beside import MODEL_FILES, model_beside

log = get_logger("config")

Sections = TypeVar("Sections")  # a dataclass whose fields are dataclasses of settings

# What a task means by an unset flag, where that differs from the field's default.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {},
    "pt": {"loss_scale": "all", "use_chat_template": False},
    "rlhf": {"loss_scale": "last_round"},
}

# Two ways to say one thing: what the command line says in one way replaces what the file says in the other.
RIVALS = (
    ("global_batch_size", "gradient_accumulation_steps"),
    ("train_iters", "num_train_epochs"),
    ("lr_warmup_iters", "lr_warmup_fraction"),
)

# Who gives one of these has chosen a layout.
LAYOUT_FLAGS = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "sequence_parallel",
    "cp_comm_type",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
}


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """A run as it was asked for, and lines for the user about flags that mean something else here."""

    config: RunConfig
    notes: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()  # flags that somebody wrote, by their first names


@dataclass(frozen=True, kw_only=True)
class Given:
    """A value from one source: what it is now, and the name that the user wrote."""

    value: Any
    name: str


def parse_run(task: str, argv: list[str]) -> RunConfig:
    """Return the run that `argv` (without the command itself) asks for, logging the notes; raises ConfigError."""
    parsed = parse(task, argv)
    for note in parsed.notes:
        log.info(note)
    return parsed.config


def parse(task: str, argv: list[str]) -> Parsed:
    """Return the run that `argv` asks for: task defaults, then --config file.yaml, then flags; raises ConfigError."""
    words = split_flags(argv)
    file = words.pop("config", None)
    notes: list[str] = []
    from_file = understand(read_yaml(text_of("config", file), task=task), notes) if file is not None else {}
    from_flags = understand(words, notes)
    for pair in RIVALS:
        if any(flag in from_flags for flag in pair):
            from_file = {flag: given for flag, given in from_file.items() if flag not in pair}
    given = {**from_file, **from_flags}
    return Parsed(config=_build(task, given), notes=tuple(notes), given=frozenset(given))


def parse_saved(path: Path) -> RunConfig:
    """Return the run whose settings dump_run (config/dump.py) wrote to `path`."""
    task = yaml.safe_load(path.read_text(encoding="utf-8"))["task"]
    return parse(task, ["--config", str(path)]).config


def make_run(task: str, /, **settings: Any) -> RunConfig:
    """Return a RunConfig from flag names and Python values: make_run("sft", model="...", dataset=["rows.jsonl"])."""
    return _build(task, understand(dict(settings), []))


def split_flags(argv: list[str]) -> dict[str, list[str]]:
    """Return flag -> words; `--a-b=x y` and `--a_b x y` are the same. A first word ending in .yaml is --config.

    Raises ConfigError for a word that belongs to no flag and for a flag that is given twice with different words.
    """
    found: dict[str, list[str]] = {}
    again: list[tuple[str, list[str]]] = []
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = ["--config", *argv]
    current: list[str] | None = None
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            current = [value] if equals else []
            if name in found:
                again.append((name, current))
            else:
                found[name] = current
        elif current is None:
            raise ConfigError(
                f"{word} belongs to no flag. Flags begin with --, and only a .yaml file may stand first."
            )
        else:
            current.append(word)
    for name, words in again:
        if words != found[name]:
            raise ConfigError(
                f"{name} is given twice. Give it once; a list takes several words after one flag."
            )
    return found


def read_yaml(path: str, *, task: str) -> dict[str, Any]:
    """Return the settings of a YAML file of `flag: value` lines; raises ConfigError."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={path} cannot be read: {error}.") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config={path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config={path} is not a list of `flag: value` lines.")
    settings = {str(name).replace("-", "_"): value for name, value in content.items()}
    written_for = settings.pop("task", task)
    if written_for != task:
        raise ConfigError(f"config={path} is for `megaswift {written_for}`, not `megaswift {task}`.")
    return settings


def understand(words: dict[str, Raw], notes: list[str]) -> dict[str, Given]:
    """Return flag -> Given for what one source says; appends to `notes`; raises ConfigError."""
    settings = declared(RunConfig)
    names = {alias: one for one in settings.values() for alias in (one.flag, *one.aliases)}
    found: dict[str, Given] = {}
    for name, raw in join_cached_sets(join_resume_point(words)).items():
        if name in names:
            _put(found, names[name], raw, name, same_is_fine=False)
            continue
        old = translate(name, raw)
        if old is not None:
            for flag, value in old.settings.items():
                _put(found, settings[flag], value, name, same_is_fine=True)
            notes.extend([old.note] if old.note else [])
        elif not check_refused(name, raw):
            raise ConfigError(
                f"{name} is not a flag.{nearest(name, [*names, *TRANSLATIONS, *ALWAYS_SO, *REFUSED])}"
            )
    return found


def _put(found: dict[str, Given], setting: Setting, raw: Raw, name: str, *, same_is_fine: bool) -> None:
    """Add one value; the same setting under two names is an error, unless a translated name says the same."""
    value = value_of(setting, raw, name=name)
    before = found.get(setting.flag)
    if before is not None and not ((same_is_fine or before.name in TRANSLATIONS) and before.value == value):
        raise ConfigError(
            f"{before.name} and {name} are the same setting ({setting.flag}). Give one of them."
        )
    found[setting.flag] = Given(value=value, name=name)


def _build(task: str, given: dict[str, Given]) -> RunConfig:
    if task not in TASK_DEFAULTS:
        raise ConfigError(f"task={task} is not built.{nearest(task, TASK_DEFAULTS)}")
    values = {**TASK_DEFAULTS[task], **{flag: one.value for flag, one in given.items()}}
    if LAYOUT_FLAGS & given.keys():
        values["auto_layout"] = False
    return _with_tokens(_with_model(fill(RunConfig(task=task), values)))


def _with_model(config: RunConfig) -> RunConfig:
    """Return `config` with the model whose config.json lies beside --mcore_model, where no other is named; raises ConfigError."""
    checkpoint = config.model.mcore_model
    if checkpoint is None or config.model.model is not None:
        return config
    beside = model_beside(Path(checkpoint))
    if beside is None:
        raise ConfigError(
            f"mcore_model={checkpoint} has no config.json beside it, in {MODEL_FILES}/ or directly. Give --model with the Hugging Face "
            "model that the checkpoint is of."
        )
    return replace(config, model=replace(config.model, model=str(beside)))


def _with_tokens(config: RunConfig) -> RunConfig:
    """Return `config` with the tokens that stand in the files of --new_special_tokens; raises ConfigError."""
    given = config.model.new_special_tokens
    return (
        replace(config, model=replace(config.model, new_special_tokens=tokens_of(given))) if given else config
    )


def with_flags(config: RunConfig, words: dict[str, Raw]) -> RunConfig:
    """Return `config` with some flags set to other values; raises ConfigError."""
    return fill(config, {flag: one.value for flag, one in understand(words, []).items()})


def fill(config: Sections, values: dict[str, Any]) -> Sections:
    """Return `config`, a dataclass of sections, with the settings of these flags replaced."""
    settings = declared(type(config))
    sections: dict[str, dict[str, Any]] = {}
    for flag, value in values.items():
        sections.setdefault(settings[flag].section, {})[settings[flag].name] = value
    parts = {name: replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return cast(Sections, replace(cast(Any, config), **parts))


def take_flags(config: Sections, argv: list[str]) -> tuple[Sections, list[str]]:
    """Return `config` filled from the flags of `argv` that are its own, and the words that are not; raises ConfigError."""
    settings = declared(type(config))
    names = {alias: one for one in settings.values() for alias in (one.flag, *one.aliases)}
    own: list[str] = []
    rest: list[str] = []
    current = rest
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            current = own if word[2:].partition("=")[0].replace("-", "_") in names else rest
        current.append(word)
    values: dict[str, Given] = {}
    for name, raw in split_flags(own).items():
        _put(values, names[name], raw, name, same_is_fine=False)
    return fill(config, {flag: one.value for flag, one in values.items()}), rest
