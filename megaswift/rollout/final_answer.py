"""What an answer ends up saying, and whether two say the same."""

import re

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def final_answer(text: str) -> str:
    """Return what a text ends up saying."""
    for pattern in (ANSWER, BOXED):
        marked = pattern.findall(text)
        if marked:
            text = marked[-1]
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else text.strip()


def same_answer(given: str, truth: str) -> bool:
    """Whether two answers are the same number, or the same words."""
    numbers = [number_of(answer) for answer in (given, truth)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return given.casefold() == truth.casefold()


def number_of(answer: str) -> float | None:
    """Return the number that an answer is, if it is one."""
    above, _, below = answer.replace(",", "").partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        return None
