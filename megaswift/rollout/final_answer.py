"""What an answer ends up saying, and whether two say the same.

An answer that is marked (<answer>, \\boxed{}) counts as a whole: it is a number only if nothing but a unit stands beside it.
Otherwise the last number of the text is meant, unless that is a part of an expression, which no number stands for.
"""

import re

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
BOXED = "\\boxed{"
FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+|/\d+)?"
FREE_NUMBER = re.compile(rf"(?<![\w\\{{}}^/.]){NUMBER}(?![\w{{^/]|\.\d|\\[A-Za-z])")
ONE_NUMBER = re.compile(rf"[$\s]*({NUMBER})\s*(?:\\?%|\s[A-Za-z]+|\\text\{{[^}}]*\}})?[$\s.]*")


def final_answer(text: str) -> str:
    """Return what a text ends up saying."""
    marked = ANSWER.findall(text)
    boxed = _last_boxed(marked[-1] if marked else text)
    if marked or boxed is not None:
        whole = FRACTION.sub(r"\1/\2", boxed if boxed is not None else marked[-1]).strip()
        number = ONE_NUMBER.fullmatch(whole)
        return number[1] if number else whole
    plain = FRACTION.sub(r"\1/\2", text).strip()
    numbers = list(FREE_NUMBER.finditer(plain))
    if not numbers or re.search(r"\d", plain[numbers[-1].end() :]):
        return plain
    return numbers[-1][0]


def _last_boxed(text: str) -> str | None:
    """Return what the last \\boxed{} holds whose braces are closed."""
    for begin in [found.end() for found in re.finditer(re.escape(BOXED), text)][::-1]:
        depth = 1
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end]
    return None


def same_answer(given: str, truth: str) -> bool:
    """Whether two answers are the same number, or the same words whatever the blanks between them."""
    numbers = [number_of(answer) for answer in (given, truth)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return "".join(given.split()).casefold() == "".join(truth.split()).casefold()


def number_of(answer: str) -> float | None:
    """Return the number that an answer is, if it is one."""
    above, _, below = answer.replace(",", "").partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        return None
