"""Bad rows: each planted one is reported with file, line and kind; nothing else is lost; --strict stops."""

import json

import pytest

from megaswift.config.data import DataConfig
from megaswift.data.encode import encode_samples
from megaswift.data.layouts import to_sample
from megaswift.data.read import read_datasets
from megaswift.data.report import Report, merge
from megaswift.data.sample import RowError
from megaswift.data.template import Template
from megaswift.errors import DataError
from tests.unit.chat_formats import FORMATS
from tests.unit.small_tokenizers import small_tokenizer

Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
GOOD = {"messages": [Q, A]}

PLANTED: list[tuple[str, str | bytes | dict]] = [  # (kind, row)
    ("json", '{"messages": [{"role": "user"'),
    ("json", "not json at all"),
    ("json", '{"messages": [], }'),
    ("encoding", b'{"text": "\xff\xfe broken"}'),
    ("not an object", "[1, 2, 3]"),
    ("not an object", '"text"'),
    ("not an object", "17"),
    ("columns", {"foo": 1, "bar": 2}),
    ("columns", {}),
    ("columns", {"prompt": "q", "question": "q", "answer": "a"}),
    ("columns", {"conversation": [{"human": "q"}]}),
    ("role", {"messages": [{"role": "narrator", "content": "x"}, A]}),
    ("role", {"messages": [{"content": "x"}, A]}),
    ("role", {"conversations": [{"from": 7, "value": "q"}, {"from": "gpt", "value": "a"}]}),
    ("order", {"messages": [Q, A, {"role": "system", "content": "late"}, Q, A]}),
    ("order", {"messages": [A, Q, A]}),
    ("order", {"messages": [Q, {"role": "tool", "content": "r"}, A]}),
    ("empty answer", {"query": "q", "response": ""}),
    ("empty answer", {"query": "q", "response": "  \n"}),
    ("empty answer", {"messages": [Q, {"role": "assistant", "content": ""}]}),
    ("empty answer", {"messages": [Q, {"role": "assistant", "content": None}]}),
    ("empty answer", {"question": "q", "answers": []}),
    ("empty question", {"query": "", "response": "a"}),
    ("empty question", {"messages": [{"role": "user", "content": " "}, A]}),
    ("empty text", {"text": " "}),
    ("empty conversation", {"messages": []}),
    ("empty conversation", {"messages": [{"role": "system", "content": "s"}]}),
    ("type", {"query": 3, "response": "a"}),
    ("type", {"messages": "just text"}),
    ("type", {"messages": [Q, {"role": "assistant", "content": 5}]}),
    ("type", {"messages": [Q, "a"]}),
    ("type", {"query": "q", "response": "a", "history": [["q1"]]}),
    ("tool call", {"messages": [Q, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{broken"}}]}]}),
    ("tool call", {"messages": [Q, {"role": "tool_call", "content": "call f"}]}),
    ("tools", {"messages": [Q, A], "tools": "no list"}),
    ("media", {"messages": [Q, A], "images": ["missing.png"]}),
    ("media", {"messages": [{"role": "user", "content": "<image><image>q"}, A], "images": ["https://x/1.png"]}),
    ("pair", {"prompt": "q", "chosen": "a"}),
    ("pair", {"prompt": "q", "chosen": "a", "rejected": "a"}),
    ("pair", {"messages": [Q], "rejected_response": "b"}),
    ("label", {"messages": [Q, A], "label": "perhaps"}),
    ("json", '{"text": "t", "size": ' + "1" * 5000 + "}"),
    ("json", '{"text": ' + "[" * 100_000),
    ("pair", {"chosen": [], "rejected": []}),
    ("pair", {"prompt": "q", "chosen": [], "rejected": "b"}),
    ("order", {"chosen": [A], "rejected": [{"role": "assistant", "content": "b"}]}),
    ("order", {"prompt": [], "chosen": "a", "rejected": "b"}),
    ("empty conversation", {"messages": [], "rejected_response": "b"}),
    ("tool call", {"messages": [Q, {"role": "assistant", "content": "", "tool_calls": [{"function": "f"}]}]}),
    ("type", {"messages": [Q, {**A, "loss_scale": "high"}]}),
    ("type", {"messages": [Q, {**A, "loss_scale": float("nan")}]}),
    ("type", {"messages": [Q, {**A, "loss_scale": -1}]}),
    ("type", {"messages": [Q, {**A, "loss": "false"}]}),
    ("type", {"messages": [Q, {**A, "reasoning_content": 5}]}),
    ("label", {"messages": [Q, A], "label": "1" * 5000}),
    ("label", {"messages": [Q, A], "label": "[" * 100_000}),
    ("media", {"messages": [Q, A], "images": ["x" * 300]}),
    ("type", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("inf")}),
    ("unexpected", {"messages": "[{1: 2}]"}),  # a Python literal whose keys are no names
    # kinds that show only with a template
    ("encoding", {"query": "q", "response": "a \ud83d"}),
    ("encoding", {"query": "\udc80", "response": "a"}),
    ("encoding", {"text": "t \ud83d"}),
    ("no answer", {"messages": [Q]}),
    ("too long", {"query": "q", "response": "yes " * 500}),
    ("media", {"query": "what is it?", "response": "a cat", "images": ["https://x/1.png"]}),  # for a model of text
    ("template", {"messages": [Q, {"role": "assistant", "content": "a"}], "chat_template_kwargs": {"fail": True}}),
]  # fmt: skip
READING = [kind for kind, _ in PLANTED[:-7]]  # the last seven show only with a template


@pytest.fixture
def planted(tmp_path):
    """Write good and bad rows in turns; return the file and the (line, kind) of every bad one."""
    lines: list[bytes] = []
    expected = []
    for kind, row in PLANTED:
        lines.append(json.dumps(GOOD).encode())
        lines.append(
            row if isinstance(row, bytes) else (json.dumps(row) if isinstance(row, dict) else row).encode()
        )
        expected.append((len(lines), kind))
    lines.append(json.dumps(GOOD).encode())
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path, expected


def template() -> Template:
    form = FORMATS["chatml"]
    failing = "{% if fail %}{{ raise_exception('asked to') }}{% endif %}" + form.template
    return Template(small_tokenizer(failing, special=form.special, eos=form.eos), max_length=200)


def test_forty_bad_rows_of_fifteen_kinds_are_planted():
    assert len(PLANTED) >= 40 and len({kind for kind, _ in PLANTED}) >= 15


def test_every_bad_row_is_reported_with_line_and_kind_and_nothing_else_is_lost(planted):
    path, expected = planted
    read = read_datasets(DataConfig(dataset=[str(path)]))
    encoded, encoding = encode_samples(read.train, template())
    found = [(int(row.source.rpartition(":")[2]), row.kind) for row in (*read.report.bad, *encoding.bad)]
    assert sorted(found) == sorted(expected)
    assert all(row.source.startswith(f"{path}:") and row.reason for row in (*read.report.bad, *encoding.bad))
    assert read.report.read == 2 * len(PLANTED) + 1
    assert read.report.kept + len(read.report.bad) == read.report.read
    assert encoding.read == read.report.kept and len(encoded) == encoding.kept == len(PLANTED) + 1


def test_the_report_counts_kinds(planted):
    path, _ = planted
    kinds = read_datasets(DataConfig(dataset=[str(path)])).report.kinds()
    assert kinds == {kind: READING.count(kind) for kind in READING}


@pytest.mark.parametrize(("kind", "row"), PLANTED, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(PLANTED)])
def test_strict_stops_at_the_row(tmp_path, kind, row):
    bad = row if isinstance(row, bytes) else (json.dumps(row) if isinstance(row, dict) else row).encode()
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + bad)
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {kind}: .*--strict"):
        read = read_datasets(DataConfig(dataset=[str(tmp_path / "rows.jsonl")], strict=True))
        encode_samples(read.train, template(), strict=True)


def test_a_set_without_a_usable_row_is_an_error_that_shows_the_first_reason(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"foo": 1}\n{"bar": 2}\n')
    with pytest.raises(DataError, match=r"has no usable row \(2 read\).*rows\.jsonl:1: columns"):
        read_datasets(DataConfig(dataset=[str(tmp_path / "rows.jsonl")]))


def test_bad_rows_of_a_json_array_carry_the_line_they_begin_at(tmp_path):
    rows = [GOOD, {"query": "", "response": "a"}, GOOD, {"foo": 1}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=2))
    lines = path.read_text().splitlines()
    report = read_datasets(DataConfig(dataset=[str(path)])).report
    starts = [number for number, line in enumerate(lines, 1) if line == "  {"]
    assert [(row.source, row.kind) for row in report.bad] == [
        (f"{path}:{starts[1]}", "empty question"), (f"{path}:{starts[3]}", "columns"),
    ]  # fmt: skip


def test_a_broken_json_array_names_the_line_of_the_row(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n{"query": "q", "response": "a"},\n{"query": "q" "response": "a"}\n]')
    with pytest.raises(DataError, match=r"rows\.json:3: the row that begins here is not JSON"):
        read_datasets(DataConfig(dataset=[str(path)]))
    path.write_text('[\n{"query": "q", "response": "a"}')
    with pytest.raises(DataError, match=r"rows\.json:2"):
        read_datasets(DataConfig(dataset=[str(path)]))


def test_what_follows_a_json_array_is_an_error_and_no_lost_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f"[{json.dumps(GOOD)}]\n\n[{json.dumps(GOOD)}]\n")
    with pytest.raises(DataError, match=r"rows\.json:3: something follows the end of the array, '\[\{"):
        read_datasets(DataConfig(dataset=[str(path)]))
    path.write_text(f"[{json.dumps(GOOD)}]\n \n")
    assert read_datasets(DataConfig(dataset=[str(path)])).report.kept == 1


def test_bad_rows_of_csv_carry_their_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('query,response\nq,a\n"q\nover lines",a\nq\nq,a,surplus\nq,""\n')
    report = read_datasets(DataConfig(dataset=[str(path)])).report
    assert [(row.source.removeprefix(f"{path}:"), row.kind) for row in report.bad] == [
        ("5", "columns"), ("6", "columns"), ("7", "empty answer"),
    ]  # fmt: skip
    assert report.kept == 2


def test_bytes_that_are_not_utf8_are_reported_in_csv_and_txt(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"query,response\nq,a\nq,\xff\nq,\xef\xbf\xbd\n")
    report = read_datasets(DataConfig(dataset=[str(tmp_path / "rows.csv")])).report
    assert [(row.source.rpartition(":")[2], row.kind) for row in report.bad] == [("3", "encoding")]
    (tmp_path / "rows.txt").write_bytes(b"good\n\xff\n")
    report = read_datasets(DataConfig(dataset=[str(tmp_path / "rows.txt")])).report
    assert [(row.source.rpartition(":")[2], row.kind) for row in report.bad] == [("2", "encoding")]


def test_reports_add_up():
    assert merge([Report(read=2, kept=2), Report(read=3, kept=3)]) == Report(read=5, kept=5)
    with pytest.raises(AssertionError):
        Report(read=2, kept=1)


@pytest.mark.parametrize("block", [{"type": "hologram"}, 5, {"type": "text", "text": 5}])
def test_unknown_content_blocks_are_refused(block, tmp_path):
    with pytest.raises(RowError, match="type"):
        to_sample({"messages": [{"role": "user", "content": [block]}, A]}, "f:1", folder=tmp_path)
