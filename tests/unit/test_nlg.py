"""Scores of generated text: those of ms-swift's formula, and of hand; what the packages stumble over."""

import sys

import jieba
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge import Rouge

from megaswift.rollout.nlg import nlg_scores

PAIRS = [
    ("The cat sat on the mat.", "A cat is sitting on the mat."),
    ("the the the the", "the cat"),
    ("一只猫坐在垫子上。", "猫坐在垫子上面。"),
    ("北京是中国的首都,人口很多", "中国的首都是北京"),
    ("Paris 是法国的首都. It is large.\nYes", "法国的首都是 Paris. 它很大.\nYes"),
    (". .", "a b"),
]


@pytest.mark.parametrize(("text", "wanted"), PAIRS)
def test_scores_are_those_of_ms_swift(text: str, wanted: str) -> None:
    """compute_rouge_bleu of swift/metrics/nlg.py (ms-swift 4.6), of one pair and before the factor of 100."""
    hypothesis, reference = (
        [word.strip(" ") for word in jieba.cut(one) if word.strip(" ")] for one in (text, wanted)
    )
    (rouge,) = Rouge().get_scores(" ".join(hypothesis), " ".join(reference))
    bleu = sentence_bleu([reference], hypothesis, smoothing_function=SmoothingFunction().method3)
    assert nlg_scores(text, wanted) == {**{name: one["f"] for name, one in rouge.items()}, "bleu-4": bleu}


def test_scores_are_what_the_papers_say() -> None:
    found = nlg_scores("a b c d", "a b c")
    assert found is not None
    # 3 of 4 words are right and 3 of 3 found, 2 of 3 pairs and 2 of 2. Of one run of four words none is right: 1 / 2 of it.
    bleu = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    wanted = {"rouge-1": 6 / 7, "rouge-2": 4 / 5, "rouge-l": 6 / 7, "bleu-4": bleu}
    assert found == pytest.approx(wanted, rel=1e-7)  # rouge adds 1e-8 to a denominator


def test_chinese_words_are_told_apart() -> None:
    found = nlg_scores("我爱北京天安门", "我爱上海")  # 我 爱 北京 天安门, 我 爱 上海
    assert found is not None and found["rouge-1"] == pytest.approx(4 / 7, rel=1e-7)


@pytest.mark.parametrize(("text", "wanted"), [("", "a"), ("a", "  "), ("", "")])
def test_texts_without_words_have_no_scores(text: str, wanted: str) -> None:
    assert nlg_scores(text, wanted) is None


@pytest.mark.parametrize(("text", "wanted"), [(".", "a b"), ("...", "a b"), ("a b", ".")])
def test_full_stops_alone_share_nothing(text: str, wanted: str) -> None:
    found = nlg_scores(text, wanted)
    assert found is not None and set(found.values()) == {0.0}


def test_a_long_answer_without_a_full_stop_has_scores() -> None:
    """Of which rouge alone makes more nested calls than Python allows."""
    words, limit = [f"w{number}" for number in range(1100)], sys.getrecursionlimit()
    with pytest.raises(RecursionError):
        Rouge().get_scores(" ".join(words), " ".join(words))
    found = nlg_scores(" ".join(words), " ".join(words))
    assert found == pytest.approx(dict.fromkeys(("rouge-1", "rouge-2", "rouge-l", "bleu-4"), 1.0), rel=1e-7)
    assert sys.getrecursionlimit() == limit
