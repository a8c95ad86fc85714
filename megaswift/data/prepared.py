"""Sets that `megaswift data --prepare` left: recognised, held against the run, and opened."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaswift.config.data import DataConfig
from megaswift.data.address import SETTINGS, Facts
from megaswift.data.rows import READERS, suffix_of
from megaswift.data.sources import MANIFEST, is_prepared
from megaswift.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A complete prepared folder."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def sets(self) -> dict[str, Path]:
        """Folders of EncodedSets by name: train, and val where there is one."""
        return {name: self.folder / name for name in ("train", "val") if name in self.manifest}


def named_prepared(config: DataConfig) -> Prepared | None:
    """Return the prepared sets that --dataset names; None where it names rows. Raises DataError."""
    folders = [Path(name).expanduser() for name in (*config.dataset, *config.val_dataset)]
    found = [folder for name in folders if (folder := prepared_folder(name)) is not None]
    if not found:
        return None
    if len(folders) > 1:
        raise DataError(
            f"dataset={found[0]} is prepared and stands for all sets of a run. Give it alone, or prepare the others with it."
        )
    prepared = read_prepared(found[0])
    defaults, made = DataConfig(), prepared.manifest["facts"]
    for name in SETTINGS:
        own = getattr(config, name)
        if own not in (getattr(defaults, name), made[name]):
            raise DataError(
                f"{name}={own} chooses rows, and those of dataset={found[0]} were chosen with {name}={made[name]}. Leave it out, or "
                "prepare the rows again with it."
            )
    return prepared


def prepared_folder(folder: Path) -> Path | None:
    """Return the folder of prepared sets that a name stands for: itself, or the only one below a folder of --prepare.

    Raises DataError where there are several, or rows beside it.
    """
    if is_prepared(folder):
        return folder
    below = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if below and any(suffix_of(path) in READERS for path in folder.iterdir() if path.is_file()):
        raise DataError(
            f"dataset={folder} holds rows, and the prepared set {below[0].name}. Name {below[0]}, or give the files of the rows."
        )
    if len(below) > 1:
        raise DataError(
            f"dataset={folder} holds several prepared sets: {', '.join(path.name for path in below)}. Name one of them."
        )
    return below[0] if below else None


def read_prepared(folder: Path) -> Prepared:
    """Return what a prepared folder says of itself; raises DataError."""
    try:
        return Prepared(folder=folder, manifest=json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error}. Prepare the rows again.") from error


def check_fits(prepared: Prepared, own: Facts, *, strict: bool) -> None:
    """Raise DataError where the rows were tokenised otherwise than the run would; `own` are its template_facts.

    With --strict also where some of them were bad.
    """
    if strict:
        check_strict(prepared)
    made = prepared.manifest["facts"]
    for name, value in own.items():
        if json.loads(json.dumps(value)) != made.get(name):
            shown = (
                ""
                if name in ("tokenizer", "encoding")
                else f": {made.get(name)!r} there, {value!r} in this run"
            )
            raise DataError(
                f"dataset={prepared.folder} was prepared with another {name}{shown}. Prepare the rows again with this run's "
                "model and settings."
            )


def check_strict(prepared: Prepared) -> None:
    """Raise DataError where some of the rows were bad, which --strict does not allow."""
    bad = prepared.manifest["bad_rows"]
    if bad:
        raise DataError(
            f"dataset={prepared.folder} was prepared from rows of which {bad} are bad (bad_rows.jsonl there), and --strict true does "
            "not allow any. Mend the rows and prepare them again, or leave --strict out."
        )
