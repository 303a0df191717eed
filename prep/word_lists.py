"""Read what a user brings about single words: lists, ratings, counts, vectors.

All functions raise ValueError with the file, the line, the rule and the remedy. Words are compared in lower case.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

CONCRETENESS_COLUMNS = ("Word", "Conc.M")  # of Brysbaert et al. 2014
MIN_CONCRETENESS, MAX_CONCRETENESS = 1.0, 5.0


def read_list(path: Path, flag: str) -> list[str]:
    """One word a line. A line of several words is refused: the masks choose single words."""
    words = set()
    for number, line in _lines(path, flag):
        if len(line.split()) != 1:
            raise ValueError(f"{flag} {path}, line {number}: {line.strip()!r} is not a single word; give one a line")
        words.add(line.strip().lower())
    return sorted(_some(words, path, flag))


def read_concreteness(path: Path, flag: str) -> dict[str, int]:
    """Ratings of 1 to 5 as 1 to 255: Brysbaert's table (Word, Conc.M; tabs or commas) or lines of word, tab, number."""
    lines = _lines(path, flag)
    _, header = next(lines, (0, ""))
    delimiter = "\t" if "\t" in header else ","
    columns = next(csv.reader([header], delimiter=delimiter), [])
    if all(name in columns for name in CONCRETENESS_COLUMNS):
        word_at, rating_at = map(columns.index, CONCRETENESS_COLUMNS)
    elif len(columns) == 2:
        word_at, rating_at = 0, 1
        lines = _lines(path, flag)
    else:
        raise ValueError(
            f"{flag} {path}: expected a header with the columns {' and '.join(CONCRETENESS_COLUMNS)}, or lines of a "
            "word, a tab and a number"
        )
    scores: dict[str, int] = {}
    for number, line in lines:
        row = next(csv.reader([line], delimiter=delimiter))
        if len(row) <= max(word_at, rating_at):
            raise ValueError(f"{flag} {path}, line {number}: {len(row)} columns, expected {len(columns)}")
        word, rating = row[word_at].strip().lower(), _number(row[rating_at], path, flag, number)
        if not MIN_CONCRETENESS <= rating <= MAX_CONCRETENESS:
            raise ValueError(f"{flag} {path}, line {number}: {rating:g} is not within 1 to 5, the scale of the ratings")
        if " " not in word:  # the table rates some two-word expressions, too
            scores.setdefault(word, _level((rating - MIN_CONCRETENESS) / (MAX_CONCRETENESS - MIN_CONCRETENESS)))
    return _some(scores, path, flag)


def read_frequencies(path: Path, flag: str) -> dict[str, float]:
    """How often words occur in general text: lines of a word, a tab or spaces, and a count."""
    counts: dict[str, float] = {}
    for number, line in _lines(path, flag):
        parts = line.split()
        if len(parts) != 2:
            raise ValueError(f"{flag} {path}, line {number}: expected a word and its count, found {line.strip()!r}")
        count = _number(parts[1], path, flag, number)
        if count < 0:
            raise ValueError(f"{flag} {path}, line {number}: the count {count:g} is negative")
        counts[parts[0].lower()] = counts.get(parts[0].lower(), 0.0) + count
    return _some(counts, path, flag)


def read_vectors(path: Path, flag: str, wanted: Collection[str]) -> dict[str, np.ndarray]:
    """The vectors (D,) float64 of the `wanted` words: the text format of GloVe, or word2vec's with its first line.

    The whole file is checked, whatever is wanted. Of several spellings of a word, the lower-case one counts.
    """
    vectors: dict[str, np.ndarray] = {}
    dimensions = 0
    for number, line in _lines(path, flag):
        if number == 1 and len(line.split()) == 2:
            continue  # word2vec: how many words, how many dimensions
        dimensions = dimensions or len(line.split()) - 1
        parts = line.rstrip().rsplit(" ", dimensions)  # from the right: some words of GloVe hold spaces
        if dimensions < 2 or len(parts) != dimensions + 1:
            raise ValueError(
                f"{flag} {path}, line {number}: expected a word and {max(dimensions, 2)} numbers with one space between"
            )
        word = parts[0].lower()
        if word in wanted and (word not in vectors or parts[0] == word):
            vectors[word] = np.array([_number(part, path, flag, number) for part in parts[1:]])
    if not dimensions:
        raise ValueError(f"{flag} {path} holds no vector")
    return vectors


def similarity_scores(vectors: dict[str, np.ndarray], anchors: Collection[str]) -> dict[str, int]:
    """The largest cosine of each word to an anchor, -1 to 1 as 1 to 255. No vector may be zero."""
    directions = {word: vector / np.linalg.norm(vector) for word, vector in vectors.items()}
    targets = np.array([directions[anchor] for anchor in anchors])  # (A, D)
    return {word: _level((float((targets @ vector).max()) + 1) / 2) for word, vector in directions.items()}


def _level(share: float) -> int:
    """0 to 1 as 1 to 255; 0 is kept for words without a score."""
    return 1 + round(min(1.0, max(0.0, share)) * 254)


def _lines(path: Path, flag: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, numbered from 1. Read as they come: vectors take gigabytes."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror or error}; name a readable file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path} is not UTF-8 text ({error.reason}); convert it") from None


def _number(text: str, path: Path, flag: str, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{flag} {path}, line {line}: {text.strip()!r} is not a number")
    return value


def _some(values, path: Path, flag: str):
    if not values:
        raise ValueError(f"{flag} {path} holds no word; leave the flag out, or name another file")
    return values
