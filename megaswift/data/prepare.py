"""Tokenising and packing ahead of training: `megaswift data --prepare DIR`.

DIR/
    <address>/          complete: prepared.json, train/, val/, bad_rows.jsonl; it appears by one rename
    <address>.parts/    while it is made: one file for each piece of the sets, and locks

Any number of processes, tasks of a Slurm array or nodes may work at once, started together or not: each takes the pieces
that nobody has taken, and the one that finds all of them there joins them. A lock ends with the process that holds it, so
that whoever starts later does what was left undone.
"""

import fcntl
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from zlib import crc32

from megaswift.config.data import DataConfig
from megaswift.data.address import Facts, address_of, set_facts, template_facts
from megaswift.data.cursor import Piece, cut, read_piece
from megaswift.data.encode import encode_or_report
from megaswift.data.forms import Form
from megaswift.data.join import is_part, join, write_part
from megaswift.data.pool import forked_map
from megaswift.data.prepared import check_strict, read_prepared
from megaswift.data.read import take_rows
from megaswift.data.sources import MANIFEST, FileSet, find_files, is_prepared, parse_source
from megaswift.data.template import Template
from megaswift.errors import DataError
from megaswift.logs import get_logger

logger = get_logger(__name__)

PIECE_ROWS = 8192  # some seconds of work, and tens of MB


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be tokenised, how, and under which address."""

    config: DataConfig
    template: Template
    form: Form
    seed: int
    packing_length: int | None  # None: not packed
    train: tuple[FileSet, ...]
    val: tuple[FileSet, ...]
    facts: Facts

    @property
    def sets(self) -> tuple[FileSet, ...]:
        """Training sets, then validation sets."""
        return (*self.train, *self.val)

    @property
    def address(self) -> str:
        """The name of the folder for it."""
        return address_of(self.facts)


def make_plan(
    config: DataConfig,
    template: Template,
    *,
    form: Form,
    seed: int,
    use_hf: bool,
    packing_length: int | None,
    stop_ids: Sequence[int],
) -> Plan:
    """Find the files of a run's sets and read them once for their address. Raises DataError."""
    if form.asks:
        raise DataError(
            "Prompts are not prepared: they are tokenised in no time. Train on the rows themselves."
        )
    seed = config.data_seed if config.data_seed is not None else seed
    train, val = (
        tuple(find_files(parse_source(name, use_hf=use_hf)) for name in names)
        for names in (config.dataset, config.val_dataset)
    )
    if not train:
        raise DataError("dataset=[] names no rows to prepare. Give --dataset with files, folders or hub ids.")
    facts = {
        "packing_length": packing_length,
        **template_facts(template, form=form, stop_ids=stop_ids),
        **set_facts(train, val, config, seed=seed),
    }
    return Plan(
        config=config,
        template=template,
        form=form,
        seed=seed,
        packing_length=packing_length,
        train=train,
        val=val,
        facts=facts,
    )


def prepare(plan: Plan, home: Path, *, piece_rows: int = PIECE_ROWS) -> Path | None:
    """Do what is left to do below `home` and return the complete folder; None while others are still at work on it.

    Raises DataError for rows that training would refuse; nothing of the address is then there.
    """
    done = home / plan.address
    if not is_prepared(done) and not _make(plan, done, piece_rows=piece_rows):
        return None
    if plan.config.strict:
        check_strict(read_prepared(done))  # others may have made it, or a part of it, without
    return done


def _make(plan: Plan, done: Path, *, piece_rows: int) -> bool:
    """Do what is left to do; False while others are still at work on it."""
    parts = done.with_name(f"{plan.address}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    pieces = [
        (number, piece) for number, one in enumerate(plan.sets) for piece in cut(one.files, rows=piece_rows)
    ]
    files = [parts / f"{number:06d}.{piece_rows}.npz" for number in range(len(pieces))]
    try:
        _encode_all(plan, pieces, files, done)
        missing = [file for file in files if not is_part(file)]
        if missing and not is_prepared(done):
            logger.info(
                "%d of %d pieces are done; other processes are at work on the rest",
                len(files) - len(missing),
                len(files),
            )
            return False
        with held(parts / "join.lock") as mine:
            if not mine:
                logger.info("all %d pieces are done; another process is joining them", len(files))
                return False
            if not is_prepared(done):
                _join_once(plan, [number for number, _ in pieces], files, done)
    except FileNotFoundError:
        if not is_prepared(done):  # else another process joined the pieces and removed them under our feet
            raise
    shutil.rmtree(parts, ignore_errors=True)
    return True


@contextmanager
def held(lock: Path) -> Iterator[bool]:
    """Hold a lock file while the block runs; gives False where another process holds it. It ends with the process."""
    with lock.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except (
            OSError
        ):  # a file system without locks: two processes may do the same piece, with the same result
            pass
        yield True


def _encode_all(plan: Plan, pieces: Sequence[tuple[int, Piece]], files: Sequence[Path], done: Path) -> None:
    """Tokenise every piece that is not there and that nobody holds, beginning anywhere, so that processes keep apart."""
    begin = crc32(f"{socket.gethostname()} {os.getpid()}".encode()) % max(1, len(pieces))
    order = [*range(begin, len(pieces)), *range(begin)]
    todo = [number for number in order if not is_part(files[number])]
    work = partial(_encode_piece, plan, pieces, files, done)
    mine = sum(forked_map(work, todo, processes=min(plan.config.dataset_num_proc, len(todo))))
    if mine:
        logger.info("tokenised %d of %d pieces in this process", mine, len(pieces))


def _encode_piece(
    plan: Plan, pieces: Sequence[tuple[int, Piece]], files: Sequence[Path], done: Path, number: int
) -> bool:
    """Tokenise one piece; False where another process does or did."""
    file = files[number]
    owner, piece = pieces[number]
    with held(file.with_suffix(".lock")) as mine:
        if not mine or is_part(file) or is_prepared(done):
            return False
        files_of_set = plan.sets[owner]
        rows = read_piece(files_of_set.files, piece)
        samples, unread = take_rows(rows, plan.config, source=files_of_set.source, folder=files_of_set.folder)
        encoded, report = encode_or_report(samples, plan.template, form=plan.form, strict=plan.config.strict)
        write_part(file, encoded, samples=samples, unread=unread, untokenised=report.bad)
    return True


def _join_once(plan: Plan, owners: Sequence[int], files: Sequence[Path], done: Path) -> None:
    growing = done.with_name(f".{done.name}-{uuid.uuid4().hex}")
    growing.mkdir()
    try:
        found = join(files, owners, plan.sets, plan.config, num_train=len(plan.train), form=plan.form, seed=plan.seed,
                     packing_length=plan.packing_length, folder=growing)  # fmt: skip
        names = {
            "train": [one.source.name for one in plan.train],
            "val": [one.source.name for one in plan.val],
        }
        manifest = {"address": plan.address, "names": names, **found, "facts": plan.facts}
        (growing / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync(growing)
        os.rename(growing, done)
    except BaseException as error:
        shutil.rmtree(growing, ignore_errors=True)
        if not (isinstance(error, OSError) and is_prepared(done)):
            raise


def _sync(folder: Path) -> None:
    """Bring all files below a folder to the disk, so that a node that dies leaves no complete name with half of its bytes."""
    for path in (file for file in folder.rglob("*") if file.is_file()):
        with path.open("rb") as opened:
            os.fsync(opened.fileno())
