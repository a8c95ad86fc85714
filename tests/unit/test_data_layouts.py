"""The data layouts: each is recognised from its columns and becomes one Sample."""

import json
from pathlib import Path

import pytest

from megaswift.data.layouts import to_sample
from megaswift.data.sample import RowError, Sample

Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def read(row, **more) -> Sample:
    return to_sample(row, "file:1", folder=more.pop("folder", Path()), **more)


def turns(sample: Sample) -> list[dict]:
    return list(sample.messages)


CONVERSATIONS = {
    "messages": {"messages": [Q, A]},
    "messages as JSON text": {"messages": json.dumps([Q, A])},
    "messages as Python text": {"messages": str([Q, A])},
    "ShareGPT from and value": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    },
    "ShareGPT pairs": {"conversation": [{"human": "q", "assistant": "a"}]},
    "conversations with roles": {"conversations": [Q, A]},
    "query and response": {"query": "q", "response": "a"},
    "empty history": {"query": "q", "response": "a", "history": []},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "alpaca without input": {"instruction": "q", "output": "a", "text": "the whole prompt again"},
    "prompt and completion": {"prompt": "q", "completion": "a"},
    "conversational prompt and completion": {"prompt": [Q], "completion": [A]},
    "question and answer": {"question": "q", "answer": "a"},
    "problem and solution": {"problem": "q", "solution": "a"},
    "an answer that is a list": {"question": "q", "answers": ["a", "b"]},
    "capital letters": {"Question": "q", "Answer": "a"},
    "columns that are null": {"messages": [Q, A], "tools": None, "images": None, "system": None},
    "OpenAI text blocks": {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]},
    "bot and human": {"conversations": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]},
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_of_one_round_is_recognised(name):
    sample = read(CONVERSATIONS[name])
    assert turns(sample) == [Q, A]
    assert sample.source == "file:1" and sample.text is None


def test_alpaca_joins_instruction_and_input():
    assert (
        turns(read({"instruction": "Translate", "input": "chat", "output": "cat"}))[0]["content"]
        == "Translate\nchat"
    )


@pytest.mark.parametrize(
    "history", [[["q1", "a1"], ["q2", "a2"]], '[["q1", "a1"], ["q2", "a2"]]', "[('q1', 'a1'), ('q2', 'a2')]"]
)
def test_history_comes_before_the_question(history):
    contents = [m["content"] for m in turns(read({"query": "q", "response": "a", "history": history}))]
    assert contents == ["q1", "a1", "q2", "a2", "q", "a"]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Some text"},
        {"content": "Some text"},
        {"messages": [{"role": "assistant", "content": "Some text"}]},
    ],
)
def test_text_without_a_question_is_for_pre_training(row):
    sample = read(row)
    assert (sample.text, sample.messages, sample.layout) == ("Some text", (), "text")


def test_a_system_column_becomes_the_first_message():
    assert turns(read({"system": "s", "query": "q", "response": "a"}))[0] == {
        "role": "system",
        "content": "s",
    }
    own = [{"role": "system", "content": "own"}, Q, A]
    assert turns(read({"system": "s", "messages": own})) == own


def test_columns_are_renamed_first():
    assert turns(
        read({"ask": "q", "say": "a", "query": "other"}, columns={"ask": "query", "say": "response"})
    ) == [Q, A]


def test_two_columns_for_one_meaning_are_refused_with_their_names():
    with pytest.raises(RowError, match="prompt and question may each be the query; say which with --columns"):
        read({"prompt": "q", "question": "q", "response": "a"})


def test_openai_tool_calls_and_results():
    messages = [
        Q,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "r"},
        A,
    ]  # fmt: skip
    sample = read({"messages": messages, "tools": json.dumps([SCHEMA["function"]])})
    assert turns(sample)[1] == {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c1"}]}
    assert turns(sample)[2] == {"role": "tool", "tool_call_id": "c1", "content": "r"}
    assert sample.tools == (SCHEMA,)


def test_tool_call_and_tool_response_roles_join_the_turn_before():
    messages = [
        Q,
        {"role": "assistant", "content": "let me see"},
        {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "tool_response", "content": '{"y": 2}'},
        A,
    ]
    found = turns(read({"messages": messages}))
    assert [m["role"] for m in found] == ["user", "assistant", "tool", "assistant"]
    assert found[1] == {"role": "assistant", "content": "let me see", "tool_calls": [CALL, CALL]}


def test_sharegpt_function_call_and_observation():
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": [SCHEMA],
    }
    found = turns(read(row))
    assert found[1]["tool_calls"] == [CALL] and found[2] == {"role": "tool", "content": "r"}


def test_anthropic_blocks():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
        ]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "r"}]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]  # fmt: skip
    assert turns(read({"messages": messages})) == [
        Q,
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [{**CALL, "id": "t1"}],
        },
        {"role": "tool", "content": "r", "tool_call_id": "t1"},
        A,
    ]


B = {"role": "assistant", "content": "b"}
PREFERENCES = {
    "messages and rejected_response": {"messages": [Q, A], "rejected_response": "b"},
    "messages and rejected turns": {"messages": [Q, A], "rejected_response": [B]},
    "messages and rejected_messages": {"messages": [Q, A], "rejected_messages": [Q, B]},
    "query, response, rejected_response": {"query": "q", "response": "a", "rejected_response": "b"},
    "prompt, chosen and rejected": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "conversational prompt, chosen and rejected": {"prompt": [Q], "chosen": [A], "rejected": [B]},
    "prompt and whole conversations": {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]},
    "whole conversations": {"chosen": [Q, A], "rejected": [Q, B]},
    "ShareGPT with chosen and rejected turns": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preference_pair_is_recognised(name):
    sample = read(PREFERENCES[name])
    assert turns(sample) == [Q, A] and list(sample.rejected) == [Q, B]


def test_a_pair_keeps_the_system_message_on_both_sides():
    sample = read({"system": "s", "prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5})
    assert sample.messages[0] == sample.rejected[0] == {"role": "system", "content": "s"}
    assert sample.margin == 0.5


@pytest.mark.parametrize("label", [True, False, "true", "False"])
def test_kto_labels_are_booleans(label):
    assert read({"messages": [Q, A], "label": label}).label is (str(label).lower() == "true")


@pytest.mark.parametrize(("label", "expected"), [(2, 2), ([0, 1], (0, 1)), (0.5, 0.5), ("3", 3)])
def test_classification_labels_need_no_answer(label, expected):
    sample = read({"query": "q", "label": label})
    assert (turns(sample), sample.label) == ([Q], expected)


def test_prompts_keep_every_other_column_for_rewards():
    sample = read({"messages": [Q], "solution": "42", "level": 3})
    assert turns(sample) == [Q] and sample.extras == {"solution": "42", "level": 3}
    sample = read({"question": "q", "answer": "42", "level": 3})
    assert sample.extras["answer"] == "42" and sample.extras["level"] == 3


def test_embedding_groups():
    row = {"messages": [Q], "positive_messages": [[A]], "negative_messages": [[B], [B]]}
    sample = read(row)
    assert sample.positives == ((A,),) and sample.negatives == ((B,), (B,))


def test_per_message_loss_and_template_variables():
    row = {
        "messages": [Q, {**A, "loss": False}, Q, {**A, "loss_scale": 0.5}],
        "chat_template_kwargs": {"enable_thinking": False},
        "channel": "c",
    }
    sample = read(row)
    assert sample.messages[1]["loss"] is False and sample.messages[3]["loss_scale"] == 0.5
    assert sample.template_kwargs == {"enable_thinking": False} and sample.extras == {"channel": "c"}


def test_media_are_matched_with_tags_or_put_first(tmp_path):
    (tmp_path / "1.png").touch()
    row = {
        "messages": [{"role": "user", "content": "<image>what is it, and <image>?"}, A],
        "images": ["1.png", "https://x/2.png"],
    }
    assert read(row, folder=tmp_path).images == (str(tmp_path / "1.png"), "https://x/2.png")
    sample = read({"query": "q", "response": "a", "image": "data:image/png;base64,AA"})
    assert sample.messages[0]["content"] == "<image>q" and sample.images == ("data:image/png;base64,AA",)
    video = read({"query": "<video>q", "response": "a", "videos": [[b"1", b"2"]], "audios": None})
    assert video.videos == ([b"1", b"2"],)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"type": "image_url", "image_url": {"url": "https://x/1.png"}}, "https://x/1.png"),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}},
            "data:image/png;base64,AA",
        ),
        ({"type": "image", "source": {"type": "url", "url": "https://x/1.png"}}, "https://x/1.png"),
        ({"type": "image", "image": b"\x89PNG"}, b"\x89PNG"),
    ],
)
def test_media_blocks_become_tags(block, expected):
    sample = read({"messages": [{"role": "user", "content": [block, {"type": "text", "text": "q"}]}, A]})
    assert sample.messages[0]["content"] == "<image>q" and sample.images == (expected,)


def test_grounding_objects_are_kept():
    objects = {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}
    assert read({"messages": [Q, A], "objects": objects}).extras == {"objects": objects}
