"""Collocations against a count by hand and against the definition, spelled out with dictionaries."""

import itertools
import math
import random
from collections import Counter

import pytest

from posmask.prep.collocations import MIN_COUNT, SHARES, Corpus, collocation_starts, vocabulary


def n_grams(captions, n):
    for words in captions:
        for i in range(len(words) - n + 1):
            gram = tuple(words[i : i + n])
            if all(any(c.isalnum() for c in word) for word in gram):
                yield gram


def segmentations(gram):
    """All ways to cut `gram` into two parts or more."""
    for cuts in itertools.product([False, True], repeat=len(gram) - 1):
        if any(cuts):
            borders = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(gram)]
            yield [gram[a:b] for a, b in itertools.pairwise(borders)]


def by_definition(captions):
    """{n: [(score, n-gram)]} of all n-grams that are frequent enough."""
    counts = {n: Counter(n_grams(captions, n)) for n in range(1, 6)}
    totals = {n: sum(counts[n].values()) for n in counts}

    def log_p(gram):
        return math.log(counts[len(gram)][gram] / totals[len(gram)])

    return {
        n: [
            (min(2 * log_p(gram) - sum(map(log_p, parts)) for parts in segmentations(gram)), " ".join(gram))
            for gram, count in counts[n].items()
            if count > MIN_COUNT
        ]
        for n in SHARES
    }


def random_captions(seed, num_captions=400):
    rng = random.Random(seed)
    words = [*"abcdefgh", ",", "."]
    weights = [1 / (i + 1) for i in range(len(words))]
    return [rng.choices(words, weights, k=rng.randint(0, 9)) for _ in range(num_captions)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 8, 40, 100_000])
def test_the_best_of_each_length_by_definition(seed, size):
    captions = random_captions(seed)
    found = vocabulary(Corpus.read(captions), size)
    for n, share in SHARES.items():
        ours = [gram for gram in found if len(gram.split()) == n]
        scores = {gram: score for score, gram in by_definition(captions)[n]}
        best = sorted(scores.values(), reverse=True)[: int(size * share)]
        assert [scores[gram] for gram in ours] == pytest.approx(best, abs=1e-8)
    assert len(set(found)) == len(found)


def test_a_count_by_hand():
    # "hot dog" 12 times, each word nowhere else; "a b" 10 times is too rare.
    captions = [["hot", "dog", "."]] * 12 + [["a", "b"]] * 10 + [["c"]] * 20
    assert vocabulary(Corpus.read(captions), 100) == ["hot dog"]
    # p(hot dog) = 12/22 of the pairs, p(hot) = p(dog) = 12/64 of the words.
    assert by_definition(captions)[2] == [(pytest.approx(2 * math.log(12 / 22) - 2 * math.log(12 / 64)), "hot dog")]


def test_nothing_reaches_across_punctuation_or_captions():
    captions = [["red", ",", "cat"], ["cat", "red"]] * 30
    assert vocabulary(Corpus.read(captions), 1000) == ["cat red"]


@pytest.mark.parametrize("seed", range(3))
def test_by_default_about_half_of_the_words_are_in_a_collocation(seed):
    captions = random_captions(seed, 1500)
    known = set(vocabulary(Corpus.read(captions)))

    def share_in(known):
        inside = total = 0
        for words in captions:
            covered = set()
            for n in SHARES:
                for i in range(len(words) - n + 1):
                    covered |= set(range(i, i + n)) if " ".join(words[i : i + n]) in known else set()
            inside += len(covered)
            total += sum(any(c.isalnum() for c in word) for word in words)
        return inside / total

    assert 0.5 <= share_in(known) < 0.75  # few kinds of words here, so one more n-gram covers much
    smaller = set(vocabulary(Corpus.read(captions), 2))
    assert len(smaller) < len(known)
    assert share_in(smaller) < 0.5


@pytest.mark.parametrize("captions", [[], [[]], [["."]], [["once", "only"]]])
def test_without_regularity_there_is_none(captions):
    corpus = Corpus.read(captions)
    assert vocabulary(corpus) == vocabulary(corpus, 10) == []


def starts(text, *known):
    words = text.split()
    marked = zip(words, collocation_starts(words, known), strict=True)
    return " ".join(word.upper() if start else word for word, start in marked)


def test_the_longest_match_wins_then_the_leftmost():
    assert starts("a b c d", "b c", "a b") == "A b C D"
    assert starts("a b c d", "a b", "b c d") == "A B c d"
    assert starts("a b c d e f", "a b c d e", "e f", "b c") == "A b c d e F"
    assert starts("a b a b", "a b") == "A b A b"
    assert starts("a b c") == "A B C"
    assert starts("") == ""


def test_words_are_counted_in_order_of_appearance():
    assert list(Corpus.read([["b", "a"], ["b", "."]]).counts().items()) == [("b", 2), ("a", 1)]
