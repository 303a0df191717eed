"""What masks need beyond parts of speech: collocations, word lists and scores of words, in one file beside the shards.

Made once from the captions and the user's files, before the parts are handed out; then a pure function of a caption's
words, so that every process and every resumed build gives the same bits. Validation shards take the training build's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from posmask.prep import collocations, tagging, word_lists
from posmask.prep.pos import BITS
from posmask.prep.shards import write_atomically
from posmask.prep.wordpiece import CaptionEncoder

FILE = "units.json"
SCORES = ("concreteness", "difference")  # in the order of the column
NUM_ANCHORS = 20
BATCH_CAPTIONS = 1024
HASHED_BYTES = 1 << 20


@dataclass(frozen=True)
class Units:
    """The content of units.json; None: the build had no such list."""

    collocations: tuple[str, ...]  # words joined by a space
    objects: tuple[str, ...] | None
    attributes: tuple[str, ...]
    relations: tuple[str, ...] | None
    anchors: tuple[str, ...]  # of "difference"
    scores: dict[str, dict[str, int]]  # by name in SCORES, 1 to 255 by word

    @classmethod
    def load(cls, path: Path) -> Units:
        """Read a file that `save` wrote. Raises ValueError for any other."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            lists = {name: values[name] and tuple(values[name]) for name in _names(cls) if name != "scores"}
            return cls(**lists, scores={name: values["scores"][name] for name in SCORES if name in values["scores"]})
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is missing or no {FILE} of a build; name a folder of shards") from None

    def save(self, path: Path) -> None:
        """Write `path` atomically."""
        write_atomically(path, json.dumps(asdict(self), ensure_ascii=False, indent=0) + "\n")

    @cached_property
    def word_lists(self) -> tagging.WordLists:
        """The lists as the tagger's bits need them."""
        objects, relations = (None if words is None else frozenset(words) for words in (self.objects, self.relations))
        return tagging.WordLists(objects, frozenset(self.attributes), relations)

    @cached_property
    def _collocations(self) -> frozenset[str]:
        return frozenset(self.collocations)

    def starts(self, words: Sequence[str]) -> list[bool]:
        """For each of a caption's words whether it begins a collocation or is in none."""
        return collocations.collocation_starts(words, self._collocations)

    def score_rows(self, words: Sequence[str]) -> np.ndarray:
        """(W, S) uint8: the scores of a caption's W words, 0 for a word without."""
        rows = [[scores.get(word, 0) for scores in self.scores.values()] for word in words]
        return np.array(rows, np.uint8).reshape(len(words), len(self.scores))


@dataclass(frozen=True)
class Resources:
    """Where units come from: `units`, a finished build or its file, or else the captions and the other files.

    Raises ValueError for combinations that make no sense.
    """

    units: Path | None = None
    objects: Path | None = None
    attributes: Path | None = None
    relations: Path | None = None
    concreteness: Path | None = None
    frequencies: Path | None = None
    embeddings: Path | None = None
    collocations: int | None = None

    def __post_init__(self) -> None:
        others = [name for name in _names(type(self))[1:] if getattr(self, name) is not None]
        if self.units and others:
            raise ValueError(f"--units {self.units} brings its own lists and scores; leave out --{others[0]}")
        if self.embeddings and not self.frequencies:
            raise ValueError(
                f"--embeddings {self.embeddings} needs --frequencies: the words near those that are frequent here and "
                "rare in general text are scored"
            )

    @classmethod
    def named(cls, flags: dict[str, Any]) -> Resources:
        """From flags, of which others are ignored."""
        paths = {name: Path(flags[name]) for name in _names(cls)[:-1] if flags[name] is not None}
        return cls(**paths, collocations=flags["collocations"])

    def contents(self, tagger: Path, entities: bool) -> tuple[list[str], list[str]]:
        """The names of the bits (pos.BITS) and of the scores (SCORES) that shards of these units hold.

        Phrases, and objects without a list, come from noun chunks.
        """
        has_chunks = tagging.has_noun_chunks(tagger)
        if entities:
            tagging.check_entities(tagger)
        if self.units:
            units = Units.load(_file(self.units))
            has_objects, scores = units.objects is not None, list(units.scores)
        else:
            given = {"concreteness": self.concreteness, "difference": self.frequencies}
            has_objects, scores = self.objects is not None, [name for name in SCORES if given[name]]
        there = {"phrase_start": has_chunks or entities, "object": has_chunks or has_objects}
        return [name for name in BITS if there.get(name, True)], scores

    def describe(self) -> dict[str, str | int | None]:
        """The flags with a sha256 for each file, so that a changed file means another build."""
        values = {name: getattr(self, name) for name in _names(type(self))}
        return {name: _sha256(v, f"--{name}") if isinstance(v, Path) else v for name, v in values.items()}

    def check(self, tagger: Path) -> None:
        """Read every file once. Raises ValueError for what could not be used; the tagger may have to have vectors."""
        self._lists()
        if self.embeddings:
            word_lists.read_vectors(self.embeddings, "--embeddings", ())
        elif self.frequencies and not tagging.has_vectors(tagger):
            raise ValueError(
                f"--frequencies {self.frequencies} needs word vectors, and the tagger {tagger.name} has none; add "
                "--embeddings FILE, or name a --tagger with vectors, such as en_core_web_md"
            )

    def make(self, captions: Iterable[str], encode: CaptionEncoder, tagger: Path) -> Units:
        """The units of a corpus; `captions` is read unless --units has them."""
        if self.units:
            return Units.load(_file(self.units))
        corpus = collocations.Corpus.read(_words(captions, encode))
        lists, scores, frequencies = self._lists()
        anchors: list[str] = []
        if frequencies:
            counts = corpus.counts()
            nlp = tagging.load_tagger(tagger)
            if self.embeddings:
                vectors = word_lists.read_vectors(self.embeddings, "--embeddings", counts)
            else:
                known = (nlp.vocab[word] for word in counts)
                vectors = {entry.text: entry.vector.astype(np.float64) for entry in known if entry.has_vector}
            vectors = {word: vector for word, vector in vectors.items() if vector.any()}
            content = {w: n for w, n in counts.items() if w in vectors and w.isalpha() and not nlp.vocab[w].is_stop}
            anchors = find_anchors(content, frequencies)
            scores["difference"] = word_lists.similarity_scores(vectors, anchors)
        found = collocations.vocabulary(corpus, self.collocations)
        return Units(collocations=tuple(found), anchors=tuple(anchors), scores=scores, **lists)

    def _lists(self) -> tuple[dict[str, tuple[str, ...] | None], dict[str, dict[str, int]], dict[str, float]]:
        """The lists of words, the scores that need no captions, and the general frequencies."""
        lists: dict[str, tuple[str, ...] | None] = {"objects": None, "attributes": (), "relations": None}
        for name in lists:
            if path := getattr(self, name):
                lists[name] = tuple(word_lists.read_list(path, f"--{name}"))
        scores = {}
        if self.concreteness:
            scores["concreteness"] = word_lists.read_concreteness(self.concreteness, "--concreteness")
        frequencies = word_lists.read_frequencies(self.frequencies, "--frequencies") if self.frequencies else {}
        return lists, scores, frequencies


def find_anchors(counts: dict[str, int], general: dict[str, float]) -> list[str]:
    """The NUM_ANCHORS words frequent here and rare in general: the largest TF-ICF, that is
    tf · log(general words / general count).

    Wilf et al., Difference-Masking (EMNLP Findings 2023). A word that the general list lacks counts as seen once in it.
    Raises ValueError when there is no word to choose from.
    """
    if not counts:
        raise ValueError("no word of the captions that is not a stop word has a vector; name other --embeddings")
    num_words, num_general = sum(counts.values()), sum(general.values())

    def tf_icf(word: str) -> float:
        rarity = math.log(max(1.0, num_general / max(1.0, general.get(word, 0.0))))
        return round(counts[word] / num_words * rarity, 12)

    return sorted(counts, key=lambda word: (-tf_icf(word), word))[:NUM_ANCHORS]


def _words(captions: Iterable[str], encode: CaptionEncoder) -> Iterator[list[str]]:
    captions = iter(captions)
    while batch := list(islice(captions, BATCH_CAPTIONS)):
        yield from (encoded.words(caption) for caption, encoded in zip(batch, encode(batch), strict=True))


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _sha256(path: Path, flag: str) -> str:
    digest = sha256()
    try:
        with _file(path).open("rb") as file:
            while block := file.read(HASHED_BYTES):
                digest.update(block)
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}; name a readable file") from None
    return digest.hexdigest()


def _names(kind: Any) -> list[str]:
    return [each.name for each in fields(kind)]
