"""Questions: conversations up to the assistant's last answer, with that answer, which a generated one is compared with."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaswift.config.data import DataConfig
from megaswift.data.encode import EncodedSet, encode_samples
from megaswift.data.forms import PROMPTS, asked_of
from megaswift.data.sample import RowError, Sample
from megaswift.data.template import Template

ENCODED, ANSWERS = "prompts", "answers.json"


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Entry i of `prompts` is to be answered like answers[i], which comes from sources[i] ("file:line")."""

    prompts: EncodedSet
    sources: tuple[str, ...]
    answers: tuple[str, ...]

    def first(self, count: int) -> "Questions":
        """Return the first ones."""
        rows = np.arange(min(count, len(self.prompts)))
        return Questions(
            prompts=self.prompts.take(rows), sources=self.sources[:count], answers=self.answers[:count]
        )

    def save(self, folder: Path) -> None:
        """Write them in place of what an earlier run left in `folder`."""
        self.prompts.save(folder / ENCODED)
        (folder / ANSWERS).write_text(json.dumps([self.sources, self.answers]), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Questions":
        """Open what save() wrote."""
        sources, answers = json.loads((folder / ANSWERS).read_text(encoding="utf-8"))
        return cls(prompts=EncodedSet.load(folder / ENCODED), sources=tuple(sources), answers=tuple(answers))


def questions_of(samples: Sequence[Sample], template: Template, config: DataConfig) -> Questions:
    """Return the questions of rows; those without an answer in words, or with a prompt that is too long, are reported and left out.

    Raises DataError where none is left.
    """
    prompts, _ = encode_samples(
        samples,
        template,
        form=QUESTIONS,
        processes=config.dataset_num_proc,
        strict=config.strict,
        what="prompts of the validation rows",
    )
    kept = [samples[row] for row in prompts.samples.tolist()]
    return Questions(
        prompts=prompts,
        sources=tuple(one.source for one in kept),
        answers=tuple(_answer(one) for one in kept),
    )


def _question(sample: Sample) -> tuple[Sample, ...]:
    prompt = PROMPTS.documents(sample)
    _answer(sample)
    return prompt


def _answer(sample: Sample) -> str:
    """Return what the assistant says last. Raises RowError."""
    turns = sample.messages[len(asked_of(sample.messages)) :]
    for key in ("reasoning_content", "thinking", "tool_calls"):
        if any(turn.get(key) for turn in turns):
            raise RowError("no answer", f"the answer has {key}, and texts alone are compared")
    text = "\n".join(turn["content"] for turn in turns)
    if not text.strip():
        raise RowError("no answer", "the conversation does not end with an answer to compare")
    return text


QUESTIONS = dataclasses.replace(PROMPTS, name="questions", documents=_question)
