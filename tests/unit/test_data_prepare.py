"""Sets tokenised ahead: the same batches, found by what they hold, made by any number of processes."""

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megaswift.cli.main import main
from megaswift.config.data import DataConfig
from megaswift.config.parse import parse_run
from megaswift.data import prepare as module
from megaswift.data.batches import BatchSettings, TrainData
from megaswift.data.cursor import Cursor, cut, read_from, read_piece
from megaswift.data.encode import EncodedSet
from megaswift.data.forms import CONVERSATIONS, PAIRS, PROMPTS, labelled
from megaswift.data.load import load_data
from megaswift.data.prepare import held, make_plan, prepare
from megaswift.data.rows import files_of, read_path
from megaswift.data.template import Template
from megaswift.data.tokenizer import load_tokenizer
from megaswift.errors import DataError
from tests.unit.chat_formats import FORMATS
from tests.unit.small_tokenizers import small_tokenizer

FORM = FORMATS["chatml"]
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 512,
    "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def tokenizer(template: str = FORM.template):
    return small_tokenizer(template, special=FORM.special, eos=FORM.eos)


def lines(name: str, count: int) -> str:
    """Return rows of many lengths, one of them broken, one too long, one with a weight that is neither 0 nor 1."""
    rows = [json.dumps({"query": f"{name}{i}", "response": "yes " * (i % 7 + 1)}) for i in range(count)]
    rows[3] = '{"broken'
    rows[5] = json.dumps({"query": "long", "response": "no way " * 200})
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss_scale": 0.5}]
    rows[6] = json.dumps({"messages": turns})
    return "\n".join([*rows[:9], "", *rows[9:]]) + "\n"


@pytest.fixture
def files(tmp_path) -> list[str]:
    for name, count in (("a", 37), ("b", 23)):
        (tmp_path / f"{name}.jsonl").write_text(lines(name, count))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def plan_of(
    config: DataConfig,
    *,
    template: str = FORM.template,
    form=CONVERSATIONS,
    seed=42,
    packing=None,
    max_length=64,
):
    made = Template.from_config(config, tokenizer(template), max_length=max_length)
    return make_plan(config, made, form=form, seed=seed, use_hf=True, packing_length=packing, stop_ids=())


def same(one: EncodedSet, other: EncodedSet) -> bool:
    names = ("input_ids", "loss_weights", "starts", "samples", "targets")
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in names
        if getattr(one, name) is not None
    )


MIXTURES = {
    "whole": {},
    "packed": {"packing": True, "packing_length": 96},
    "split": {"split_dataset_ratio": 0.2},
    "interleaved": {
        "interleave_prob": ["0.4", "0.6"],
        "stopping_strategy": "all_exhausted",
        "split_dataset_ratio": 0.1,
    },
    "drawn": {"sampled": "#50"},
    "repeated and split": {"sampled": "#100", "split_dataset_ratio": 0.2},
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_prepared_set_gives_the_same_batches(mixture, files, tmp_path):
    more = dict(MIXTURES[mixture])
    sampled = more.pop("sampled", "")
    config = DataConfig(dataset=[files[0] + sampled, files[1]], **more)
    packing = more.get("packing_length")
    folder = prepare(plan_of(config, packing=packing), tmp_path / "home", piece_rows=8)
    assert folder is not None
    now = load_data(config, tokenizer(), max_length=64)
    ahead = load_data(DataConfig(dataset=[str(folder)]), tokenizer(), max_length=64)
    assert same(now.train, ahead.train) and (now.val is None) == (ahead.val is None)
    assert now.val is None or same(now.val, ahead.val)
    settings = BatchSettings(
        global_batch_size=4, micro_batch_size=2, packing=packing is not None, packing_length=packing
    )
    one, other = TrainData(now.train, settings), TrainData(ahead.train, settings)
    assert other.packs is (ahead.train.packs if packing else None)
    for consumed in range(0, 3 * one.num_items, 4):
        pairs = zip(
            one.micro_batches(consumed, dp_rank=0, dp=2),
            other.micro_batches(consumed, dp_rank=0, dp=2),
            strict=True,
        )
        for a, b in pairs:
            assert a.input_ids.equal(b.input_ids) and a.loss_mask.equal(b.loss_mask)
    bad = [json.loads(line) for line in (folder / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["source"] for row in bad if row["kind"] == "json"] == [f"{files[0]}:4", f"{files[1]}:4"]
    kinds = [row.kind for row in (*now.read.report.bad, *now.encoding.bad)]
    assert sorted(row["kind"] for row in bad) == sorted(kinds) and "too long" in kinds


def test_pairs_keep_their_margins(tmp_path):
    rows = [
        {"prompt": f"q{i}", "chosen": "yes " * (i + 1), "rejected": "no", "margin": i / 4} for i in range(9)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(dataset=[f"{file}#5"])
    folder = prepare(plan_of(config, form=PAIRS), tmp_path / "home", piece_rows=4)
    now = load_data(config, tokenizer(), max_length=64, form=PAIRS)
    ahead = load_data(DataConfig(dataset=[str(folder)]), tokenizer(), max_length=64, form=PAIRS)
    assert same(now.train, ahead.train) and ahead.train.per_row == 2 and ahead.train.targets is not None


def test_the_address_is_that_of_the_contents(files, tmp_path):
    config = DataConfig(dataset=files)
    here = plan_of(config).address
    assert plan_of(config).address == plan_of(config, seed=7).address == here  # nothing is drawn by the seed
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(Path(files[0]).read_bytes())
    assert plan_of(DataConfig(dataset=[str(moved), files[1]])).address == here
    others = {
        "template": plan_of(config, template=FORMATS["zephyr"].template),
        "order": plan_of(DataConfig(dataset=files[::-1])),
        "rows": plan_of(DataConfig(dataset=[files[0] + "#9", files[1]])),
        "seed of rows": plan_of(DataConfig(dataset=[files[0] + "#9", files[1]]), seed=7),
        "packing": plan_of(config, packing=128),
        "form": plan_of(config, form=PAIRS),
        "max_length": plan_of(config, max_length=32),
        "loss": plan_of(DataConfig(dataset=files, loss_scale="all")),
        "system": plan_of(DataConfig(dataset=files, system="Be brief.")),
        "columns": plan_of(DataConfig(dataset=files, columns={"x": "query"})),
        "split": plan_of(DataConfig(dataset=files, split_dataset_ratio=0.5)),
    }
    with open(files[1], "a") as file:
        file.write(json.dumps({"query": "one", "response": "more"}))
    addresses = [here, plan_of(config).address, *(plan.address for plan in others.values())]
    assert len(set(addresses)) == len(addresses)


def test_what_is_there_is_not_made_again(files, tmp_path, monkeypatch):
    plan = plan_of(DataConfig(dataset=files))
    folder = prepare(plan, tmp_path / "home", piece_rows=8)
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == [plan.address]
    monkeypatch.setattr(module, "cut", None)
    assert prepare(plan, tmp_path / "home") == folder


def test_pieces_that_others_hold_are_left_and_a_later_start_does_the_rest(files, tmp_path):
    plan, home = plan_of(DataConfig(dataset=files)), tmp_path / "home"
    parts = home / f"{plan.address}.parts"
    parts.mkdir(parents=True)
    with held(parts / "000002.8.lock") as mine:
        assert mine
        assert prepare(plan, home, piece_rows=8) is None
        done = sorted(path.stat().st_mtime_ns for path in parts.glob("*.npz"))
        assert len(done) == 7 and not (parts / "000002.8.npz").exists()
    with held(parts / "join.lock"):
        assert prepare(plan, home, piece_rows=8) is None
        assert set(done) < {path.stat().st_mtime_ns for path in parts.glob("*.npz")}  # the others stand
    folder = prepare(plan, home, piece_rows=8)
    assert same(load_data(plan.config, tokenizer(), max_length=64).train, EncodedSet.load(folder / "train"))


def test_a_part_that_was_cut_off_is_made_again(files, tmp_path):
    plan, home = plan_of(DataConfig(dataset=files)), tmp_path / "home"
    parts = home / f"{plan.address}.parts"
    parts.mkdir(parents=True)
    with held(parts / "000002.8.lock"):
        assert prepare(plan, home, piece_rows=8) is None
    for number, share in ((0, 0.0), (1, 0.5), (3, 0.99)):
        part = parts / f"{number:06d}.8.npz"
        part.write_bytes(part.read_bytes()[: int(share * part.stat().st_size)])
    folder = prepare(plan, home, piece_rows=8)
    assert same(load_data(plan.config, tokenizer(), max_length=64).train, EncodedSet.load(folder / "train"))


def test_complete_names_have_their_bytes_on_the_disk(files, tmp_path, monkeypatch):
    """Without fsync a node that dies leaves renamed files that are empty or cut off."""
    synced, renamed = set(), []

    def fsync(number):
        synced.add(os.fstat(number).st_ino)

    def rename(source, target, *, move=os.rename):
        inside = Path(source).rglob("*") if Path(source).is_dir() else [Path(source)]
        renamed.append({file.stat().st_ino for file in inside if file.is_file()})
        assert renamed[-1] <= synced
        move(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    prepare(plan_of(DataConfig(dataset=files), packing=128), tmp_path / "home", piece_rows=40)
    assert len(renamed) == 3, "two parts and the folder"


def test_a_piece_without_a_usable_row_does_not_hinder_labels_of_several_numbers(tmp_path):
    labels = [[9], [9], [0, 2], [1], [9], [9]]
    file = tmp_path / "labels.jsonl"
    file.write_text("\n".join(json.dumps({"query": f"q{i}", "label": one}) for i, one in enumerate(labels)))
    config, form = DataConfig(dataset=[str(file)]), labelled("multi_label_classification", num_labels=3)
    folder = prepare(plan_of(config, form=form), tmp_path / "home", piece_rows=2)
    now = load_data(config, tokenizer(), max_length=64, form=form)
    ahead = EncodedSet.load(folder / "train")
    assert same(now.train, ahead) and ahead.targets.tolist() == [[1, 0, 1], [0, 1, 0]]


def _prepare_in_a_process(files, home, started):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    started.wait()
    prepare(plan_of(DataConfig(dataset=files, dataset_num_proc=2)), home, piece_rows=4)


def test_several_processes_at_once_share_the_work(files, tmp_path):
    fork = multiprocessing.get_context("fork")
    started = fork.Barrier(3)
    home = tmp_path / "home"
    running = [fork.Process(target=_prepare_in_a_process, args=(files, home, started)) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=120)
    assert [process.exitcode for process in running] == [0, 0, 0]
    folder = home / plan_of(DataConfig(dataset=files)).address
    now = load_data(DataConfig(dataset=files), tokenizer(), max_length=64)
    assert same(now.train, EncodedSet.load(folder / "train"))
    assert [path.name for path in home.iterdir()] == [folder.name]


def test_a_prepared_folder_is_held_against_the_run(files, tmp_path):
    folder = str(prepare(plan_of(DataConfig(dataset=files)), tmp_path / "home"))
    for config, more, reason in [
        (
            DataConfig(dataset=[folder], loss_scale="all"),
            {},
            "another loss_scale: 'default' there, 'all' in this run",
        ),
        (DataConfig(dataset=[folder]), {"max_length": 32}, "another max_length"),
        (DataConfig(dataset=[folder]), {"form": PAIRS}, "another form"),
        (DataConfig(dataset=[folder, files[0]]), {}, "stands for all sets"),
        (DataConfig(dataset=[folder + "#5"]), {}, "without #"),
        (DataConfig(dataset=[folder], strict=True), {}, "4 are bad"),
        (DataConfig(dataset=[folder], split_dataset_ratio=0.1), {}, "split_dataset_ratio=0.1 chooses rows"),
    ]:
        with pytest.raises(DataError, match=reason):
            load_data(config, tokenizer(), **{"max_length": 64, **more})
    with pytest.raises(DataError, match="another tokenizer"):
        load_data(DataConfig(dataset=[folder]), tokenizer(FORMATS["zephyr"].template), max_length=64)
    with pytest.raises(DataError, match="Prompts are not prepared"):
        plan_of(DataConfig(dataset=files), form=PROMPTS)


def test_a_run_finds_its_own_sets_below_the_folder(files, tmp_path, caplog):
    config = DataConfig(dataset=files, prepared_dir=str(tmp_path / "home"))
    assert load_data(config, tokenizer(), max_length=64).prepared is None
    assert "nothing was prepared" in caplog.text
    folder = prepare(plan_of(config), tmp_path / "home")
    found = load_data(config, tokenizer(), max_length=64)
    assert found.prepared is not None and found.prepared.folder == folder
    assert load_data(replace(config, loss_scale="all"), tokenizer(), max_length=64).prepared is None
    with pytest.raises(DataError, match="4 are bad"):
        load_data(replace(config, strict=True), tokenizer(), max_length=64)
    with pytest.raises(DataError, match="4 are bad"):
        prepare(plan_of(replace(config, strict=True)), tmp_path / "home")


def test_a_set_without_a_usable_row_leaves_nothing(tmp_path):
    (tmp_path / "bad.jsonl").write_text("no json\n")
    with pytest.raises(DataError, match="has no usable row"):
        prepare(plan_of(DataConfig(dataset=[str(tmp_path / "bad.jsonl")])), tmp_path / "home")
    assert [path.suffix for path in (tmp_path / "home").iterdir()] == [".parts"]
    with pytest.raises(DataError, match="--strict"):
        prepare(plan_of(DataConfig(dataset=[str(tmp_path / "bad.jsonl")], strict=True)), tmp_path / "other")


ROWS = [{"query": f"q{i}", "response": f"a{i}"} for i in range(20)]


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=3)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS))),
    "rows.txt": lambda path: path.write_text("".join(f"line {i}\r\n" for i in range(20))),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.csv": lambda path: path.write_text("query,response\n" + "".join(f"q{i},a{i}\n" for i in range(20))),
    "rows.parquet": write_parquet,
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_is_read_from_any_row_on_and_in_pieces(name, tmp_path):
    WRITERS[name](tmp_path / name)
    files = files_of(tmp_path / name)
    whole = list(read_path(tmp_path / name))
    rows = list(read_from(files, Cursor()))
    assert [row.parse() for row, _ in rows] == whole and len(whole) == 20
    for number in (0, 1, 6, 13, 19):
        assert [row.parse() for row, _ in read_from(files, rows[number][1])] == whole[number + 1 :]
    for size in (1, 7, 20, 100):
        pieces = cut(files, rows=size)
        assert [row for piece in pieces for row in read_piece(files, piece)] == whole
    assert len(cut(files, rows=7)) == {"rows.json": 1, "rows.csv": 1}.get(name, 3)


def test_the_command_prepares_and_shows_what_it_prepared(files, tmp_path, capsys):
    model = tmp_path / "model"
    tokenizer().save_pretrained(model)
    (model / "config.json").write_text(json.dumps(CONFIG))
    words = ["data", "--dataset", *files, "--model", str(model), "--packing", "--max_length", "64"]
    assert main([*words, "--prepare", str(tmp_path / "home")]) == 0
    said = capsys.readouterr().out
    folder = said.splitlines()[-1]
    assert "packs, 64 packing length" in said and "4 bad rows of 60" in said
    assert main(["data", "--dataset", folder]) == 0
    assert capsys.readouterr().out == said
    texts = tmp_path / "texts.txt"
    texts.write_text("the capital of France is Paris\n" * 5)
    words = [
        "data",
        "pt",
        "--dataset",
        str(texts),
        "--model",
        str(model),
        "--prepare",
        str(tmp_path / "home"),
    ]
    assert main([*words, "--max_length", "4", "--truncation_strategy", "split"]) == 0
    folder = capsys.readouterr().out.splitlines()[-1]
    more = {"loss_scale": "all", "use_chat_template": False, "truncation_strategy": "split"}
    now = load_data(DataConfig(dataset=[str(texts)], **more), tokenizer(), max_length=4)
    assert same(
        now.train, load_data(DataConfig(dataset=[folder], **more), load_tokenizer(model), max_length=4).train
    )
    assert len(now.train) > 5
    assert main(["data", "--dataset", *files, "--prepare", str(tmp_path / "home")]) == 2
    assert "needs the tokenizer" in capsys.readouterr().err


def test_the_words_of_ms_swift_prepare_and_find_both_sets(files, tmp_path, capsys):
    model, home = tmp_path / "model", tmp_path / "home"
    tokenizer().save_pretrained(model)
    (model / "config.json").write_text(json.dumps(CONFIG))
    words = ["export", "--to_cached_dataset", "true", "--template_mode", "train", "--model", str(model), "--max_length", "64"]  # fmt: skip
    assert main([*words, "--dataset", files[0], "--val_dataset", files[1], "--output_dir", str(home)]) == 0
    run = parse_run("sft", ["--cached_dataset", f"{home}/train", "--cached_val_dataset", f"{home}/val"])
    assert run.data.dataset == [str(home)]
    found = load_data(run.data, load_tokenizer(model), max_length=64)
    direct = DataConfig(dataset=[files[0]], val_dataset=[files[1]])
    expected = load_data(direct, tokenizer(), max_length=64)
    assert found.val is not None and same(found.train, expected.train) and same(found.val, expected.val)
    assert main([*words, "--dataset", files[0], "--output_dir", str(home)]) == 0, "another address"
    with pytest.raises(DataError, match=r"holds several prepared sets: \w+, \w+\. Name one"):
        load_data(run.data, load_tokenizer(model), max_length=64)
    capsys.readouterr()
    assert main([*words, "--dataset", files[0]]) == 2
    assert main([*words[:4], "grpo", *words[5:], "--dataset", files[0], "--output_dir", str(home)]) == 2
    said = capsys.readouterr().err
    assert "needs a folder. Give --output_dir" in said and "template_mode=grpo is not known" in said


def test_rows_beside_what_was_prepared_of_others_are_not_forgotten(files, tmp_path):
    config = DataConfig(dataset=[files[0]])
    prepare(plan_of(config), tmp_path)
    with pytest.raises(DataError, match=r"holds rows, and the prepared set \w+\. Name"):
        load_data(DataConfig(dataset=[str(tmp_path)]), tokenizer(), max_length=64)
