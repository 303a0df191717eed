"""The built-in source: drawn scenes with captions, so that the whole study runs with no download.

    python prep/build_shards.py

Scene i is a pure function of (seed, split, i), whatever the number of scenes. What a scene contains decides which split
it can belong to, so no two splits share one, for any seeds.
"""

from __future__ import annotations

import functools
import random

from posmask.prep.answers import Answers
from posmask.prep.scene_captions import Word, captions, text
from posmask.prep.scene_drawing import draw, encode
from posmask.prep.scene_questions import Question, questions
from posmask.prep.scene_world import Scene, content_class, sample_scene
from posmask.prep.sources import Record

# Of ten classes of contents: the share of a split bounds how many distinct scenes it can draw, not how many it does.
CONTENT_CLASSES = {"train": range(8), "val": range(8, 9), "eval": range(9, 10)}
MIN_CAPTIONS, MAX_CAPTIONS = 2, 5
ASKED_TOGETHER = 1000  # scenes among which yes/no questions are balanced: the time grows with the square


def _rng(split: str, seed: int, index: int, purpose: str) -> random.Random:
    # A string is hashed with SHA-512, so that neighbouring seeds and indices share nothing.
    return random.Random(f"{split}/{seed}/{index}/{purpose}")


def belongs(scene: Scene, split: str) -> bool:
    """Whether `split` is the one split that may hold `scene`."""
    return content_class(scene, 10) in CONTENT_CLASSES[split]


def scene_at(split: str, seed: int, index: int) -> Scene:
    """Scene `index` of a split: drawn until its content belongs to the split."""
    rng = _rng(split, seed, index, "content")
    while True:
        scene = sample_scene(rng)
        if belongs(scene, split):
            return scene


def captions_at(split: str, seed: int, index: int) -> list[list[Word]]:
    """The two to five different captions of scene `index`, each a list of (word, gold UPOS)."""
    rng = _rng(split, seed, index, "captions")
    num_captions = rng.randint(MIN_CAPTIONS, MAX_CAPTIONS)
    chosen: dict[str, list[Word]] = {}
    for caption in captions(scene_at(split, seed, index), rng):
        chosen[text(caption)] = caption
        if len(chosen) == num_captions:
            return list(chosen.values())
    raise AssertionError("captions are endless")


def jpeg_at(split: str, seed: int, index: int) -> bytes:
    """The picture of scene `index`: a baseline RGB JPEG, 64 to 112 pixels a side."""
    return encode(draw(scene_at(split, seed, index), _rng(split, seed, index, "picture")))


class Scenes:
    """A sequence of `num_scenes` records of a split ("train", "val" or "eval"), drawn when they are loaded.

    Raises ValueError for an unknown split or fewer than one scene.
    """

    name = "scenes"
    licence = "CC0-1.0"

    def __init__(self, split: str, num_scenes: int, seed: int) -> None:
        if split not in CONTENT_CLASSES:
            raise ValueError(f"no split {split!r} of the scenes: choose one of {', '.join(CONTENT_CLASSES)}")
        if num_scenes < 1:
            raise ValueError(f"{num_scenes} scenes asked for: give at least 1")
        self.split, self.num_scenes, self.seed = split, num_scenes, seed

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.num_scenes:
            raise IndexError(index)
        texts, answers = self.texts_at(index)
        return Record(
            key=f"{self.split}-{self.seed}-{index:07d}",
            captions=texts,
            load=functools.partial(jpeg_at, self.split, self.seed, index),
            answers=answers,
        )

    def texts_at(self, index: int) -> tuple[tuple[str, ...], tuple[Answers, ...]]:
        """The captions of scene `index`, and the answers to those that are questions."""
        return tuple(text(caption) for caption in captions_at(self.split, self.seed, index)), ()


@functools.lru_cache(maxsize=1)
def questions_at(split: str, seed: int, start: int, end: int) -> list[list[Question]]:
    """The questions about each of the scenes start … end - 1."""
    scenes = [scene_at(split, seed, index) for index in range(start, end)]
    asked: list[list[Question]] = [[] for _ in scenes]
    for k, question in questions(scenes, _rng(split, seed, start, "questions")):
        asked[k].append(question)
    return asked


class SceneQuestions(Scenes):
    """The scenes of `Scenes`, with questions and their answers in place of captions."""

    name = "scene-questions"

    def texts_at(self, index: int) -> tuple[tuple[str, ...], tuple[Answers, ...]]:
        start = index - index % ASKED_TOGETHER
        end = min(start + ASKED_TOGETHER, self.num_scenes)
        asked = questions_at(self.split, self.seed, start, end)[index - start]
        answers = (Answers(1000 * (index + 1) + n, q.answer, {q.answer: 1.0}) for n, q in enumerate(asked))
        return tuple(q.text for q in asked), tuple(answers)
