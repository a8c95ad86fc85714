"""Several sets in one order: by shares, to the end of the first or of all, and the same every time."""

import json

import numpy as np
import pytest

from megaswift.cli.main import main
from megaswift.config.data import DataConfig
from megaswift.config.parse import make_run
from megaswift.config.rules import check_request
from megaswift.data.mixture import choices, interleaved, select
from megaswift.data.order import uniform
from megaswift.data.read import read_datasets
from megaswift.errors import ConfigError, DataError


def by_hand(counts, shares, *, strategy, seed) -> list[int]:
    """Draw one row after the other, as the flag's help says."""
    taken, over, rows = [0] * len(counts), set(), []
    for number in range(10**6):
        chosen = int(choices(number, 1, shares, seed=seed)[0])
        if taken[chosen] >= counts[chosen]:
            over.add(chosen)
            if strategy == "first_exhausted" or len(over) == len(counts):
                return rows
        taken[chosen] += 1
        rows.append(chosen)
    raise AssertionError("no end")


@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize(
    ("counts", "shares"),
    [([7, 30], [0.5, 0.5]), ([5, 5, 40], [0.2, 0.5, 0.3]), ([9], [1.0]), ([1, 60], [0.9, 0.1])],
)
def test_rows_come_in_the_order_of_the_choices_until_sets_run_out(counts, shares, strategy):
    chosen = interleaved(counts, shares, strategy=strategy, seed=3)
    assert chosen.tolist() == by_hand(counts, shares, strategy=strategy, seed=3)


def test_choices_keep_the_shares_and_depend_on_their_number_alone():
    whole = choices(0, 20_000, [0.7, 0.2, 0.1], seed=1)
    assert np.allclose(np.bincount(whole) / len(whole), [0.7, 0.2, 0.1], atol=0.01)  # 3 sigma of 20000 draws
    assert (choices(5_000, 100, [0.7, 0.2, 0.1], seed=1) == whole[5_000:5_100]).all()
    assert (choices(0, 20_000, [0.7, 0.2, 0.1], seed=1, epoch=1) != whole).any()


def test_uniform_numbers_are_fixed_for_all_time():
    numbers = uniform(2, 3, seed=42, stream=-7)
    assert (numbers == uniform(0, 5, seed=42, stream=-7)[2:]).all()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert [f"{number:.12f}" for number in numbers] == ["0.433477686226", "0.502181909299", "0.290218564284"]


@pytest.fixture
def sets(tmp_path):
    for name, count in (("a", 10), ("b", 40)):
        rows = [json.dumps({"query": f"{name}{i}", "response": "yes"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def questions(rows) -> list[str]:
    return [sample.messages[0]["content"] for sample in rows]


def test_the_first_set_that_runs_out_ends_an_epoch_with_rows_from_everywhere_in_the_others(sets, caplog):
    config = DataConfig(dataset=sets, interleave_prob=["0.5", "0.5"])
    asked = questions(read_datasets(config).train)
    assert asked == questions(read_datasets(config).train)
    assert len(set(asked)) == len(asked) < 50
    assert {name[0] for name in asked} == {"a", "b"}
    assert max(int(name[1:]) for name in asked if name[0] == "b") > 20  # not only the beginning of the file
    assert asked != questions(read_datasets(config, seed=7).train)
    in_order = DataConfig(dataset=sets, interleave_prob=["0.5", "0.5"], dataset_shuffle=False)
    of_b = [name for name in questions(read_datasets(in_order).train) if name[0] == "b"]
    assert of_b == [f"b{i}" for i in range(len(of_b))]


def test_all_sets_are_seen_whole_where_the_last_one_ends_an_epoch(sets):
    config = DataConfig(dataset=sets, interleave_prob=["0.5", "0.5"], stopping_strategy="all_exhausted")
    asked = questions(read_datasets(config).train)
    assert set(asked) == {f"a{i}" for i in range(10)} | {f"b{i}" for i in range(40)}
    assert (
        asked.count("a3") in (asked.count("a4") - 1, asked.count("a4"), asked.count("a4") + 1)
        and asked.count("a3") > 2
    )


def test_no_row_that_validates_is_interleaved(sets):
    config = DataConfig(
        dataset=sets,
        split_dataset_ratio=0.2,
        interleave_prob=["0.3", "0.7"],
        stopping_strategy="all_exhausted",
    )
    read = read_datasets(config)
    assert len(read.val) == 10 and not set(questions(read.val)) & set(questions(read.train))


@pytest.mark.parametrize("repeated", [0, 1])
def test_no_row_that_validates_is_trained_on_where_a_set_is_repeated(sets, repeated):
    sets[repeated] += "#90"
    read = read_datasets(DataConfig(dataset=sets, split_dataset_ratio=0.2))
    asked, held_back = questions(read.train), questions(read.val)
    assert len(held_back) == len(set(held_back)) == 10, "a share of the different rows"
    assert not set(held_back) & set(asked) and len(set(asked)) == 40
    assert len(asked) == 90 + (40 if repeated == 0 else 10) - sum(
        questions(read.sets[number].samples).count(name) for number in (0, 1) for name in held_back
    )
    once = DataConfig(dataset=[name.removesuffix("#90") for name in sets], split_dataset_ratio=0.2)
    assert questions(read_datasets(once).val) == held_back


def test_a_set_that_only_validates_cannot_be_interleaved():
    config = DataConfig(split_dataset_ratio=0.9, interleave_prob=["0.5", "0.5"])
    with pytest.raises(DataError, match="all rows of a set are held back"):
        select(
            [1, 9],
            [],
            config,
            seed=next(
                s
                for s in range(99)
                if 0 not in select([10], [], DataConfig(split_dataset_ratio=0.9), seed=s).train
            ),
        )


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"interleave_prob": ["0.5"]}, "1 shares for 2 sets"),
        ({"interleave_prob": ["0.5", "0.4"]}, "adds up to 0.9"),
        ({"interleave_prob": ["1", "0"]}, "above 0"),
        ({"interleave_prob": ["half", "half"]}, "not a list of numbers"),
        ({"stopping_strategy": "all_exhausted"}, "needs --interleave_prob"),
    ],
)
def test_wrong_shares_are_errors(flags, reason):
    with pytest.raises(ConfigError, match=reason):
        check_request(make_run("sft", model="m", dataset=["a", "b"], **flags))


def test_the_data_command_reads_shares_too(sets, capsys):
    assert main(["data", "--dataset", *sets, "--interleave_prob", "0.5"]) == 2
    assert "1 shares for 2 sets" in capsys.readouterr().err
