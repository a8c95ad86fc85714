"""Preference pairs and judged answers as tokens and batches: what belongs together stays together."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megaswift.config.data import DataConfig
from megaswift.data.batches import BatchSettings, MicroBatch, TrainData, ValidationData
from megaswift.data.encode import EncodedSet, encode_samples
from megaswift.data.forms import JUDGEMENTS, PAIRS, Form
from megaswift.data.mismatched import mismatched_answers
from megaswift.data.read import read_datasets
from megaswift.data.report import Report
from megaswift.data.template import Template
from megaswift.errors import DataError
from megaswift.tasks.answers import answers_of
from tests.harness.training import synthetic_judged
from tests.unit.chat_formats import FORMATS
from tests.unit.small_tokenizers import small_tokenizer

Q, A, B = (
    {"role": role, "content": text}
    for role, text in (("user", "who"), ("assistant", "I am"), ("assistant", "no"))
)


def encoded_rows(
    tmp_path: Path, rows: list[dict], form: Form, **options
) -> tuple[EncodedSet, Report, Template]:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    chat = FORMATS["chatml"]
    template = Template(
        small_tokenizer(chat.template, special=chat.special, eos=chat.eos), loss_scale="last_round", **options
    )
    encoded, report = encode_samples(
        read_datasets(DataConfig(dataset=[str(path)])).train, template, form=form
    )
    return encoded, report, template


def text(encoded: EncodedSet, entry: int, template: Template, *, trained: bool = False) -> str:
    span = slice(int(encoded.starts[entry]), int(encoded.starts[entry + 1]))
    ids, weights = encoded.input_ids[span], encoded.loss_weights[span]
    return template.tokenizer.decode(ids[weights > 0] if trained else ids)


def test_a_pair_is_two_documents_that_share_a_prompt(tmp_path):
    rows = [
        {"messages": [Q, A], "rejected_response": "no", "margin": 0.5},
        {"prompt": "who", "chosen": "I am", "rejected": "no"},
    ]
    encoded, report, template = encoded_rows(tmp_path, rows, PAIRS)
    assert (len(encoded), encoded.num_rows, report.kept) == (4, 2, 2)
    assert encoded.samples.tolist() == [0, 0, 1, 1]
    for chosen in (0, 2):
        assert text(encoded, chosen, template).startswith("<|im_start|>user\nwho")
        assert text(encoded, chosen, template, trained=True).startswith("I am")
        assert text(encoded, chosen + 1, template, trained=True).startswith("no")
    assert encoded.targets is not None and encoded.targets[0] == 0.5 and np.isnan(encoded.targets[1])


def test_a_row_that_is_no_pair_is_reported_and_nothing_else_is_lost(tmp_path):
    long = {"prompt": "who", "chosen": "I am", "rejected": "no " * 100}
    rows = [{"messages": [Q, A]}, {"prompt": "who", "chosen": "I am", "rejected": "no"}, long]
    encoded, report, template = encoded_rows(tmp_path, rows, PAIRS, max_length=60)
    assert [(row.source.rpartition(":")[2], row.kind) for row in report.bad] == [
        ("1", "pair"),
        ("3", "too long"),
    ]
    assert encoded.num_rows == report.kept == 1
    assert text(encoded, 1, template, trained=True).startswith("no")


def test_judged_answers_keep_their_labels(tmp_path):
    rows = [{"messages": [Q, A], "label": True}, {"messages": [Q, B], "label": False}, {"messages": [Q, A]}]
    encoded, report, _ = encoded_rows(tmp_path, rows, JUDGEMENTS)
    assert encoded.targets.tolist() == [1.0, 0.0]
    assert [row.kind for row in report.bad] == ["label"]


def test_mismatched_answers_belong_to_the_row_half_the_set_away(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}], "label": True}
        for i in range(5)
    ]  # fmt: skip
    encoded, _, template = encoded_rows(tmp_path, rows, JUDGEMENTS)
    others = mismatched_answers(encoded, max_length=None)
    for row in range(5):
        assert f"question {row}" in text(others, row, template)
        assert text(others, row, template, trained=True).startswith(f"answer {(row + 2) % 5}")
    cut = mismatched_answers(encoded, max_length=int(encoded.lengths.min()))
    assert cut.lengths.max() <= encoded.lengths.min() and all(
        cut.loss_weights[start:end].any() for start, end in zip(cut.starts, cut.starts[1:], strict=False)
    )
    one = encoded_rows(tmp_path, rows[:1], JUDGEMENTS)[0]
    with pytest.raises(DataError, match="--calculate_KL false"):
        mismatched_answers(one, max_length=None)


def test_a_saved_set_comes_back_without_what_an_earlier_one_left(tmp_path):
    judged = synthetic_judged("kto")
    judged.save(tmp_path / "set")
    back = EncodedSet.load(tmp_path / "set")
    assert np.array_equal(back.targets, judged.targets) and back.mismatched is not None
    assert np.array_equal(back.mismatched.input_ids, judged.mismatched.input_ids)
    synthetic_judged("dpo").save(tmp_path / "set")
    pairs = EncodedSet.load(tmp_path / "set")
    assert (pairs.per_row, pairs.targets, pairs.references, pairs.mismatched) == (2, None, None, None)


MODES = {
    "padded": BatchSettings(global_batch_size=4, micro_batch_size=2, padding_free=False),
    "padding free": BatchSettings(global_batch_size=4, micro_batch_size=2),
    "packed": BatchSettings(global_batch_size=2, packing=True, packing_length=110),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dp", [1, 2])
def test_pairs_stay_together_for_every_number_of_ranks(mode, dp):
    data = TrainData(synthetic_judged("dpo"), MODES[mode])
    if MODES[mode].global_batch_size % (MODES[mode].micro_batch_size * dp):
        pytest.skip("the batch does not divide")
    seen = []
    for consumed in range(0, data.num_items, MODES[mode].global_batch_size):
        batches = [batch for rank in range(dp) for batch in data.micro_batches(consumed, dp_rank=rank, dp=dp)]
        seen.append(sorted(entry for batch in batches for entry in batch.sample_ids))
        for batch in batches:
            chosen, rejected = batch.sample_ids[0::2], batch.sample_ids[1::2]
            assert all(entry % 2 == 0 for entry in chosen) and rejected == tuple(
                entry + 1 for entry in chosen
            )
    assert seen == [
        sorted(entry for batch in data.micro_batches(consumed, dp_rank=0, dp=1) for entry in batch.sample_ids)
        for consumed in range(0, data.num_items, MODES[mode].global_batch_size)
    ]


def with_token_losses(batch: MicroBatch) -> torch.Tensor:
    """Losses as the output layer gives them: of each label something that the label tells, zero where the mask is zero."""
    return torch.where(batch.loss_mask != 0, batch.labels.float(), 0.0)


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_sums_over_their_own_tokens(mode):
    encoded = synthetic_judged("kto")
    data = ValidationData(encoded, MODES[mode])
    found: dict[int, tuple[float, float, float]] = {}
    for step in range(data.num_steps()):
        for batch in data.micro_batches(step, dp_rank=0, dp=1):
            answers = answers_of(batch, with_token_losses(batch))
            assert answers.targets_R is not None and len(answers.targets_R) == len(batch.sample_ids)
            columns = zip(
                answers.logps_N.tolist(), answers.lengths_N.tolist(), answers.targets_R.tolist(), strict=True
            )
            found |= dict(zip(batch.sample_ids, columns, strict=True))
            assert batch.mismatched is not None and batch.mismatched.sample_ids == batch.sample_ids
    assert sorted(found) == list(range(len(encoded)))
    for entry, (logp, length, target) in found.items():
        span = slice(int(encoded.starts[entry]), int(encoded.starts[entry + 1]))
        ids, weights = encoded.input_ids[span].astype(np.float64), encoded.loss_weights[span]
        assert (logp, length, target) == (-(ids * weights).sum(), weights.sum(), encoded.targets[entry])
