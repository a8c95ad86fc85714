"""How near a generated text is to the one that was wanted: ROUGE and BLEU over words, as ms-swift 4.6 counts them (swift/metrics/nlg.py).

Words are jieba's, which tells Chinese ones apart; ROUGE-1, -2 and -L are the F1 of the package rouge (Lin 2004, aclanthology.org/W04-1013),
BLEU-4 is nltk's sentence_bleu with smoothing method 3 (Papineni et al. 2002, aclanthology.org/P02-1040; Chen and Cherry 2014,
aclanthology.org/W14-3346).
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

ROUGE = ("rouge-1", "rouge-2", "rouge-l")
SCORES = (*ROUGE, "bleu-4")
MORE_FRAMES = 200  # what rouge needs beside one frame for each word: a handful


def nlg_scores(text: str, wanted: str) -> dict[str, float] | None:
    """Return rouge-1, rouge-2, rouge-l and bleu-4, each from 0 to 1; None where either text has no words."""
    # Optional packages, of which nltk takes half a second.
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge import Rouge

    hypothesis, reference = _words(text), _words(wanted)
    if not hypothesis or not reference:
        return None
    lines = " ".join(hypothesis), " ".join(reference)
    scores = dict.fromkeys(ROUGE, 0.0)
    if all(line.strip(".") for line in lines):  # rouge splits at full stops, and fails where nothing is left
        with _deep_enough(len(hypothesis) + len(reference)):
            (found,) = Rouge().get_scores(*lines)
        scores = {name: float(found[name]["f"]) for name in ROUGE}
    bleu = sentence_bleu([reference], hypothesis, smoothing_function=SmoothingFunction().method3)
    return {**scores, "bleu-4": float(bleu)}


def _words(text: str) -> list[str]:
    import jieba  # optional

    jieba.setLogLevel(logging.WARNING)  # it tells where its dictionary lies
    return [word for word in (one.strip(" ") for one in jieba.cut(text)) if word]


@contextmanager
def _deep_enough(words: int) -> Iterator[None]:
    """Let rouge go as deep as it does for the longest common subsequence of so many words: a frame for each (rouge 1.0.1)."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + words + MORE_FRAMES)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
