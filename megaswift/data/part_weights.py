"""Weights of parts of answers, which --loss_scale names: what agents call and are told, and thinking that is none.

Names and weights: ms-swift 4.6 (swift/loss_scale/config); weights of labelled steps: Li et al. 2023, ModelScope-Agent
(arXiv 2309.00986), weighted language modelling of tool calls. Several rules multiply.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest

import numpy as np

# rule -> what it looks for, and its weight
MATCHED: dict[str, tuple[re.Pattern[str], float]] = {
    # What Qwen3 puts before an answer that it did not think about
    "ignore_empty_think": (re.compile(r"<think>\s*</think>\s*"), 0.0),
    "ignore_think_prefix": (re.compile(r"\A<think>\n?"), 0.0),
    "hermes": (re.compile(r"<tool_call>.+?</tool_call>", re.DOTALL), 2.0),
}
# rule -> label -> weight of the label, and of what follows it up to the next label
STEPS = {
    "Action:": (2.0, 2.0),
    "Action Input:": (2.0, 2.0),
    "Thought:": (1.0, 1.0),
    "Final Answer:": (1.0, 1.0),
    "Observation:": (2.0, 0.0),
}
LABELLED: dict[str, dict[str, tuple[float, float]]] = {
    "react": STEPS,
    "alpha_umi": {**STEPS, "Next:": (2.0, 2.0)},
    "qwen": {
        "✿FUNCTION✿:": (2.0, 2.0),
        "✿ARGS✿:": (2.0, 2.0),
        "✿RETURN✿:": (1.0, 1.0),
        "✿RESULT✿:": (2.0, 0.0),
    },
}


def weighted_parts(answer: str, rules: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """Yield (start, end, weight) of the parts of an answer, which follow each other from its beginning to its end."""
    weights_C = np.ones(len(answer))  # of characters
    for rule in rules:
        for start, end, weight in _matches(answer, rule) if rule in MATCHED else _steps(answer, rule):
            weights_C[start:end] *= weight
    edges = [0, *(np.flatnonzero(np.diff(weights_C)) + 1).tolist(), len(answer)]
    for start, end in pairwise(edges):
        if start < end:
            yield start, end, float(weights_C[start])


def _matches(answer: str, rule: str) -> Iterator[tuple[int, int, float]]:
    pattern, weight = MATCHED[rule]
    for match in pattern.finditer(answer):
        yield *match.span(), weight


def _steps(answer: str, rule: str) -> Iterator[tuple[int, int, float]]:
    labels = LABELLED[rule]
    starts = list(re.finditer("|".join(map(re.escape, labels)), answer))
    for step, following in zip_longest(starts, starts[1:]):
        end = following.start() if following else len(answer)
        own, rest = labels[step.group()]
        yield *step.span(), own
        yield step.end(), end, rest
