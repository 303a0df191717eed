"""Answers of visual question answering: when two are the same, and what one is worth beside those of humans.

Comparison and accuracy are those of the official VQA evaluator (Goyal et al., arXiv 1612.00837), quirks included.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The evaluator means "a period that is not in a number", but its look-behind is written as a look-ahead that always
# holds. It also passes re.UNICODE where the number of replacements belongs, which is 32.
PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = int(re.UNICODE)
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
# Restored where one apostrophe is missing. Those whose bare form is another word (we'll, it's, she'd) are not on the
# evaluator's list.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTED.split() for i in range(len(word)) if word[i] == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the evaluator


class Answers(NamedTuple):
    """What humans answered to one question."""

    question_id: int
    most_common: str
    scores: dict[str, float]  # the accuracy of each answer that a human gave

    @classmethod
    def of(cls, question_id: int, most_common: str, answers: Sequence[str]) -> Answers:
        """From N human answers; all are kept in the form in which the evaluator compares them."""
        (most_common,) = as_compared([most_common], answers)
        matches = Counter(as_compared(answers, answers))
        scores = {answer: mean_of_sets(count, len(answers)) for answer, count in matches.items()}
        return cls(question_id, most_common, {answer: score for answer, score in scores.items() if score > 0})


def normalise(answer: str) -> str:
    """An answer as the official evaluator compares it (processPunctuation, then processDigitArticle)."""
    text = answer
    has_number = COMMA_IN_NUMBER.search(answer) is not None
    for character in PUNCTUATION:
        beside_space = character + " " in answer or " " + character in answer
        text = text.replace(character, "" if beside_space or has_number else " ")
    text = PERIOD.sub("", text, count=MAX_PERIODS)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def as_compared(texts: Iterable[str], answers: Sequence[str]) -> list[str]:
    """`texts` as the evaluator compares them with `answers`: normalised only where those differ in a letter."""

    def stripped(several: Iterable[str]) -> list[str]:
        return [text.replace("\n", " ").replace("\t", " ").strip() for text in several]

    return [normalise(text) if len(set(stripped(answers))) > 1 else text for text in stripped(texts)]


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy of an answer given N human ones: the mean over the N sets of N - 1 of min(1, matches / 3)."""
    prediction, *answers = as_compared([prediction, *answers], answers)
    return mean_of_sets(answers.count(prediction), len(answers))


def mean_of_sets(matches: int, total: int) -> float:
    """The mean of min(1, matches / 3) over the sets that leave one of `total` answers out."""
    # A set without one of the matching answers has one match less.
    return (matches * min(1, (matches - 1) / 3) + (total - matches) * min(1, matches / 3)) / total
