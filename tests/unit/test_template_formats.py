"""Every conversation format: the ids are the tokenizer's own, and exactly the assistant's tokens carry loss."""

import numpy as np
import pytest

from megaswift.data.sample import RowError, Sample
from megaswift.data.template import Template
from megaswift.errors import DataError
from tests.unit.chat_formats import FORMATS, ChatFormat
from tests.unit.small_tokenizers import assistant, call, sentencepiece_like, small_tokenizer, system, user

ROUNDS = [user("What is one?"), assistant("First answer"), user("And two?"), assistant("Second answer")]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "d", "parameters": {"type": "object"}},
    }
]
TOOL_ROUND = [
    user("Weather in Rome?"),
    assistant("", tool_calls=[call("get_weather", city="Rome")]),
    {"role": "tool", "content": "sunny", "tool_call_id": "call12345", "name": "get_weather"},
    assistant("It is sunny."),
]


def template_of(form: ChatFormat, **settings) -> Template:
    tokenizer = small_tokenizer(form.template, special=form.special, bos=form.bos, eos=form.eos)
    return Template(tokenizer, stop_ids=tokenizer.convert_tokens_to_ids(list(form.stop_tokens)), **settings)


def trained_parts(template: Template, messages, tools=()) -> list[str]:
    """Return the text of every run of tokens with loss, after checking the ids against the tokenizer."""
    encoded = template.encode(Sample(source="t:1", messages=tuple(messages), tools=tuple(tools)))[0]
    contents = [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if template._reads_blocks else m
        for m in messages
    ]
    expected = template.tokenizer.apply_chat_template(contents, tools=list(tools) or None)["input_ids"]
    assert encoded.input_ids.tolist() == expected
    assert set(np.unique(encoded.loss_weights)) <= {0.0, 1.0}
    parts: list[list[int]] = [[]]
    for token, weight in zip(encoded.input_ids.tolist(), encoded.loss_weights, strict=True):
        if weight:
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    return [template.tokenizer.decode(part) for part in parts if part]


def test_there_are_formats_of_at_least_25_models():
    assert len(FORMATS) >= 25


@pytest.mark.parametrize("name", FORMATS)
def test_two_rounds_are_masked_to_the_token(name):
    form = FORMATS[name]
    assert trained_parts(template_of(form), ROUNDS) == list(form.answers)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.takes_system])
def test_a_system_message_carries_no_loss(name):
    form = FORMATS[name]
    assert trained_parts(template_of(form), [system("Be brief."), *ROUNDS]) == list(form.answers)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not form.takes_system])
def test_a_template_that_knows_no_system_refuses_the_row(name):
    with pytest.raises(RowError, match="template"):
        template_of(FORMATS[name]).encode(Sample(source="t:1", messages=(system("Be brief."), *ROUNDS)))


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.tool_answers])
def test_tool_calls_are_trained_and_tool_results_are_not(name):
    form = FORMATS[name]
    assert trained_parts(template_of(form), TOOL_ROUND, TOOLS) == list(form.tool_answers)


@pytest.mark.parametrize(
    "name", [name for name, form in FORMATS.items() if not form.tool_answers and name != "command r"]
)
def test_a_template_that_drops_tool_calls_refuses_the_row(name):
    with pytest.raises(RowError):
        template_of(FORMATS[name]).encode(Sample(source="t:1", messages=tuple(TOOL_ROUND)))


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_question_and_answer_twice_is_not_confused(name):
    form = FORMATS[name]
    twice = [user("Really?"), assistant("First answer"), user("Really?"), assistant("First answer")]
    parts = trained_parts(template_of(form), twice)
    assert parts == [form.answers[0], form.answers[1].replace("Second", "First")]


@pytest.mark.parametrize("name", FORMATS)
def test_remembered_shapes_give_the_same_spans_as_a_fresh_derivation(name):
    form = FORMATS[name]
    template = template_of(form)
    conversations = [
        [user(q1), assistant(a1), user(q2), assistant(a2)]
        for q1, a1, q2, a2 in [
            ("a", "assistant", "user", "s"),
            (" lead", "trail \n", "\n\nx", "  two  spaces"),
            ("n\u00e9e \u4f60\u597d", "\u4f60\u597d \U0001f642", "q", "<b>bold</b> & more"),
            ("q", "<think>\nwhy\n</think>\n\nbecause", "q", "<think>\nhow\n</think>\n\nso"),
            ("What is one?", "First answer", "And two?", "Second answer"),
        ]
    ]
    for messages in conversations:
        sample = Sample(source="t:1", messages=tuple(messages))
        remembered, fresh = template.render(sample), template_of(form).render(sample)
        assert remembered == fresh
        trained_parts(template, messages)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("word", ["hi", "think", "assistant", "s"])
def test_words_that_a_template_writes_too_are_masked_whatever_came_before(name, word):
    """\"think\" is also in the <think> that a prompt opens, and "hi" in the middle of it."""
    form = FORMATS[name]
    messages = [user(word), assistant(word), user(word), assistant(word)]
    sample = Sample(source="t:1", messages=tuple(messages))
    template = template_of(form)
    template._finder._skeletons.clear()  # of the probe
    fresh = template.render(sample)
    template.render(
        Sample(source="t:2", messages=(user("Tell"), assistant("me"), user("more"), assistant("now")))
    )
    assert template.render(sample) == fresh
    answers = [
        answer.replace(old, word)
        for answer, old in zip(form.answers, ("First answer", "Second answer"), strict=True)
    ]
    assert trained_parts(template, messages) == answers


def test_thinking_of_the_last_turn_is_trained_and_of_earlier_turns_is_as_rendered():
    template = template_of(FORMATS["thinking of earlier turns dropped (Qwen3)"])
    messages = [
        user("q1"), assistant("<think>\nwhy\n</think>\n\nFirst"), user("q2"), assistant("<think>\nhow\n</think>\n\nSecond"),
    ]  # fmt: skip
    assert trained_parts(template, messages) == [
        "First<|im_end|>",
        "<think>\nhow\n</think>\n\nSecond<|im_end|>",
    ]


def test_thinking_around_tools_is_found_although_it_is_dropped_once_the_user_speaks_again():
    template = template_of(FORMATS["thinking of earlier turns dropped (Qwen3)"])
    think = "<think>\nlook it up\n</think>\n\n"
    messages = [
        user("Weather in Rome?"),
        assistant(think, tool_calls=[call("get_weather", city="Rome")]),
        {"role": "tool", "content": "sunny"},
        assistant(think + "It is sunny."),
        user("Thanks"),
        assistant("Welcome"),
    ]
    call_text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert trained_parts(template, messages, TOOLS) == [
        call_text, "It is sunny.<|im_end|>", "<think>\n\n</think>\n\nWelcome<|im_end|>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}", "does not show the text"),
        ("{% for m in messages %}Source: {{ m.role }}\n{{ m.content }} <step> {% endfor %}Source: assistant\n", "no end-of-turn token"),
        ("{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "cannot be told|no end-of-turn"),
        ("{% if messages[-1].role == 'user' %}Hi {% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}", "cannot be told"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}", "marks 2 generated parts for 1"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for m in messages %", "refuses the conversation"),
    ],
)  # fmt: skip
def test_a_template_with_an_ambiguous_mask_is_refused_with_the_reason(template, reason):
    with pytest.raises(DataError, match=reason):
        Template(small_tokenizer(template))


def test_an_answer_that_later_rounds_change_is_refused():
    template = Template(
        small_tokenizer(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last or m.role == 'user' else m.content[:5] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>",
        )
    )  # fmt: skip
    with pytest.raises(RowError, match="mask"):
        template.encode(Sample(source="t:1", messages=tuple(ROUNDS)))


@pytest.mark.parametrize("style", ["metaspace", "prepend"])
@pytest.mark.parametrize("name", ["llama 2", "mistral 0.1", "deepseek 2", "zephyr", "chatml"])
@pytest.mark.parametrize("answer", ["First answer", "\u4f60\u597d", " lead", "two\n\nlines"])
def test_words_that_begin_with_a_blank_mark_are_masked_to_the_token(style, name, answer):
    form = FORMATS[name]
    template = Template(sentencepiece_like(style, form.template, special=form.special))
    messages = [user("What is one?"), assistant(answer), user("And two?"), assistant(answer)]
    encoded = template.encode(Sample(source="t:1", messages=tuple(messages)))[0]
    assert encoded.input_ids.tolist() == template.tokenizer.apply_chat_template(messages)["input_ids"]
    ids, trained = encoded.input_ids, encoded.loss_weights > 0
    starts = np.flatnonzero(np.diff(trained.astype(int), prepend=0) == 1)
    ends = np.flatnonzero(np.diff(trained.astype(int), append=0) == -1) + 1
    assert len(starts) == 2
    for start, end in zip(starts, ends, strict=True):
        text = template.tokenizer.decode(ids[start:end].tolist())
        assert text.strip().removesuffix("</s>").removesuffix("<|im_end|>").strip() == answer.strip()
        assert template.tokenizer.decode(ids[end - 1 : end].tolist()) in ("</s>", "<|im_end|>")
        assert not template.tokenizer.decode(ids[:start].tolist()).rstrip().endswith(answer.strip()[:2])
