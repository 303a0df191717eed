"""Collocations: the word n-grams of a corpus that occur together more than their parts explain.

PMI masking (Levine et al., ICLR 2021, with the score of github.com/AI21Labs/pmi-masking) hides them as one unit.
Counted with numpy over the whole corpus at once; a pure function of the captions and their order.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MIN_COUNT = 10  # n-grams that occur no more often are no collocations
SHARES = {2: 0.5, 3: 0.25, 4: 0.125, 5: 0.125}  # of the vocabulary, by number of words
COVERAGE = 0.5  # of the words, at the default size: the authors chose theirs such that about half are in a collocation
MAX_CORPUS_WORDS = 1 << 25  # bounds the memory (some 2 GB); about three million captions


@dataclass(frozen=True)
class Corpus:
    """The words of N - C captions laid end to end, as numbers; 0 stands for punctuation and ends each of C captions."""

    ids: np.ndarray  # (N,) int32
    words: list[str]  # by number; words[0] is ""

    @classmethod
    def read(cls, captions: Iterable[Sequence[str]]) -> Corpus:
        """Number the words of `captions`, the first `MAX_CORPUS_WORDS` of them at most."""
        numbers = {"": 0}
        ids = array("i")
        for words in captions:
            for word in words:
                # No n-gram reaches across punctuation: "bear ." would be a strong one, and means nothing.
                ids.append(numbers.setdefault(word, len(numbers)) if any(map(str.isalnum, word)) else 0)
            ids.append(0)
            if len(ids) >= MAX_CORPUS_WORDS:
                break
        return cls(np.array(ids, np.int32), list(numbers))

    def counts(self) -> dict[str, int]:
        """How often each word occurs, in order of first appearance."""
        counts = np.bincount(self.ids, minlength=len(self.words))
        return dict(zip(self.words[1:], counts[1:].tolist(), strict=True))


@dataclass(frozen=True)
class _Level:
    """The G frequent n-grams of one length."""

    at: np.ndarray  # (N,) int32, the number of the n-gram that begins at each place, -1: none that is frequent
    first: np.ndarray  # (G,) where each occurs first
    log_p: np.ndarray  # (G,) log of its share of all n-grams of this length
    best: np.ndarray  # (G,) the largest log ∏ p(s) over its segmentations, itself included
    rank: np.ndarray  # (G,) place by falling score


def vocabulary(corpus: Corpus, size: int | None = None) -> list[str]:
    """The collocations of `corpus`, words joined by a space; `size` of them, or such that half of the words are in one.

    Score of w1..wn = min over its segmentations into parts s of log p(w1..wn)² / ∏ p(s); the best of each length by
    SHARES, fewer where a length has no more.
    """
    levels = [_count(corpus.ids, None, [])]
    for _ in SHARES:
        levels.append(_count(corpus.ids, levels[-1], levels))
    if size is None:
        size = _size_that_covers(corpus.ids, levels)
    chosen = []
    for n, share in SHARES.items():
        level = levels[n - 1]
        for number in np.argsort(level.rank)[: int(size * share)]:
            first = level.first[number]
            chosen.append(" ".join(corpus.words[i] for i in corpus.ids[first : first + n]))
    return chosen


def _count(ids: np.ndarray, shorter: _Level | None, levels: Sequence[_Level]) -> _Level:
    """The frequent n-grams of one more word than those of `shorter`; None: the frequent words."""
    n = len(levels) + 1
    if shorter is None:
        valid, key = ids > 0, ids.astype(np.int64)
    else:
        # An n-gram is a pair of overlapping shorter ones, and frequent only if both are.
        left, right = shorter.at[:-1], shorter.at[1:]
        valid, key = (left >= 0) & (right >= 0), left.astype(np.int64) * len(shorter.first) + right
    _, inverse, counts = np.unique(key[valid], return_inverse=True, return_counts=True)
    frequent = counts > MIN_COUNT
    at = np.full(len(ids), -1, np.int32)
    at[np.flatnonzero(valid)] = np.where(frequent, np.cumsum(frequent) - 1, -1)[inverse.reshape(-1)]
    first = np.zeros(int(frequent.sum()), np.int64)
    places = np.flatnonzero(at >= 0)[::-1]
    first[at[places]] = places  # the last assignment, that of the first place, stays
    inside = np.convolve(ids > 0, np.ones(n, np.int64), "valid") == n if len(ids) >= n else np.zeros(0, bool)
    log_p = np.log(counts[frequent] / max(1, np.count_nonzero(inside)))
    if shorter is None:
        return _Level(at, first, log_p, log_p, np.arange(len(first)))
    split = np.full(len(first), -np.inf)
    for k in range(1, n):
        head, tail = levels[k - 1], levels[n - k - 1]
        np.maximum(split, head.best[head.at[first]] + tail.best[tail.at[first + k]], out=split)
    # Rounded, so that the last bit of a logarithm, which differs between machines, orders nothing.
    order = np.lexsort((first, -np.round(2 * log_p - split, 9)))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return _Level(at, first, log_p, np.maximum(log_p, split), rank)


def _size_that_covers(ids: np.ndarray, levels: Sequence[_Level]) -> int:
    """The smallest vocabulary that has n-grams over COVERAGE of the words; all n-grams if those are not enough."""
    needed = np.full(len(ids), np.inf)  # the size of vocabulary from which on a word is in an n-gram of it
    largest = 0.0
    for n, share in SHARES.items():
        level = levels[n - 1]
        sizes = np.append(np.ceil((level.rank + 1) / share), np.inf)[level.at]  # at -1: the last, infinity
        for offset in range(n):
            np.minimum(needed[offset:], sizes[: max(0, len(ids) - offset)], out=needed[offset:])
        largest = max(largest, len(level.first) / share)
    words = np.sort(needed[ids > 0])
    size = words[int(len(words) * COVERAGE)] if len(words) else 0.0
    return int(min(size, largest))


def collocation_starts(words: Sequence[str], known: Collection[str]) -> list[bool]:
    """For each of a caption's words whether it begins a unit: a collocation in `known`, or a word in none.

    The longest are taken first, of equal ones the leftmost; two never overlap.
    """
    starts, taken = [True] * len(words), [False] * len(words)
    for n in sorted(SHARES, reverse=True) if known else ():
        for i in range(len(words) - n + 1):
            span = slice(i, i + n)
            if not any(taken[span]) and " ".join(words[span]) in known:
                taken[span] = [True] * n
                starts[i + 1 : i + n] = [False] * (n - 1)
    return starts
