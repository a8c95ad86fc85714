"""The chat templates that public models ship, as TRL 1.16 keeps them to the byte: ids are the tokenizer's own, masks TRL's.

TRL has each original beside a copy in which it marked what the assistant generates; that copy is a second source for masks.
"""

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
import trl

from megaswift.config.data import DataConfig
from megaswift.data.agent_format import FORMATS, check_agent_format
from megaswift.data.sample import Sample
from megaswift.data.template import Template
from megaswift.errors import DataError
from tests.unit.small_tokenizers import assistant, small_tokenizer, system, user

FOLDER = Path(trl.__file__).parent / "chat_templates"
ORIGINALS = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
MARKED = sorted(path.stem.removesuffix("_training") for path in FOLDER.glob("*_training.jinja"))
SPECIAL = re.compile(
    r"<[|\uff5c][^<>\n'\"{}]*[|\uff5c]>|<(?:start|end)_of_\w+>|</?s>|<turn\|>|<\|turn>|\[/?[A-Z_]+\]"
)
STOPS = ("end", "eot", "return")  # in the names of tokens that end a turn
ROUNDS = [user("What is one?"), assistant("First answer"), user("And two?"), assistant("Second answer")]
TAKES_NO_SYSTEM = ("gemma", "cohere2", "muse_glimmer")


def template_of(name: str) -> Template:
    text = (FOLDER / f"{name}.jinja").read_text("utf-8")
    special = sorted(set(SPECIAL.findall(text)))
    tokenizer = small_tokenizer(text, special=special, bos="<s>", eos="</s>")
    stops = [token for token in special if any(word in token.lower() for word in STOPS)]
    return Template(tokenizer, stop_ids=tokenizer.convert_tokens_to_ids(stops))


def blocks_of(template: Template, messages):
    if not template._reads_blocks:
        return messages
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def encoded(template: Template, messages):
    (one,) = template.encode(Sample(source="t:1", messages=tuple(messages)))
    return one


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("qwen2_5", {"hermes"}),
        ("qwen3", {"hermes"}),
        ("qwen3_5_think", {"qwen3_coder", "qwen3_5"}),
        ("glm4moe", {"glm4_5"}),
        ("llama3_1", set()),
        ("gemma", set()),
    ],
)
def test_the_format_of_tools_is_told(name, formats):
    found = set()
    for asked in FORMATS:
        with contextlib.suppress(DataError):
            check_agent_format(asked, (FOLDER / f"{name}.jinja").read_text("utf-8"), model=name)
            found.add(asked)
    assert found == formats


def test_a_run_that_asks_for_another_format_is_refused():
    tokenizer = template_of("qwen3").tokenizer
    Template.from_config(DataConfig(agent_template="hermes"), tokenizer, max_length=None)
    with pytest.raises(
        DataError, match=r"agent_template=glm4_5: the chat template of .* does not write tools so"
    ):
        Template.from_config(DataConfig(agent_template="glm4_5"), tokenizer, max_length=None)


def test_there_are_templates_of_at_least_25_public_models():
    assert len(ORIGINALS) >= 25


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_ids_are_those_of_apply_chat_template(name):
    template = template_of(name)
    conversations = [
        ROUNDS,
        ROUNDS[:2],
        [user(" blanks\n"), assistant("n\u00e9e \u4f60\u597d \U0001f642\n\nx")],
    ]
    if name not in TAKES_NO_SYSTEM:
        conversations.append([system("Be brief."), *ROUNDS])
    for messages in conversations:
        found = encoded(template, messages)
        expected = template.tokenizer.apply_chat_template(blocks_of(template, messages))["input_ids"]
        assert found.input_ids.tolist() == expected
        trained = template.tokenizer.decode(found.input_ids[found.loss_weights > 0].tolist())
        asked = template.tokenizer.decode(found.input_ids[found.loss_weights == 0].tolist())
        for message in messages:
            inside, outside = (trained, asked) if message["role"] == "assistant" else (asked, trained)
            assert message["content"].strip() in inside and message["content"].strip() not in outside


@pytest.mark.parametrize("name", MARKED)
def test_what_is_trained_lies_within_the_marks_and_leaves_out_no_answer(name):
    template = template_of(name)
    found = encoded(template, ROUNDS)
    marked = template.tokenizer.apply_chat_template(
        blocks_of(template, ROUNDS), chat_template=(FOLDER / f"{name}_training.jinja").read_text("utf-8"),
        return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    if marked["input_ids"] != found.input_ids.tolist():
        changed = "GLM-4.5 with an end, Qwen3 with the thinking of earlier turns"
        pytest.skip(f"the marked copy renders other text than the model's own template ({changed})")
    ours, theirs = found.loss_weights > 0, np.array(marked["assistant_masks"]) > 0
    assert not (ours & ~theirs).any()
    # TRL marks the prompt's header in some, and the line break or the tokens after the end of a turn in others.
    rest = template.tokenizer.decode(found.input_ids[theirs & ~ours].tolist())
    assert "answer" not in rest and ours.sum() >= 4
