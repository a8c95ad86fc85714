"""Channels: every token is of the channel that its row names, whatever way it takes into a batch."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megaswift.config.data import DataConfig
from megaswift.config.parse import make_run
from megaswift.config.rules import check_request
from megaswift.data.batches import BatchSettings, MicroBatch, TrainData, ValidationData
from megaswift.data.channels import Channels, channel_of, join_channels
from megaswift.data.forms import CHANNELS, CONVERSATIONS, form_of
from megaswift.data.load import load_data
from megaswift.data.prepare import make_plan, prepare
from megaswift.data.sample import RowError, Sample
from megaswift.data.sources import find_files, parse_source
from megaswift.data.stream import Recipe, RowStream
from megaswift.data.stream_batches import StreamData
from megaswift.data.template import Template
from megaswift.errors import ConfigError, DataError
from tests.unit.chat_formats import FORMATS
from tests.unit.small_tokenizers import small_tokenizer
from tests.unit.test_data_stream import Inline

FORM = FORMATS["chatml"]
RUN = make_run("sft", model="m", dataset=["d"], enable_channel_loss=True)


def tokenizer():
    return small_tokenizer(FORM.template, special=FORM.special, eos=FORM.eos)


def name_of(number: int) -> str:
    """Return the channel of row `number`: one is named late in the file and one by a single row; every seventh names none."""
    if number % 7 == 6:
        return "None"
    return "late" if number > 30 else "once" if number == 17 else "ab"[number % 2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("channels")
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(40):
            row = {"query": str(number), "response": "yes " * (number % 5 + 1), "channel": name_of(number)}
            if row["channel"] == "None":
                row |= {"channel": ""} if number % 2 else {"channel": None}
            file.write(json.dumps(row) + "\n")
    tokenizer().save_pretrained(folder / "model")
    return folder / "rows.jsonl"


def check(batch: MicroBatch) -> set[str]:
    """Hold the channel of every document against its row; return the names seen."""
    rows, width = batch.input_ids.shape
    bounds = (
        batch.cu_seqlens.tolist() if batch.cu_seqlens is not None else range(0, (rows + 1) * width, width)
    )
    ids, numbers = batch.input_ids.flatten(), batch.channels.flatten()
    assert batch.channels.shape == batch.input_ids.shape
    seen = set()
    for (start, _), length in zip(pairwise(bounds), batch.lengths, strict=False):
        own = {batch.channel_names[number] for number in numbers[start : start + length].tolist()}
        text = tokenizer().decode(ids[start : start + length].tolist())
        assert own == {name_of(int(text.partition("user\n")[2].partition("<|im_end|>")[0]))}
        seen |= own
    return seen


NAMES = {"a", "b", "late", "once", "None"}
MODES = {
    "packed": {"packing": True, "packing_length": 64},
    "end to end": {"micro_batch_size": 2},
    "padded": {"padding_free": False, "micro_batch_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_document_is_of_its_rows_channel(mode, rows):
    loaded = load_data(
        DataConfig(dataset=[str(rows)], split_dataset_ratio=0.3),
        tokenizer(),
        max_length=64,
        form=form_of(RUN),
    )
    settings = BatchSettings(global_batch_size=4, **MODES[mode])
    train = TrainData(loaded.train, settings)
    seen = [
        check(batch)
        for step in range(train.num_steps(1))
        for rank in (0, 1)
        for batch in train.micro_batches(4 * step, dp_rank=rank, dp=2)
    ]
    held_back = ValidationData(loaded.val, settings)
    for step in range(held_back.num_steps()):
        seen += [check(batch) for batch in held_back.micro_batches(step, dp_rank=0, dp=1)]
    assert set().union(*seen) == NAMES


@pytest.mark.parametrize("mode", ["packed", "end to end"])
def test_streams_give_all_ranks_the_names_of_the_global_batch(mode, rows, tmp_path):
    config = DataConfig(dataset=[str(rows)], streaming=True, shuffle_buffer_size=7)
    sets = tuple(find_files(parse_source(name)) for name in config.dataset)
    recipe = Recipe(config=config, sets=sets, tokenizer=str(rows.parent / "model"), max_length=64, run=RUN,
                    packing_length=MODES[mode].get("packing_length"))  # fmt: skip
    stream = StreamData(
        Inline(tmp_path / "windows", RowStream(sets, config, seed=5), recipe.kitchen()),
        BatchSettings(global_batch_size=4, **MODES[mode]),
        pad_id=0,
        nature={},
    )
    seen = set()
    for step in range(24):
        batches = [batch for rank in (0, 1) for batch in stream.micro_batches(4 * step, dp_rank=rank, dp=2)]
        assert len({batch.channel_names for batch in batches}) == 1
        seen |= set().union(*map(check, batches))
    assert seen == NAMES


@pytest.mark.parametrize("packing_length", [None, 64])
def test_prepared_rows_keep_their_channels(packing_length, rows, tmp_path):
    def plan_of(config: DataConfig, form):
        template = Template.from_config(config, tokenizer(), max_length=64)
        return make_plan(
            config, template, form=form, seed=42, use_hf=True, packing_length=packing_length, stop_ids=()
        )

    config = DataConfig(dataset=[f"{rows}#33", str(rows)], split_dataset_ratio=0.2)
    plan = plan_of(config, CHANNELS)
    assert plan.address != plan_of(config, CONVERSATIONS).address
    folder = prepare(plan, tmp_path / "home", piece_rows=8)
    now = load_data(config, tokenizer(), max_length=64, form=CHANNELS)
    ahead = load_data(DataConfig(dataset=[str(folder)]), tokenizer(), max_length=64, form=CHANNELS)
    for one, other in ((now.train, ahead.train), (now.val, ahead.val)):
        assert np.array_equal(one.input_ids, other.input_ids)
        assert [one.channels.names[number] for number in one.channels.numbers] == [
            other.channels.names[number] for number in other.channels.numbers
        ]
    with pytest.raises(DataError, match="another form: 'conversations with channels' there, 'conversations'"):
        load_data(DataConfig(dataset=[str(folder)]), tokenizer(), max_length=64)


def test_parts_of_a_long_text_are_of_one_channel(tmp_path):
    texts = [{"text": "yes " * 60, "channel": "long"}, {"text": "no", "channel": "short"}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    config = DataConfig(
        dataset=[str(tmp_path / "texts.jsonl")], loss_scale="all", use_chat_template=False, truncation_strategy="split"
    )  # fmt: skip
    found = load_data(config, tokenizer(), max_length=32, form=CHANNELS).train
    assert found.channels.names == ("long", "short")
    assert found.channels.numbers.tolist() == found.samples.tolist() and len(found) > 2


@pytest.mark.parametrize(
    ("extras", "name"),
    [
        ({"channel": "math"}, "math"),
        ({"Channel": "math"}, "math"),
        ({"channel": 3}, "3"),
        ({"channel": ""}, "None"),
        ({"channel": None}, "None"),
        ({}, "None"),
    ],
)
def test_a_channel_is_a_text_or_none(extras, name):
    assert channel_of(Sample(source="f:1", extras=extras)) == name


def test_a_channel_that_cannot_be_logged_is_named():
    with pytest.raises(RowError, match="channel is list, not a text"):
        channel_of(Sample(source="f:1", extras={"channel": ["a"]}))
    with pytest.raises(DataError, match="f:1: channel=tokens would be logged as loss_tokens"):
        channel_of(Sample(source="f:1", extras={"channel": "tokens"}))


def test_sets_are_joined_by_name():
    parts = [Channels.of(["b", "c", "b"]), Channels.of([]), Channels.of(["a", "c"])]
    joined = join_channels(parts)
    assert [joined.names[number] for number in joined.numbers] == ["b", "c", "b", "a", "c"]
    assert joined.names == ("a", "b", "c") and joined.numbers.dtype == np.int32


@pytest.mark.parametrize(
    ("task", "flags"), [("rlhf", {"rlhf_type": "dpo"}), ("sft", {"task_type": "embedding"})]
)
def test_channels_are_of_token_losses(task, flags):
    with pytest.raises(ConfigError, match="enable_channel_loss=true is for token losses"):
        check_request(make_run(task, model="m", dataset=["d"], enable_channel_loss=True, **flags))
