"""Records to samples: decode, tokenise, tag, align. A pure function of the records, spread over processes.

Chunks of records are the unit of work. Their borders don't depend on the number of processes, so neither do the bytes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from posmask.prep import pos
from posmask.prep.images import BrokenImage, Jpeg, normalise
from posmask.prep.locations import Unreachable
from posmask.prep.shards import Sample, sample_id
from posmask.prep.sources import OutsideFolder, Record
from posmask.prep.tagging import Token, align, load_tagger, needs_torch, tag
from posmask.prep.units import Units
from posmask.prep.wordpiece import CaptionEncoder, Encoded

CHUNK_RECORDS = 64


@dataclass(frozen=True)
class Recipe:
    """All that decides how a record becomes a sample."""

    source: str  # its name, for the ids
    tokenizer: Path
    tagger: Path
    units: Path  # the file
    entities: bool  # whether named entities are phrases, too
    num_scores: int
    has_answers: bool  # whether captions are questions
    image_size: int  # limit of the short side, pixels
    quality: int
    max_tokens: int


@dataclass
class Prepared:
    """What became of some records, in their order."""

    samples: list[Sample] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)


class Preparer:
    """Holds the tagger and the tokenizer of a recipe; call it with records."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.encode = CaptionEncoder(recipe.tokenizer, recipe.max_tokens)
        self.nlp = load_tagger(recipe.tagger, recipe.entities)
        self.units = Units.load(recipe.units)
        assert len(self.units.scores) == recipe.num_scores, self.units.scores.keys()

    def __call__(self, records: Sequence[Record]) -> Prepared:
        prepared = Prepared()
        kept: list[tuple[Record, Jpeg, list[int], list[Encoded]]] = []
        for record in records:
            usable, encoded = self._usable(record.captions)
            reason = "" if usable else _why_no_caption(record)
            if usable:
                try:
                    kept.append((record, self._image(record), usable, encoded))
                except BrokenImage as error:
                    reason = str(error)
            if reason:
                prepared.dropped.append((record.key, reason))
        texts = (record.captions[i] for record, _, usable, _ in kept for i in usable)
        tokens = tag(self.nlp, texts, self.units.word_lists)
        for record, image, usable, encoded in kept:
            prepared.samples.append(self._sample(record, image, usable, encoded, tokens))
        return prepared

    def _usable(self, captions: Sequence[str]) -> tuple[list[int], list[Encoded]]:
        """Which captions hold at least one piece, and their encodings."""
        readable = [i for i, caption in enumerate(captions) if is_unicode(caption)]
        pairs = zip(readable, self.encode([captions[i] for i in readable]), strict=True)
        found = {i: encoded for i, encoded in pairs if encoded.pieces}
        return list(found), list(found.values())

    def _image(self, record: Record) -> Jpeg:
        try:
            data = record.load()
        except FileNotFoundError:
            raise BrokenImage("no such file") from None
        except OutsideFolder:
            raise BrokenImage("path leaves the image folder") from None
        except Unreachable:
            raise
        except (OSError, ValueError):
            raise BrokenImage("unreadable file") from None
        return normalise(data, self.recipe.image_size, self.recipe.quality)

    def _sample(
        self, record: Record, image: Jpeg, usable: list[int], encoded: list[Encoded], tokens: Iterator[list[Token]]
    ) -> Sample:
        captions = [record.captions[i] for i in usable]
        answers = [record.answers[i] for i in usable] if self.recipe.has_answers else []
        tags: list[int] = []
        scores: list[np.ndarray] = []
        for caption, e in zip(captions, encoded, strict=True):
            words = e.words(caption)
            tags += caption_bits(e, next(tokens), self.encode.unk_id, self.units.starts(words))
            scores.append(caption_scores(e, self.units.score_rows(words)))
        return Sample(
            key=record.key,
            id=sample_id(self.recipe.source, record.key),
            image=image.data,
            tokens=np.array([i for e in encoded for i in e.ids], np.uint16),
            tags=np.array(tags, np.uint32),
            scores=np.concatenate(scores),
            caption_lengths=np.array([len(e.ids) for e in encoded], np.uint8),
            captions=captions,
            width=image.width,
            height=image.height,
            num_cut=sum(e.is_cut for e in encoded),
            num_empty=len(record.captions) - len(captions),
            question_ids=[each.question_id for each in answers],
            answers=[each.scores for each in answers],
            most_common_answers=[each.most_common for each in answers],
        )


def _why_no_caption(record: Record) -> str:
    if not record.captions:
        return "no caption"
    return "only empty captions" if all(map(is_unicode, record.captions)) else "no caption in valid Unicode"


def caption_bits(
    encoded: Encoded, tokens: Sequence[Token], unk_id: int, starts_collocation: Sequence[bool]
) -> list[int]:
    """The tag bits of all L tokens of a caption; [CLS] and [SEP] have none, [UNK] is not maskable.

    starts_collocation: for each word. Units of every kind begin with a word, so none splits one.
    """
    bits = [0]
    aligned = align(encoded.pieces, tokens)
    collocation = iter(starts_collocation)
    previous_phrase = -1  # of the word before
    for piece_id, (own, phrase), starts_word in zip(encoded.ids[1:-1], aligned, encoded.word_starts, strict=True):
        if starts_word:
            own |= pos.WORD_START
            own |= pos.COLLOCATION_START if next(collocation) else 0
            own |= pos.PHRASE_START if phrase == -1 or phrase != previous_phrase else 0
            previous_phrase = phrase
        bits.append(own | (0 if piece_id == unk_id else pos.MASKABLE))
    bits.append(0)
    return bits


def caption_scores(encoded: Encoded, rows: np.ndarray) -> np.ndarray:
    """(L, S) uint8: the scores of all tokens of a caption from those of its words, `rows` (W, S)."""
    scores = np.zeros((len(encoded.ids), rows.shape[1]), np.uint8)
    scores[1:-1] = rows[np.cumsum(encoded.word_starts) - 1]
    return scores


def prepare(chunks: Iterable[Sequence[Record]], recipe: Recipe, num_workers: int | None) -> Iterator[Prepared]:
    """The result of every chunk, in order, with few more chunks in flight than there are processes.

    num_workers: None for all cores. A process is started for each, but none for a single chunk.
    """
    num_workers = num_workers or os.cpu_count() or 1
    chunks = iter(chunks)
    first = list(islice(chunks, 2))
    chunks = chain(first, chunks)
    if num_workers == 1 or len(first) < 2:
        yield from map(Preparer(recipe), chunks)
        return
    # Spawned, not forked: torch and the tokenizer may have started threads in this process.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (recipe,))
    pending = deque()
    try:
        with _environment(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"):
            for chunk in chunks:
                pending.append(pool.submit(_work, chunk))
                if len(pending) > 2 * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_preparer: Preparer | None = None  # of a worker process


def _start_worker(recipe: Recipe) -> None:
    global _preparer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if not needs_torch(recipe.tagger):
        # spaCy imports torch when it can; a worker without it starts 1.6 s sooner and takes 490 MB less.
        sys.modules.setdefault("torch", None)
    _preparer = Preparer(recipe)


def _exit_with_parent() -> None:
    """A killed parent would leave its workers waiting for ever."""
    parent_process().join()
    os._exit(1)


def _work(records: Sequence[Record]) -> Prepared:
    return _preparer(records)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Variables for the processes started inside, taken back afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def is_unicode(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON may carry and no encoder takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
