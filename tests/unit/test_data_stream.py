"""Rows read while training: the same global batches for every number of ranks, and after every resume."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megaswift.config.data import DataConfig
from megaswift.config.parse import make_run
from megaswift.config.rules import check_request
from megaswift.data import windows
from megaswift.data.batches import BatchSettings
from megaswift.data.encode import EncodedSet
from megaswift.data.mixture import interleaved
from megaswift.data.sources import find_files, parse_source
from megaswift.data.stream import Kitchen, Position, Recipe, RowStream
from megaswift.data.stream_batches import StreamData, where_to_go_on
from megaswift.data.windows import Shelf, Window, Workshop, make_window
from megaswift.errors import ConfigError, DataError
from megaswift.training.feed import TrainFeed
from tests.unit.chat_formats import FORMATS
from tests.unit.small_tokenizers import small_tokenizer

FORM = FORMATS["chatml"]
COUNTS = {"a": 41, "b": 23}
ROWS = {
    name: [{"query": f"{name}{i}", "response": "yes " * (1 + i * 7 % 11)} for i in range(n)]
    for name, n in COUNTS.items()
}
BAD = 17  # a row of a.jsonl that is no JSON


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    for name, rows in ROWS.items():
        lines = [json.dumps(row) for row in rows]
        if name == "a":
            lines[BAD] = '{"broken'
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=8
        )
    small_tokenizer(FORM.template, special=FORM.special, eos=FORM.eos).save_pretrained(folder / "model")
    return folder


def config_of(folder: Path, *, suffix: str = ".jsonl", window: int = 10, **more) -> DataConfig:
    files = [str(folder / f"{name}{suffix}") for name in COUNTS]
    return DataConfig(dataset=files, streaming=True, shuffle_buffer_size=window, **more)


def sets_of(config: DataConfig):
    return tuple(find_files(parse_source(name)) for name in config.dataset)


def recipe_of(folder: Path, config: DataConfig, **more) -> Recipe:
    return Recipe(config=config, sets=sets_of(config), tokenizer=str(folder / "model"), max_length=64, **more)


class Inline(Shelf):
    """Makes a window when it is asked for."""

    def __init__(self, folder: Path, stream: RowStream, kitchen: Kitchen) -> None:
        super().__init__(folder)
        folder.mkdir(exist_ok=True)
        self.stream, self.kitchen, self.asked = stream, kitchen, []

    def get(self, number: int) -> Window:
        self.asked.append(number)
        while self.stream.position.window <= number:
            position, rows = self.stream.window()
            make_window(self.kitchen, self._folder, position, rows)
        return super().get(number)


MODES = {
    "packing": {"packing": True, "packing_length": 48},
    "padding_free": {},
    "padded": {"padding_free": False},
}
MIXTURES = {
    "one after the other": {},
    "first": {"interleave_prob": ["0.5", "0.5"]},
    "all": {"interleave_prob": ["0.3", "0.7"], "stopping_strategy": "all_exhausted"},
}


def kitchen_of(folder, config, mode) -> Kitchen:
    return recipe_of(folder, config, packing_length=MODES[mode].get("packing_length")).kitchen()


def data_of(folder, place, config, mode, *, kitchen=None, kept=None) -> StreamData:
    settings = BatchSettings(global_batch_size=4, seed=5, **MODES[mode])
    position, first, window = None, 0, 0
    if kept is not None:
        stored, first = where_to_go_on(kept, {"seed": 5})
        position = Position.from_json(stored)
        window = position.window
    stream = RowStream(sets_of(config), config, seed=5, position=position)
    shelf = Inline(place, stream, kitchen or kitchen_of(folder, config, mode))
    return StreamData(shelf, settings, pad_id=0, nature={"seed": 5}, first_window=window, first_item=first)


def contents(batch) -> tuple:
    return tuple(
        getattr(batch, name).numpy().tobytes()
        for name in ("input_ids", "labels", "loss_mask", "position_ids")
    )


def global_batch(data: StreamData, consumed: int, dp: int) -> list[tuple]:
    feeds = [TrainFeed(data, dp_rank=rank, dp=dp) for rank in range(dp)]
    shares = [feed.batch(consumed) for feed in feeds]
    assert len({len(share) for share in shares}) == 1
    return sorted(contents(batch) for share in shares for batch in share)


STEPS = 24  # of 4 items: more than one epoch of rows, and two of packs
CASES = [
    *(("packing", mixture) for mixture in MIXTURES),
    ("padding_free", "first"),
    ("padded", "one after the other"),
]


@pytest.mark.parametrize(("mode", "mixture"), CASES)
def test_global_batches_are_the_same_for_every_dp_and_after_a_resume_with_another(
    mode, mixture, folder, tmp_path
):
    config = config_of(folder, **MIXTURES[mixture])
    kitchen = kitchen_of(folder, config, mode)
    whole = data_of(folder, tmp_path / "whole", config, mode, kitchen=kitchen)
    expected, rows, epochs, done = [], [], [], 0
    for step in range(STEPS):
        expected.append(global_batch(whole, 4 * step, dp=1))
        assert whole.epochs_done(4 * step) == done, "whatever was read since"
        rows.append(whole.sample_ids(4 * step))
        epochs.append(whole.epoch(4 * step + 4))
        done = whole.epochs_done(4 * step + 4)
    assert done >= 1
    assert epochs == sorted(epochs) and epochs[-1] >= 1
    for dp in (2, 4):
        other = data_of(folder, tmp_path / str(dp), config, mode, kitchen=kitchen)
        assert [global_batch(other, 4 * step, dp) for step in range(STEPS)] == expected
    for stop, dp in ((1, 2), (9, 4), (22, 1)):
        before = data_of(folder, tmp_path / f"until{stop}", config, mode, kitchen=kitchen)
        feed = TrainFeed(before, dp_rank=0, dp=2 if dp == 1 else 1, ahead=True)
        for step in range(stop):
            feed.batch(4 * step)
        kept = tmp_path / f"kept{stop}"
        for name, write in feed.writers().items():
            (kept / name).mkdir(parents=True)
            write(kept / name)
        feed.close()
        after = data_of(folder, tmp_path / f"from{stop}", config, mode, kitchen=kitchen, kept=kept)
        for step in range(stop, STEPS):
            assert global_batch(after, 4 * step, dp) == expected[step]
            assert after.sample_ids(4 * step) == rows[step]
        # Nothing is read again but the window that was in use.
        assert after._shelf.asked[0] >= before._shelf.asked[-1] - 2 and (
            stop == 1 or after._shelf.asked[0] > 0
        )


def decoded(data: StreamData, items: int) -> list[str]:
    tokenizer = small_tokenizer(FORM.template, special=FORM.special, eos=FORM.eos)
    found = []
    for consumed in range(0, items, 4):
        for batch in data.micro_batches(consumed, dp_rank=0, dp=1):
            bounds = batch.cu_seqlens.tolist()
            for start, end in pairwise(bounds):
                text = tokenizer.decode(batch.input_ids[0, start:end].tolist())
                found.append(text.partition("user\n")[2].partition("<|im_end|>")[0])
    return found


def test_an_epoch_holds_every_usable_row_once_and_windows_are_shuffled(folder, tmp_path):
    names = [row["query"] for rows in ROWS.values() for row in rows]
    names.remove(f"a{BAD}")
    asked = decoded(data_of(folder, tmp_path / "w", config_of(folder), "padding_free"), 128)
    assert sorted(asked[:63]) == sorted(names) and asked[:63] != names
    assert sorted(asked[63:126]) == sorted(names) and asked[63:126] != asked[:63]
    assert {int(name[1:]) for name in asked[:10]} == set(range(10))  # a window is that of its rows
    in_order = data_of(folder, tmp_path / "o", config_of(folder), "padding_free")
    in_order.settings = BatchSettings(global_batch_size=4, shuffle=False)
    assert decoded(in_order, 60)[:60] == names[:60]


def test_interleaved_rows_come_as_in_a_set_that_is_read_at_once(folder):
    for strategy in ("first_exhausted", "all_exhausted"):
        config = config_of(folder, interleave_prob=["0.3", "0.7"], stopping_strategy=strategy)
        stream, owners = RowStream(sets_of(config), config, seed=5), []
        while stream.position.epoch == 0:
            owners += [number for number, _ in stream.window()[1]]
        expected = interleaved(list(COUNTS.values()), [0.3, 0.7], strategy=strategy, seed=5).tolist()
        assert owners[: len(expected)] == expected and len(owners) - len(expected) <= 10


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_reading_goes_on_from_the_beginning_of_any_window(suffix, mixture, folder):
    config = config_of(folder, suffix=suffix, **MIXTURES[mixture])
    stream = RowStream(sets_of(config), config, seed=5)
    windows = [stream.window() for _ in range(16)]
    assert windows[-1][0].epoch >= 1
    for number in (0, 1, 5, 6, 7, 13):
        stored = json.loads(json.dumps(windows[number][0].to_json()))
        again = RowStream(sets_of(config), config, seed=5, position=Position.from_json(stored))
        assert [again.window() for _ in range(number, 16)] == windows[number:]


def test_a_resumed_reader_does_not_touch_what_lies_before(folder, tmp_path, monkeypatch):
    config = config_of(folder)
    stream = RowStream(sets_of(config), config, seed=5)
    for _ in range(3):
        stream.window()
    seen, seek = [], os.SEEK_SET

    class Watched:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, offset):
            seen.append(self.file.seek(offset, seek))

        def __iter__(self):
            return iter(self.file)

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r", **more: Watched(opened(path, mode, **more)))
    again = RowStream(sets_of(config), config, seed=5, position=stream.position)
    again.window()
    assert seen == [stream.position.cursors[0].offset] and seen[0] > 500


def test_bad_rows_are_counted_and_a_window_of_them_is_passed(folder, tmp_path):
    kitchen = recipe_of(folder, config_of(folder)).kitchen()
    config = config_of(folder)
    stream, read, kept = RowStream(sets_of(config), config, seed=5), 0, 0
    while stream.position.epoch == 0:
        _, report = kitchen.make(stream.window()[1])
        read, kept = read + report.read, kept + report.kept
        for row in report.bad:
            assert str(row).startswith(f"{folder / 'a.jsonl'}:{BAD + 1}: json")
    assert (read, kept) == (64, 63)
    one_by_one = data_of(folder, tmp_path / "w", config_of(folder, window=1), "padding_free")
    assert len(decoded(one_by_one, 64)) == 64


def test_windows_made_ahead_are_the_same_and_removed_once_they_are_behind(folder, tmp_path, monkeypatch):
    def threads(
        processes, context, *, initializer, initargs
    ):  # processes cost seconds; the next test has one
        monkeypatch.setattr(windows, "_recipe", initargs[0])
        return ThreadPoolExecutor(processes)

    monkeypatch.setattr(windows, "ProcessPoolExecutor", threads)
    windows._kitchen.cache_clear()
    config = config_of(folder)
    recipe = recipe_of(folder, config)
    shop = Workshop(tmp_path / "w", RowStream(recipe.sets, config, seed=5), recipe, processes=2)
    data = StreamData(shop, BatchSettings(global_batch_size=4, seed=5), pad_id=0, nature={})
    plain = data_of(folder, tmp_path / "plain", config, "padding_free")
    for step in range(20):
        assert global_batch(data, 4 * step, 1) == global_batch(plain, 4 * step, 1)
        assert len([name for name in os.listdir(tmp_path / "w") if not name.startswith(".")]) <= 7
    reader = Shelf(tmp_path / "w").get(data._next - 1)
    assert reader.encoded is not None and len(reader.encoded) in (9, 10)
    data.close()


def test_windows_are_made_in_processes_that_end_with_the_stream(folder, tmp_path):
    config = config_of(folder)
    recipe = recipe_of(folder, config)
    shop = Workshop(tmp_path / "w", RowStream(recipe.sets, config, seed=5), recipe, processes=1)
    made = shop.get(0).encoded
    expected = recipe.kitchen().make(RowStream(recipe.sets, config, seed=5).window()[1])[0]
    assert np.array_equal(made.input_ids, expected.input_ids) and np.array_equal(made.starts, expected.starts)
    processes = list(shop._pool._processes.values())
    shop.close()
    assert processes and not any(process.is_alive() for process in processes)


def test_a_bad_row_stops_a_strict_stream_on_every_rank(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        windows, "ProcessPoolExecutor", lambda processes, *_, **__: ThreadPoolExecutor(processes)
    )
    config = config_of(folder, strict=True)
    recipe = recipe_of(folder, config)
    monkeypatch.setattr(windows, "_recipe", recipe)
    windows._kitchen.cache_clear()
    shop = Workshop(tmp_path / "w", RowStream(recipe.sets, config, seed=5), recipe, processes=1)
    shop.get(0)
    for rank in (shop, Shelf(tmp_path / "w")):
        with pytest.raises(DataError, match=r"a\.jsonl:18: json"):
            rank.get(1)
    shop.close()


def test_no_rank_waits_for_windows_that_cannot_be_made(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        windows, "ProcessPoolExecutor", lambda processes, *_, **__: ThreadPoolExecutor(processes)
    )
    monkeypatch.setattr(windows.time, "sleep", lambda seconds: pytest.fail("a reader waits"))
    config = config_of(folder)
    recipe = recipe_of(folder, config)
    for number, error in enumerate([OSError("the disk is gone"), ValueError()]):
        monkeypatch.setattr(windows, "_make", Mock(side_effect=error))
        place = tmp_path / f"w{number}"
        shop = Workshop(place, RowStream(recipe.sets, config, seed=5), recipe, processes=1)
        with pytest.raises(type(error)):
            shop.get(0)
        with pytest.raises(DataError, match=str(error) or "ValueError"):
            Shelf(place).get(0)
        shop.close()


def test_word_is_left_on_a_full_disk(tmp_path, monkeypatch):
    def write_nothing(path, *_, **__):
        path.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", write_nothing)
    windows._leave_word(tmp_path, "lost")
    with pytest.raises(DataError, match="disk is full"):
        Shelf(tmp_path).get(0)


def test_sets_without_rows_are_errors(folder, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    config = DataConfig(dataset=[str(tmp_path / "none.jsonl")])
    with pytest.raises(DataError, match="no rows"):
        RowStream(sets_of(config), config, seed=5).window()
    both = DataConfig(
        dataset=[str(tmp_path / "none.jsonl"), str(folder / "a.jsonl")],
        interleave_prob=["0.9", "0.1"], stopping_strategy="all_exhausted",
    )  # fmt: skip
    with pytest.raises(DataError, match=r"none\.jsonl has no row"):
        RowStream(sets_of(both), both, seed=5).window()


def test_a_checkpoint_of_another_stream_is_refused(folder, tmp_path):
    data = data_of(folder, tmp_path / "w", config_of(folder), "padding_free")
    feed = TrainFeed(data, dp_rank=0, dp=1)
    feed.batch(0)
    (tmp_path / "kept" / "stream").mkdir(parents=True)
    feed.writers()["stream"](tmp_path / "kept" / "stream")
    assert where_to_go_on(tmp_path / "kept", {"seed": 5})[1] == 0
    with pytest.raises(DataError, match="seed=6 gives another stream"):
        where_to_go_on(tmp_path / "kept", {"seed": 6})
    with pytest.raises(DataError, match="streaming=true"):
        where_to_go_on(tmp_path / "w", {"seed": 5})


def test_rows_taken_out_of_a_set_are_those_rows():
    lengths = [3, 1, 4, 1, 5, 2]
    encoded = EncodedSet(
        input_ids=np.arange(16, dtype=np.int32), loss_weights=np.ones(16, np.uint8), per_row=2,
        starts=np.concatenate([[0], np.cumsum(lengths)]), samples=np.repeat(np.arange(3), 2),
        targets=np.array([0.5, 1.5, 2.5], np.float32),
    )  # fmt: skip
    taken = encoded.take(np.array([2, 0]))
    assert taken.input_ids.tolist() == [*range(9, 16), *range(4)]
    assert taken.lengths.tolist() == [5, 2, 3, 1]
    assert taken.targets is not None and taken.targets.tolist() == [2.5, 0.5]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({}, "needs --train_iters"),
        ({"train_iters": 5, "split_dataset_ratio": 0.1}, "--val_dataset"),
        ({"train_iters": 5, "prepared_dir": "x"}, "prepared_dir"),
        ({"train_iters": 5, "shuffle_buffer_size": 0}, "shuffle_buffer_size=0"),
    ],
)
def test_wrong_streams_are_errors(flags, reason):
    with pytest.raises(ConfigError, match=reason):
        check_request(make_run("sft", model="m", dataset=["a"], streaming=True, **flags))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"rlhf_type": "kto"}, "calculate_KL"),
        ({"rlhf_type": "grpo", "reward_funcs": ["format"]}, "prompts"),
        ({"rlhf_type": "dpo", "precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
    ],
)
def test_what_needs_all_rows_does_not_stream(flags, reason):
    run = make_run("rlhf", model="m", dataset=["a"], streaming=True, train_iters=5, **flags)
    with pytest.raises(ConfigError, match=reason):
        check_request(run)
