"""Find a model's files: a folder, a hub cache on this machine, or a download where there is a network."""

import os
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from megaswift.errors import ModelError
from megaswift.logs import get_logger
from megaswift.metadata.files import read_json_if_there

logger = get_logger(__name__)

FACT_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*")
CODE_PATTERNS = ("*.py",)
# A snapshot without any of them is one that a program without need for text has begun: the rest is fetched.
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Files(Enum):
    """Which of a model's files are wanted."""

    FACTS = FACT_PATTERNS  # config, tokenizer: megabytes
    ALL = (*FACT_PATTERNS, *CODE_PATTERNS, "*.safetensors")  # and the weights


def locate(
    model: str | Path,
    *,
    revision: str | None = None,
    use_hf: bool = True,
    files: Files = Files.FACTS,
    token: str | None = None,
) -> Path:
    """Return the folder that holds `model`'s files: itself, a snapshot in a hub cache, or what was downloaded.

    The Hugging Face cache is searched before ModelScope's, the other way round when `use_hf` is false; the first
    of the two is also where a download comes from. Where several ranks share a cache, one rank calls this first.
    Raises ModelError that says where was looked and how to bring the files.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    name = str(model)
    if not _ID.fullmatch(name):
        raise ModelError(
            f"model={name} is neither a folder nor a hub id. Give a folder or an id like owner/name."
        )
    caches = [_hugging_face(name, revision), _modelscope(name, revision)]
    places = [place for cache in (caches if use_hf else reversed(caches)) for place in cache]
    found = [place for place in places if _has(place, files)]
    for place in found:
        if any((place / one).is_file() for one in TOKENIZERS):
            return place
    try:
        if use_hf:
            return _download_from_hugging_face(name, revision, files, token)
        return _download_from_modelscope(name, revision, files)
    except (OSError, ImportError) as error:
        if found:  # it may have no tokenizer of its own
            return found[0]
        raise _not_found(name, places, use_hf, error) from error


def _not_found(name: str, places: list[Path], use_hf: bool, error: Exception) -> ModelError:
    """Return the error that says what is missing, where was looked and how to bring it."""
    started = [place for place in places if (place / "config.json").is_file()]
    missing = f"weights (*.safetensors) in {started[0]}" if started else "config.json"
    looked = ", ".join(str(place) for place in places)
    fetch = f"hf download {name}" if use_hf else f"modelscope download --model {name}"
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return ModelError(
        f"model={name} has no {missing} on this machine, and it could not be downloaded ({reason}). "
        f"Looked in: {looked}. Run `{fetch}` where there is a network (a login node) or give a folder."
    )


def _has(place: Path, files: Files) -> bool:
    """Say whether a folder holds a model's config, and with Files.ALL every weight file that its index names."""
    if not (place / "config.json").is_file():
        return False
    if files is Files.FACTS:
        return True
    index = read_json_if_there(place / "model.safetensors.index.json")
    if index:
        return all((place / shard).is_file() for shard in set(index.get("weight_map", {}).values()))
    return any(place.glob("*.safetensors"))


def _hugging_face(name: str, revision: str | None) -> list[Path]:
    """Return the snapshot of a repository in the Hugging Face cache; `revision` is a branch, tag or commit."""
    from huggingface_hub import constants  # reads HF_HOME and HF_HUB_CACHE; imported here to keep --help fast

    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    revision = revision or "main"
    reference = repository / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    return [repository / "snapshots" / commit]


def _modelscope(name: str, revision: str | None) -> list[Path]:
    """Return the folders where ModelScope's releases keep a model; its cache holds one revision, the newest."""
    if revision not in (None, "master"):
        return []
    return list(_modelscope_folders(name))


def _modelscope_folders(name: str) -> Iterator[Path]:
    """Yield a model's folder in each layout of ModelScope's cache; dots in names were once written as `___`."""
    # MODELSCOPE_CACHE is read here and not in launch/environment.py: only this function knows the variable's layouts.
    root = Path(os.environ.get("MODELSCOPE_CACHE", "~/.cache/modelscope/hub")).expanduser()
    owner, _, short = name.rpartition("/")
    for spelling in dict.fromkeys((short, short.replace(".", "___"))):
        for parent in (root / "models", root / "hub" / "models", root):
            yield parent / owner / spelling


def _download_from_hugging_face(name: str, revision: str | None, files: Files, token: str | None) -> Path:
    """Fetch the wanted files into the Hugging Face cache; raises OSError where there is no way to them."""
    from huggingface_hub import snapshot_download  # 0.2 s, and only needed when something is missing

    logger.info("fetching %s from Hugging Face", name)
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(files.value), token=token))
    return _checked(folder, files)


def _download_from_modelscope(name: str, revision: str | None, files: Files) -> Path:
    """Fetch the wanted files into ModelScope's cache; raises ImportError where its package is not installed."""
    from modelscope import snapshot_download  # optional package

    logger.info("fetching %s from ModelScope", name)
    folder = Path(snapshot_download(name, revision=revision, allow_file_pattern=list(files.value)))
    return _checked(folder, files)


def _checked(folder: Path, files: Files) -> Path:
    """Return `folder` if it holds what was asked for; offline, the hub's client hands back what is there."""
    if not _has(folder, files):
        raise FileNotFoundError(f"{folder} is not complete, or the repository has no such files")
    return folder
