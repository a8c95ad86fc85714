"""Where a --dataset argument points: `[HF::|MS::]path_or_id[:subset][#rows]`."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaswift.data.rows import READERS, Row, files_of, numbered_dataset, read_path
from megaswift.errors import DataError
from megaswift.logs import get_logger

logger = get_logger(__name__)

SELF_COGNITION = Path(__file__).with_name("self_cognition.jsonl")
SELF_COGNITION_NAMES = ("swift/self-cognition", "self-cognition")
MANIFEST = "prepared.json"  # in a folder of data/prepare.py
HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[\w.-]+")  # huggingface_hub takes no -- and no ..
SHARD = re.compile(r"(?P<before>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<after>\.[^/]*)")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One --dataset argument, taken apart."""

    name: str  # path or hub id
    subset: str | None = None
    rows: int | None = None  # how many to sample; more than there are repeats the set
    use_hf: bool = True

    @property
    def tag(self) -> str:
        """What config/teachers.py calls the set."""
        return self.name if self.subset is None else f"{self.name}:{self.subset}"

    @property
    def is_self_cognition(self) -> bool:
        return self.name in SELF_COGNITION_NAMES


def parse_source(argument: str, *, use_hf: bool = True) -> Source:
    """Take one --dataset argument apart; a path that exists as it stands is never cut. Raises DataError."""
    if argument.startswith(("HF::", "MS::")):
        use_hf, argument = argument.startswith("HF::"), argument[4:]
    if Path(argument).expanduser().exists():
        return Source(name=argument, use_hf=use_hf)
    name, mark, number = argument.rpartition("#")
    rows = None
    if mark:
        if not number.isdecimal() or not int(number):
            raise DataError(
                f"dataset={argument} asks for {number!r} rows. After # comes a number of rows, as in data.jsonl#500."
            )
        rows = int(number)
    else:
        name = argument
    subset = None
    if not Path(name).expanduser().exists() and ":" in name:
        name, _, subset = name.partition(":")
    return Source(name=name, subset=subset, rows=rows, use_hf=use_hf)


@dataclass(frozen=True, kw_only=True)
class FileSet:
    """The files of one --dataset argument, in the order in which they are read."""

    source: Source
    files: tuple[Path, ...]  # of data/rows.py's files_of
    folder: Path  # where relative media paths begin


def is_prepared(folder: Path) -> bool:
    """Return whether a folder holds tokenised sets instead of rows."""
    return (folder / MANIFEST).is_file()


def open_source(source: Source) -> tuple[Iterator[Row], Path]:
    """Return the raw rows of a source and the folder that relative media paths begin at. Raises DataError."""
    found = _find(source)
    if found is None:
        return _prepared_rows(source), Path()
    path, folder = found
    return read_path(path), folder


def find_files(source: Source) -> FileSet:
    """Return the files behind a source; raises DataError where there are none."""
    found = _find(source)
    if found is None:
        raise DataError(
            f"dataset={source.name} is in no hub cache of this machine as files. Fetch it with `hf download --repo-type dataset "
            f"{source.name}`, or give the path of a local file or folder."
        )
    path, folder = found
    return FileSet(source=source, files=tuple(files_of(path)), folder=folder)


def _find(source: Source) -> tuple[Path, Path] | None:
    """Return the file or folder of a source and where relative media paths begin; None where no hub cache has it."""
    if source.is_self_cognition:
        return SELF_COGNITION, SELF_COGNITION.parent
    path = Path(source.name).expanduser()
    if is_prepared(path):
        raise DataError(
            f"dataset={source.name} is prepared: its rows are chosen and tokenised. Give it alone, without # or other sets."
        )
    if path.exists():
        return path, path if path.is_dir() else path.parent
    if not HUB_ID.fullmatch(source.name) or path.suffix.lower() in READERS:
        raise DataError(
            f"dataset={source.name} is not there. Give a file ({', '.join(READERS)}), a folder, or a hub id like owner/name."
        )
    folder = _in_a_cache(source)
    if folder is None or _missing_shards(_subset_of(folder, source)):
        folder = _downloaded(source) or folder
    if folder is None:
        return None
    path = _subset_of(folder, source)
    missing = _missing_shards(path)
    if missing:
        raise DataError(
            f"dataset={source.name} is not whole in {folder}: {missing} files that the names of the others count are not there. "
            f"Run `hf download --repo-type dataset {source.name}` (or `modelscope download --dataset {source.name}`), or give "
            "the path of the files to train on."
        )
    return path, folder


def _missing_shards(path: Path) -> int:
    """Return how many of the files "...-00002-of-00004..." that the train files of a snapshot count are missing."""
    found: dict[tuple[str, ...], set[str]] = {}
    for file in files_of(path):
        shard = SHARD.fullmatch(file.as_posix())
        if shard:
            found.setdefault(shard.group("before", "total", "after"), set()).add(shard["number"])
    return sum(max(0, int(total) - len(numbers)) for (_, total, _), numbers in found.items())


def _in_a_cache(source: Source) -> Path | None:
    """Return the folder of a data set in the Hugging Face cache or in ModelScope's; the wanted hub's goes first."""
    caches = (_hugging_face_folder, _modelscope_folder)
    for look in caches if source.use_hf else reversed(caches):
        folder = look(source.name)
        if folder is not None:
            return folder
    return None


def _hugging_face_folder(name: str) -> Path | None:
    from huggingface_hub import snapshot_download  # 0.5 s; only runs that name an id pay it
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _modelscope_folder(name: str) -> Path | None:
    # MODELSCOPE_CACHE is read here and not in launch/environment.py: only this function knows the cache's layouts.
    cache = Path(os.environ.get("MODELSCOPE_CACHE", "~/.cache/modelscope")).expanduser()
    candidates = (cache / "datasets" / name, cache / "hub" / "datasets" / name)
    return next((folder for folder in candidates if folder.is_dir()), None)


def _downloaded(source: Source) -> Path | None:
    """Fetch a data set from the wanted hub; None, with the reason in the log, where there is no way to it."""
    try:
        if source.use_hf:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(source.name, repo_type="dataset"))
        from modelscope import dataset_snapshot_download  # optional package

        return Path(dataset_snapshot_download(source.name))
    except (OSError, ImportError) as error:  # the hubs' errors of connection, access and absence are OSErrors
        logger.warning("%s could not be fetched: %s", source.name, (str(error).splitlines() or [""])[0])
        return None


def _subset_of(folder: Path, source: Source) -> Path:
    if source.subset is None:
        return folder
    if (folder / source.subset).is_dir():
        return folder / source.subset
    raise DataError(
        f"dataset={source.name} has no folder for subset={source.subset}. Leave the subset out, or name a file."
    )


def _prepared_rows(source: Source) -> Iterator[Row]:
    """Yield rows that `datasets` prepared on this machine earlier; raises DataError with the way out."""
    import datasets  # 1 s; only ids that are in no hub cache pay it

    prepared = Path(datasets.config.HF_DATASETS_CACHE) / source.name.replace("/", "___")
    reason = "nothing is there under its name"
    if prepared.is_dir():
        try:
            return numbered_dataset(datasets.load_dataset(source.name, source.subset), source.name)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error)
    raise DataError(
        f"dataset={source.name} is in no hub cache of this machine and could not be fetched ({reason}). "
        f"On a machine with a network run `hf download --repo-type dataset {source.name}` (or `modelscope download "
        f"--dataset {source.name}`) and copy the cache here, or give the path of a local file or folder."
    )
