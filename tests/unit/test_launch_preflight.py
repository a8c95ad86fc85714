"""What is found out before a job is queued: rows that cannot be encoded, and disks that are too small."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaswift.config.parse import make_run
from megaswift.config.run import RunConfig
from megaswift.data.first_rows import check_first_rows as encode_first_rows
from megaswift.errors import DataError, LaunchError
from megaswift.launch import preflight
from megaswift.launch.preflight import (
    check_first_rows,
    check_output,
    check_rows,
    checkpoint_bytes,
    planned_checkpoints,
)
from megaswift.launch.quota import Mount, mount_of, quota_left, writable_bytes
from megaswift.metadata.meta import ModelMeta
from megaswift.metadata.read import get_model_meta
from tests.harness.tiny_run import CHAT_TEMPLATE
from tests.unit.small_tokenizers import small_tokenizer
from tests.unit.test_cli import TINY_LLAMA

GIB = 2**30
GOOD = {
    "messages": [
        {"role": "user", "content": "the capital of France"},
        {"role": "assistant", "content": "Paris"},
    ]
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and a tokenizer; weights of a hundred bytes."""
    folder = tmp_path_factory.mktemp("preflight") / "model"
    tokenizer = small_tokenizer(CHAT_TEMPLATE, special=["<|user|>", "<|assistant|>"])
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, "vocab_size": len(tokenizer)}))
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    return folder


def run_of(model: Path, **settings: Any) -> RunConfig:
    return make_run("sft", model=str(model), dataset=["rows.jsonl"], **settings)


def rows(folder: Path, *lines: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines))
    return str(path)


def test_bad_first_rows_are_told_with_file_line_and_rule(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.log, "propagate", True)
    monkeypatch.setattr(logging.getLogger("megaswift"), "propagate", True)
    file = rows(tmp_path, GOOD, "{broken", {"messages": []}, GOOD)
    run, meta = run_of(model), get_model_meta(str(model))
    with caplog.at_level("INFO"):
        check_first_rows(
            replace(run, data=replace(run.data, dataset=[file, "somebody/elsewhere", f"{file}#3"])), meta
        )
    told = [record.getMessage() for record in caplog.records]
    assert any(line.startswith(f"bad row: {file}:2: json: not JSON") for line in told)
    assert any(line.startswith(f"bad row: {file}:3: ") for line in told)
    assert "dataset=somebody/elsewhere is not on this machine: its rows are not looked at" in told
    assert "encoded 4 rows of the beginnings of the data sets, 4 are bad" in told  # the file is named twice


def test_rows_of_which_none_can_be_used_are_refused(model: Path, tmp_path: Path) -> None:
    run, meta = run_of(model), get_model_meta(str(model))
    pairs = make_run("rlhf", model=str(model), rlhf_type="dpo", dataset=[rows(tmp_path, GOOD)])
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: pair: a row of layout messages has no rejected answer"
    ):
        check_first_rows(pairs, meta)
    strict = replace(run.data, dataset=[rows(tmp_path, GOOD, {"nothing": 1})], strict=True)
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*--strict"):
        encode_first_rows(replace(run, data=strict))


def test_without_a_tokenizer_rows_are_not_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    monkeypatch.setattr(preflight.subprocess, "run", lambda *words, **options: pytest.fail("started"))
    check_first_rows(run_of(tmp_path), get_model_meta(str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "planned"),
    [
        ({}, 2),  # nobody knows the steps: the newest and the next
        ({"train_iters": 1000, "save_steps": 300}, 4),
        ({"train_iters": 1000, "save_steps": 250}, 4),
        ({"train_iters": 10, "save_steps": 500}, 1),
        (
            {"train_iters": 1000, "save_steps": 100, "save_total_limit": 3},
            4,
        ),  # the fourth before the first goes
        ({"train_iters": 200, "save_steps": 100, "save_total_limit": 3}, 2),
        ({"save_strategy": "epoch", "num_train_epochs": 2.5}, 3),
        ({"save_strategy": "no"}, 1),
        ({"train_iters": 1000, "save_steps": 100, "exit_after_save": True}, 1),
    ],
)
def test_checkpoints_are_planned_from_steps_and_limit(settings: dict[str, Any], planned: int) -> None:
    assert planned_checkpoints(make_run("sft", model="m", dataset=["rows.jsonl"], **settings)) == planned


def weights(folder: Path, gib: int) -> ModelMeta:
    """Return the facts of a bfloat16 model with weights of so many GiB, none of which are written."""
    (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, "dtype": "bfloat16"}))
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(gib * GIB)
    return get_model_meta(str(folder))


def test_a_checkpoint_has_what_the_settings_ask_for(tmp_path: Path) -> None:
    meta = weights(tmp_path, 2)

    def gib(**settings: Any) -> float:
        return checkpoint_bytes(run_of(tmp_path, torch_dtype="bfloat16", **settings), meta) / GIB

    assert gib() == 16  # bytes a parameter: 2 weights, 12 optimizer, 2 export
    assert gib(save_safetensors=False) == 14
    assert gib(save_optim=False) == 2  # the export alone
    assert gib(save_optim=False, save_safetensors=False) == 2
    assert gib(tuner_type="lora") == 0
    assert gib(tuner_type="lora", merge_lora=True) == 2


def test_room_for_all_planned_checkpoints_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, output = weights(tmp_path, 2), tmp_path / "out"
    monkeypatch.setattr(preflight, "writable_bytes", lambda folder: 40 * GIB)

    def check(**settings: Any) -> None:
        check_output(
            run_of(tmp_path, output_dir=str(output), train_iters=400, save_steps=100, **settings), meta
        )

    with pytest.raises(
        LaunchError, match=r"room for 40.0 GiB, and the run writes 4 checkpoints of about 16.0"
    ):
        check()
    check(save_total_limit=1)
    check(save_optim=False)
    with pytest.raises(LaunchError, match="writes 3 checkpoints"):
        check(save_total_limit=2)
    (output / "checkpoint-100").mkdir(parents=True)  # a run that goes on has written it
    (output / "checkpoint-200.partial").mkdir()
    check(save_total_limit=2)


MOUNTS = "/dev/sda1 / ext4 rw 0 0\nfs@tcp:/lustre /lustre lustre rw 0 0\nnas:/home /home nfs4 rw 0 0\n"
# What the two commands print (lfs-quota(1), quota(1)): name, KiB used, soft and hard limit, grace, files, ...
LFS = "/lustre 2097152* 1048576 4194304 6d23h 5 0 0 -\n"
QUOTA = (
    "Disk quotas for user u (uid 1000): \n     Filesystem  blocks   quota   limit   grace\n"
    "      nas:/home 1048576       0 3145728           10       0       0\n"
)


def test_a_quota_counts_where_there_is_one(tmp_path: Path) -> None:
    work, home = mount_of(Path("/lustre/u/out"), MOUNTS), mount_of(Path("/home/u"), MOUNTS)
    assert work == Mount(device="fs@tcp:/lustre", point="/lustre", kind="lustre")
    assert home is not None and home.point == "/home"
    assert mount_of(Path("/lustre2"), MOUNTS) == Mount(device="/dev/sda1", point="/", kind="ext4")
    assert work is not None and quota_left(LFS, work) == 0  # over the soft limit
    assert quota_left(LFS.replace("2097152*", "524288"), work) == GIB // 2
    assert quota_left(QUOTA, home) == 2 * GIB
    assert quota_left("/lustre 5 0 0 - 5 0 0 -\n", work) is None  # no limit
    assert quota_left(QUOTA, work) is None and quota_left("lfs: error\n", work) is None
    assert 0 < writable_bytes(tmp_path)


def test_a_hub_id_may_have_a_dot_and_a_file_must_be_there(tmp_path: Path) -> None:
    def asked(name: str) -> RunConfig:
        return make_run("sft", model="m", dataset=[name])

    check_rows(asked("teknium/OpenHermes-2.5"))
    check_rows(asked("teknium/OpenHermes-2.5#500"))
    for name in ("rows.jsonl", "rows.jsonl#500", "./OpenHermes-2.5", str(tmp_path / "none")):
        with pytest.raises(DataError, match="is not there"):
            check_rows(asked(name))
