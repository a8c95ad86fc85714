"""Template settings: loss scales, truncation, base models, texts, offsets."""

import logging

import numpy as np
import pytest

from megaswift.config.data import DataConfig
from megaswift.config.loss_scale import PART_RULES
from megaswift.data.part_weights import LABELLED, MATCHED, weighted_parts
from megaswift.data.sample import RowError, Sample
from megaswift.data.template import Template
from megaswift.errors import DataError
from tests.unit.chat_formats import FORMATS
from tests.unit.small_tokenizers import assistant, small_tokenizer, system, user

CHATML = FORMATS["chatml"]
ROUNDS = (user("one?"), assistant("First"), user("two?"), assistant("Second"))


def tokenizer(**more):
    return small_tokenizer(CHATML.template, special=CHATML.special, eos="<|im_end|>", **more)


def trained(template: Template, sample: Sample) -> str:
    encoded = template.encode(sample)[0]
    return template.tokenizer.decode(encoded.input_ids[encoded.loss_weights > 0].tolist())


def chat(*messages, **more) -> Sample:
    return Sample(source="t:1", messages=messages or ROUNDS, **more)


def test_last_round_trains_the_answers_after_the_last_question():
    template = Template(tokenizer(), loss_scale="last_round")
    assert trained(template, chat()) == "Second<|im_end|>"
    steps = chat(
        user("q"),
        assistant("First"),
        user("go"),
        assistant("a"),
        {"role": "tool", "content": "r"},
        assistant("b"),
    )
    assert trained(template, steps) == "a<|im_end|>b<|im_end|>"


@pytest.mark.parametrize("scale", ["ignore_empty_think", "default+ignore_empty_think"])
def test_an_empty_thinking_block_carries_no_loss(scale):
    template = Template(tokenizer(), loss_scale=scale)
    sample = chat(
        user("one?"),
        assistant("<think>\n\n</think>\n\nFirst"),
        user("two?"),
        assistant("<think>\nyes\n</think>\n\nSecond"),
    )
    assert trained(template, sample) == "First<|im_end|><think>\nyes\n</think>\n\nSecond<|im_end|>"
    assert trained(Template(tokenizer()), sample).startswith("<think>\n\n</think>")
    last = Template(tokenizer(), loss_scale=f"last_round+{scale.removeprefix('default+')}")
    assert trained(last, sample) == "<think>\nyes\n</think>\n\nSecond<|im_end|>"


def weights_of(text: str, *rules: str) -> list[tuple[str, float]]:
    return [(text[start:end], weight) for start, end, weight in weighted_parts(text, rules)]


def test_parts_of_an_answer_weigh_what_the_rules_say():
    calls = "So:<tool_call>\n{}\n</tool_call> and <tool_call>x</tool_call>"
    assert weights_of(calls, "hermes") == [
        ("So:", 1), ("<tool_call>\n{}\n</tool_call>", 2), (" and ", 1), ("<tool_call>x</tool_call>", 2),
    ]  # fmt: skip
    steps = "Hm. Thought: a\nAction: b\nAction Input: {}\nObservation: c\nNext: d\nFinal Answer: e"
    assert weights_of(steps, "react") == [
        ("Hm. Thought: a\n", 1), ("Action: b\nAction Input: {}\nObservation:", 2), (" c\nNext: d\n", 0), ("Final Answer: e", 1),
    ]  # fmt: skip
    assert weights_of(steps, "alpha_umi")[2:4] == [(" c\n", 0), ("Next: d\n", 2)]
    assert weights_of("✿FUNCTION✿: f\n✿RESULT✿: r\n✿RETURN✿: s", "qwen") == [
        ("✿FUNCTION✿: f\n✿RESULT✿:", 2), (" r\n", 0), ("✿RETURN✿: s", 1),
    ]  # fmt: skip
    thought = "<think>\n\n</think>\n\n<tool_call>x</tool_call>"
    assert weights_of(thought, "hermes", "ignore_empty_think") == [(thought[:19], 0), (thought[19:], 2)]
    assert weights_of("<think>\nyes", "ignore_think_prefix") == [("<think>\n", 0), ("yes", 1)]
    assert weights_of("no <think>\nyes", "ignore_think_prefix") == [("no <think>\nyes", 1)]
    assert weights_of("", "react") == []
    assert set(MATCHED) | set(LABELLED) == set(PART_RULES)


@pytest.mark.parametrize("uses_chat_template", [True, False])
def test_the_end_of_a_turn_is_no_part_of_what_an_agent_says(uses_chat_template):
    template = Template(tokenizer(), loss_scale="last_round+react", use_chat_template=uses_chat_template)
    (encoded,) = template.encode(chat(user("q"), assistant("Action: go\nObservation: done")))
    found: dict[float, str] = {}
    for token, weight in zip(encoded.input_ids, encoded.loss_weights.tolist(), strict=True):
        found[weight] = found.get(weight, "") + tokenizer().decode([token])
    assert found[2] == "Action: go\nObservation:" and found[1].strip() == tokenizer().eos_token
    assert found[0].rstrip().endswith("done")


def test_a_special_token_within_an_answer_is_no_end_of_it():
    marked = small_tokenizer(
        CHATML.template, special=[*CHATML.special, "<tool_call>", "</tool_call>"], eos="<|im_end|>"
    )
    (encoded,) = Template(marked, loss_scale="hermes").encode(
        chat(user("q"), assistant("<tool_call>go</tool_call>"))
    )
    weights = encoded.loss_weights[encoded.loss_weights > 0].tolist()
    assert set(weights[:-1]) == {2.0} and weights[-1] == 1.0 and len(weights) > 3


def test_all_trains_every_token():
    encoded = Template(tokenizer(), loss_scale="all").encode(chat())[0]
    assert encoded.loss_weights.all()


def test_loss_of_a_message_overrides_and_loss_scale_weighs():
    template = Template(tokenizer())
    sample = chat(user("q"), assistant("First", loss=False), user("q"), assistant("Second", loss_scale=0.5))
    encoded = template.encode(sample)[0]
    assert trained(template, sample) == "Second<|im_end|>"
    assert set(encoded.loss_weights.tolist()) == {0.0, 0.5}


def test_loss_true_trains_an_earlier_turn_under_last_round():
    template = Template(tokenizer(), loss_scale="last_round")
    sample = chat(user("q"), assistant("First", loss=True), user("q"), assistant("Second"))
    assert trained(template, sample) == "First<|im_end|>Second<|im_end|>"


def test_the_system_setting_fills_rows_without_one(tmp_path):
    (tmp_path / "system.txt").write_text("Be kind.\n")
    template = Template(tokenizer(), system=str(tmp_path / "system.txt"))
    assert template.render(chat()).text.startswith("<|im_start|>system\nBe kind.<|im_end|>")
    own = template.render(chat(system("Mine."), *ROUNDS)).text
    assert own.startswith("<|im_start|>system\nMine.") and "Be kind" not in own


def test_a_missing_system_file_is_an_error():
    with pytest.raises(DataError, match=r"missing\.txt is not there"):
        Template(tokenizer(), system="missing.txt")


def test_a_conversation_without_answer_is_refused():
    with pytest.raises(RowError, match="no answer"):
        Template(tokenizer()).encode(chat(user("q")))


def test_long_samples_are_dropped_with_their_length():
    with pytest.raises(RowError, match=r"too long: \d\d tokens, max_length=10"):
        Template(tokenizer(), max_length=10).encode(chat())


def test_truncation_keeps_the_named_end():
    full = Template(tokenizer()).encode(chat())[0]
    left = Template(tokenizer(), max_length=10, truncation_strategy="left").encode(chat())[0]
    assert np.array_equal(left.input_ids, full.input_ids[-10:])
    long_answer = chat(user("q"), assistant("yes " * 50))
    right = Template(tokenizer(), max_length=20, truncation_strategy="right").encode(long_answer)[0]
    assert len(right.input_ids) == 20 and right.loss_weights[-1] == 1


def test_a_truncated_sample_without_loss_is_dropped():
    with pytest.raises(RowError, match="no loss"):
        Template(tokenizer(), max_length=5, truncation_strategy="right").encode(chat())


def test_split_cuts_texts_into_pieces_that_join_to_the_whole():
    template = Template(tokenizer(), max_length=8, truncation_strategy="split")
    sample = Sample(source="t:1", text="the capital of France is Paris " * 5)
    pieces = template.encode(sample)
    whole = Template(tokenizer()).encode(sample)[0]
    assert all(len(piece.input_ids) <= 8 for piece in pieces)
    joined = np.concatenate([piece.input_ids for piece in pieces])
    assert np.array_equal(joined, whole.input_ids[: len(joined)])
    assert len(whole.input_ids) - len(joined) <= 1  # a last piece of one token has nothing to learn from
    with pytest.raises(RowError, match="too long"):
        template.encode(chat(user("q"), assistant("yes " * 50)))


def test_texts_get_the_tokenizers_bos_and_an_eos():
    with_bos = small_tokenizer(CHATML.template, special=CHATML.special, bos="<s>", eos="</s>", adds_bos=True)
    encoded = Template(with_bos).encode(Sample(source="t:1", text="Paris"))[0]
    assert encoded.input_ids.tolist() == [*with_bos("Paris")["input_ids"], with_bos.eos_token_id]
    assert encoded.input_ids[0] == with_bos.bos_token_id
    assert encoded.loss_weights.tolist() == [0.0] + [1.0] * (len(encoded.input_ids) - 1)


def test_texts_and_conversations_give_the_same_ids_together_and_alone():
    template = Template(tokenizer())
    samples = [Sample(source="t:1", text="two  spaces \U0001f642"), chat(), chat(user("q"), assistant("a"))]
    together = template.encode_batch(samples)
    for sample, entries in zip(samples, together, strict=True):
        (alone,) = template.encode(sample)
        assert np.array_equal(alone.input_ids, entries[0].input_ids)
        assert np.array_equal(alone.loss_weights, entries[0].loss_weights)


def test_a_base_model_gets_chatml_and_is_told_once(caplog):
    base = small_tokenizer(None, eos="</s>")
    with caplog.at_level(logging.INFO, logger="megaswift"):
        template = Template(base)
    assert [record.message for record in caplog.records] == [
        "the tokenizer has no chat template; using ChatML with </s> at the end of a turn"
    ]
    assert template.render(chat()).text == (
        "<|im_start|>user\none?</s>\n<|im_start|>assistant\nFirst</s>\n"
        "<|im_start|>user\ntwo?</s>\n<|im_start|>assistant\nSecond</s>\n"
    )
    assert trained(template, chat()) == "First</s>Second</s>"


def test_without_chat_template_turns_are_joined_and_answers_end_with_eos():
    template = Template(tokenizer(), use_chat_template=False)
    assert template.render(chat()).text == "one?First<|im_end|>two?Second<|im_end|>"
    assert trained(template, chat()) == "First<|im_end|>Second<|im_end|>"
    asked = Sample(source="row", messages=chat().messages[:3])
    assert template.prompt(asked) == "one?First<|im_end|>two?", "a prompt must be what was trained on"
    assert template.prompt(chat()) == template.render(chat()).text


def test_enable_thinking_and_the_rows_own_variables_reach_the_template():
    form = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{{ enable_thinking }}{{ mood }}\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    template = Template(
        small_tokenizer(form.replace("{{ mood }}", "")), use_chat_template=False, enable_thinking=False
    )
    assert template.variables == {"enable_thinking": False}
    seen = "{% for m in messages %}<|im_start|>{{ m.role }}{{ mood }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ mood }}\n{% endif %}"
    template = Template(small_tokenizer(seen, special=CHATML.special, eos="<|im_end|>"))
    assert "assistant-glad\nFirst" in template.render(chat(template_kwargs={"mood": "-glad"})).text


def test_blank_tokens_and_split_characters_are_not_lost():
    template = Template(tokenizer())
    answer = "  two  spaces \U0001f642\n\n  \u4f60"
    assert trained(template, chat(user("q"), assistant(answer))) == f"{answer}<|im_end|>"


def test_from_config_takes_the_data_section():
    config = DataConfig(loss_scale="all", system="Hi", truncation_strategy="left", enable_thinking=True)
    template = Template.from_config(config, tokenizer(), max_length=64)
    assert (template.loss_scale, template.system, template.truncation_strategy) == ("all", "Hi", "left")
    assert template.max_length == 64 and template.variables == {"enable_thinking": True}


def test_the_last_answer_without_an_end_is_said(caplog):
    form = FORMATS["no end after the last answer (Qwen1.5)"]
    with caplog.at_level(logging.WARNING, logger="megaswift"):
        Template(small_tokenizer(form.template, special=form.special, eos=form.eos))
    assert any("ends the last answer without a token" in record.message for record in caplog.records)


def test_dropped_thinking_of_the_last_answer_is_said_once(caplog):
    form = FORMATS["thinking dropped, prompt opens it (DeepSeek-R1)"]
    template = Template(small_tokenizer(form.template, special=form.special, bos=form.bos, eos=form.eos))
    with caplog.at_level(logging.WARNING, logger="megaswift"):
        for _ in range(2):
            template.encode(chat(user("q"), assistant("<think>why</think>Because")))
    assert [record.message for record in caplog.records] == [
        "t:1: the chat template drops the thinking of the last answer; it is not trained on"
    ]


def test_a_slow_tokenizer_is_refused_with_the_way_out():
    class Slow:
        bos_token_id = eos_token_id = None

    with pytest.raises(DataError, match=r"Slow has no fast backend.*tokenizer\.json"):
        Template(Slow())
