"""Files, folders, saved directories, hub caches, sampling and splitting."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megaswift.config.data import DataConfig
from megaswift.data.encode import encode_samples
from megaswift.data.mixture import draw
from megaswift.data.read import read_datasets
from megaswift.data.sources import Source, parse_source
from megaswift.data.template import Template
from megaswift.errors import DataError
from tests.unit.chat_formats import FORMATS
from tests.unit.small_tokenizers import small_tokenizer

ROWS = [{"query": f"q{i}", "response": f"a{i}"} for i in range(20)]


def questions(path, **more) -> list[str]:
    return [
        sample.messages[0]["content"]
        for sample in read_datasets(DataConfig(dataset=[str(path)], **more)).train
    ]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["query", "response"])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_json(path):
    path.write_text(json.dumps(ROWS))
    return path


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def write_saved(path):
    datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


def write_saved_splits(path):
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(path)
    return path


def write_folder(path):
    path.mkdir()
    write_jsonl(path / "part-0.jsonl", ROWS[:12])
    write_jsonl(path / "part-1.jsonl", ROWS[12:])
    (path / "README.md").write_text("about")
    (path / "LICENSE.txt").write_text("terms")
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_jsonl), ("rows.json", write_json), ("rows.csv", write_csv), ("rows.parquet", write_parquet),
        ("rows.json", write_jsonl), ("saved", write_saved), ("splits", write_saved_splits), ("folder", write_folder),
    ],
)  # fmt: skip
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, write):
    assert questions(write(tmp_path / name)) == [row["query"] for row in ROWS]


def test_what_is_left_out_of_a_folder_is_named(tmp_path, caplog):
    folder = write_folder(tmp_path / "folder")
    (folder / "part-2.jsonl.gz").write_bytes(b"")
    assert questions(folder) == [row["query"] for row in ROWS]
    assert "are not read: part-2.jsonl.gz, LICENSE.txt" in caplog.text


def test_null_fields_that_arrow_adds_are_dropped(tmp_path):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"y": 2}}}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "rows.parquet")
    (sample,) = read_datasets(DataConfig(dataset=[str(tmp_path / "rows.parquet")])).train
    calls = [
        message["tool_calls"][0]["function"]["arguments"]
        for message in sample.messages
        if "tool_calls" in message
    ]
    assert calls == [{"x": 1}, {"y": 2}]


def test_text_files_give_one_row_a_line(tmp_path):
    (tmp_path / "text.txt").write_text("first\n\n  second \n")
    read = read_datasets(DataConfig(dataset=[str(tmp_path / "text.txt")]))
    assert [(sample.text, sample.source.rpartition(":")[2]) for sample in read.train] == [
        ("first", "1"),
        ("  second ", "3"),
    ]


def test_a_folder_with_splits_gives_its_train_files_and_says_so(tmp_path, caplog):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "test.jsonl", ROWS[3:])
    with caplog.at_level(logging.WARNING, logger="megaswift"):
        assert questions(tmp_path) == ["q0", "q1", "q2"]
    assert "left out: test.jsonl" in caplog.text


def test_a_name_that_only_contains_the_word_train_is_no_split(tmp_path):
    write_jsonl(tmp_path / "constraints.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "others.jsonl", ROWS[3:6])
    assert len(questions(tmp_path)) == 6


def test_sampling_draws_the_same_rows_for_a_seed_and_others_for_another(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl")
    first = questions(f"{path}#5")
    assert len(first) == len(set(first)) == 5
    assert first == questions(f"{path}#5") and first != questions(f"{path}#5", data_seed=1)


def test_sampling_more_than_there_are_repeats_the_set(tmp_path):
    drawn = questions(f"{write_jsonl(tmp_path / 'rows.jsonl')}#45")
    counts = [drawn.count(row["query"]) for row in ROWS]
    assert len(drawn) == 45 and set(counts) == {2, 3}
    assert draw(3, 6, seed=0) == [0, 1, 2, 0, 1, 2]


def test_several_sets_are_joined_in_order(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", ROWS[:3]), write_jsonl(tmp_path / "b.jsonl", ROWS[3:6])
    read = read_datasets(DataConfig(dataset=[str(a), f"{b}#2"]))
    assert [read_set.name for read_set in read.sets] == [str(a), str(b)]
    assert len(read.train) == 5 and read.report.read == 6


def test_a_share_is_held_back_for_validation(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl")
    read = read_datasets(DataConfig(dataset=[str(path)], split_dataset_ratio=0.2))
    train, val = ({sample.source for sample in part} for part in (read.train, read.val))
    assert len(train) == 16 and len(val) == 4 and not train & val
    again = read_datasets(DataConfig(dataset=[str(path)], split_dataset_ratio=0.2))
    assert again.val == read.val


def test_a_validation_set_of_its_own(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", ROWS[:3]), write_jsonl(tmp_path / "b.jsonl", ROWS[3:6])
    read = read_datasets(DataConfig(dataset=[str(a)], val_dataset=[str(b)]))
    assert (len(read.train), len(read.val)) == (3, 3)


@pytest.mark.parametrize("ratio", [1.0, -0.1, 0.01])
def test_a_ratio_that_leaves_nothing_is_an_error(tmp_path, ratio):
    path = write_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=f"split_dataset_ratio={ratio}"):
        read_datasets(DataConfig(dataset=[str(path)], split_dataset_ratio=ratio))


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("owner/name", Source(name="owner/name")),
        ("owner/name#500", Source(name="owner/name", rows=500)),
        ("HF::owner/name:sub#5", Source(name="owner/name", subset="sub", rows=5)),
        ("MS::owner/name", Source(name="owner/name", use_hf=False)),
    ],
)
def test_dataset_arguments_are_taken_apart(argument, expected):
    assert parse_source(argument) == expected


def test_a_path_with_a_hash_in_its_name_is_a_path(tmp_path):
    path = write_jsonl(tmp_path / "a#5")
    assert parse_source(str(path)) == Source(name=str(path))


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("rows.jsonl#many", "asks for 'many' rows"),
        ("nowhere/at/all.jsonl", "is not there"),
        ("missing.jsonl", "is not there"),
        ("folder/missing.jsonl#5", "folder/missing.jsonl is not there"),
    ],
)
def test_wrong_arguments_are_errors(argument, reason):
    with pytest.raises(DataError, match=reason):
        read_datasets(DataConfig(dataset=[argument]))


def test_an_unknown_kind_of_file_lists_the_known_ones(tmp_path):
    (tmp_path / "rows.xlsx").touch()
    with pytest.raises(DataError, match=r"not a data file.*\.jsonl"):
        read_datasets(DataConfig(dataset=[str(tmp_path / "rows.xlsx")]))


@pytest.mark.parametrize("content", [b"PAR1 broken", b""])
def test_a_broken_parquet_file_is_an_error(tmp_path, content):
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet is not a readable parquet file"):
        read_datasets(DataConfig(dataset=[str(tmp_path / "rows.parquet")]))


def test_no_dataset_is_an_error():
    with pytest.raises(DataError, match="names no rows"):
        read_datasets(DataConfig())


def test_a_hub_id_is_found_in_the_hugging_face_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "datasets--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--owner--name" / "refs").mkdir()
    (tmp_path / "datasets--owner--name" / "refs" / "main").write_text("abc")
    write_jsonl(snapshot / "train.jsonl")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(questions("owner/name#7")) == 7


def test_a_snapshot_that_lacks_files_is_no_whole_set(tmp_path, monkeypatch):
    snapshot = tmp_path / "datasets--owner--name" / "snapshots" / "abc"
    (snapshot / "data").mkdir(parents=True)
    (tmp_path / "datasets--owner--name" / "refs").mkdir()
    (tmp_path / "datasets--owner--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shards = [snapshot / "data" / f"train-{number:05d}-of-00003.jsonl" for number in range(3)]
    for number, shard in enumerate(shards):
        if number:
            with pytest.raises(DataError, match=f"owner/name is not whole in .*: {3 - number} files"):
                questions("owner/name")
        write_jsonl(shard, ROWS[:2])
    assert len(questions("owner/name")) == 6


@pytest.mark.parametrize(
    ("name", "reason"),
    [("rows.jsonl#\u00b2", "a number of rows"), ("a/b..c", "not there"), ("a/b--c", "not there")],
)
def test_names_that_nothing_can_have_are_errors(name, reason):
    with pytest.raises(DataError, match=reason):
        read_datasets(DataConfig(dataset=[name]))


def test_a_hub_id_is_found_in_the_modelscope_cache(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "datasets" / "owner" / "name"
    folder.mkdir(parents=True)
    write_jsonl(folder / "rows.jsonl")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    assert len(questions("MS::owner/name")) == 20


def test_a_hub_id_that_is_nowhere_says_how_to_bring_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"owner/name is in no hub cache.*download --repo-type dataset owner/name"
    ):
        read_datasets(DataConfig(dataset=["owner/name#5"]))


def test_self_cognition_rows_carry_the_given_names():
    config = DataConfig(dataset=["swift/self-cognition#150"], model_name=["Ada"], model_author=["the team"])
    samples = read_datasets(config).train
    contents = [message["content"] for sample in samples for message in sample.messages]
    assert len(samples) == 150 and not any("{{" in content for content in contents)
    assert all("Ada" in answer or "the team" in answer for answer in contents[1::2])
    assert sum(any("\u4e00" <= char <= "\u9fff" for char in question) for question in contents[::2]) > 40


def test_self_cognition_may_have_a_name_in_each_language():
    config = DataConfig(
        dataset=["self-cognition"], model_name=["小黄", "Huang"], model_author=["魔搭", "Scope"]
    )
    for sample in read_datasets(config).train:
        chinese = any("\u4e00" <= char <= "\u9fff" for char in sample.messages[0]["content"])
        answer = sample.messages[1]["content"]
        assert (
            ("小黄" in answer or "魔搭" in answer) is chinese is not ("Huang" in answer or "Scope" in answer)
        )


def test_self_cognition_has_default_names():
    answers = [
        sample.messages[1]["content"]
        for sample in read_datasets(DataConfig(dataset=["self-cognition"])).train
    ]
    assert any("Swift" in answer for answer in answers) and any(
        "the megaswift developers" in answer for answer in answers
    )


def test_encoding_does_not_depend_on_the_number_of_processes(tmp_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [*ROWS * 60, {"messages": [{"role": "user", "content": "no answer"}]}]
    )
    samples = read_datasets(DataConfig(dataset=[str(path)])).train
    form = FORMATS["chatml"]
    template = Template(small_tokenizer(form.template, special=form.special, eos=form.eos), max_length=64)
    alone, alone_report = encode_samples(samples, template)
    shared, shared_report = encode_samples(samples, template, processes=3)
    assert alone_report == shared_report and alone_report.kinds() == {"no answer": 1}
    for name in ("input_ids", "loss_weights", "starts", "samples"):
        assert (getattr(alone, name) == getattr(shared, name)).all()
    assert alone.loss_weights.dtype == "uint8"


def test_a_killed_process_is_an_error_and_not_a_hang(tmp_path):
    samples = read_datasets(DataConfig(dataset=[str(write_jsonl(tmp_path / "rows.jsonl", ROWS * 60))])).train

    class Killer:
        def encode_batch(self, samples):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DataError, match="dataset_num_proc=2 processes was killed"):
        encode_samples(samples, Killer(), processes=2)


def test_reading_rows_does_not_load_torch_or_transformers(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl")
    code = (
        "import sys; from megaswift.config.data import DataConfig; from megaswift.data.read import read_datasets; "
        f"read_datasets(DataConfig(dataset=[{str(path)!r}])); "
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"
