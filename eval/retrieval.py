"""Retrieval: which caption belongs to the image, which image to the caption? R@1, R@5, R@10 both ways.

    python eval/run.py retrieval --checkpoint runs/itm --annotations captions_val2014.json --images val2014

--annotations is a COCO captions file. The checkpoint must have been trained to match images with texts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from posmask.eval import photos
from posmask.eval.annotations import read_entries
from posmask.eval.results import Outcome
from posmask.eval.scoring import HEADS, has_head
from posmask.train.model import PosMaskModel

DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class Captions:
    """C captions of I photos."""

    photos: list[str]  # I names
    texts: list[str]  # C
    image_of: np.ndarray  # (C,) int64, the photo of each caption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    photos.add_arguments(parser)


def read(annotations: str) -> Captions:
    """The photos and captions of a COCO captions file, in its order. Raises ValueError for another format."""
    path = Path(annotations)
    if not path.is_file():
        raise ValueError(f"--annotations {annotations}: no such file")
    content, entries = read_entries(path, "retrieval")
    names = {image["id"]: image["file_name"] for image in content.get("images", ())}
    number: dict[int, int] = {}
    for entry in entries.values():
        number.setdefault(entry["image_id"], len(number))
    return Captions(
        [names.get(image_id, f"{image_id:012d}.jpg") for image_id in number],
        [entry["caption"] for entry in entries.values()],
        np.array([number[entry["image_id"]] for entry in entries.values()], np.int64),
    )


def ranks(scores: np.ndarray, image_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks, 0 the best, of what belongs together: of each image's best own caption (I,), of each caption's image (C,).

    scores (I, C); image_of (C,) is the image of each caption. What scores the same as the truth ranks before it.
    """
    own = image_of[None] == np.arange(len(scores))[:, None]
    best = np.where(own, scores, -np.inf).max(1, keepdims=True)
    image_ranks = ((scores >= best) & ~own).sum(1)
    true = scores[image_of, np.arange(scores.shape[1])]
    return image_ranks, (scores >= true).sum(0) - 1


def recalls(scores: np.ndarray, image_of: np.ndarray) -> dict[str, dict[str, float]]:
    """R@1, R@5, R@10 of image-to-text and text-to-image retrieval as shares, and the median rank (1: the best)."""
    out = {}
    for name, found in zip(("image_to_text", "text_to_image"), ranks(scores, image_of), strict=True):
        out[name] = {f"r{k}": float((found < k).mean()) for k in DEPTHS} | {"median_rank": float(np.median(found)) + 1}
    return out


def evaluate(model: PosMaskModel, run: Path, config: dict, args: argparse.Namespace) -> Outcome:
    """Ranks every caption for every photo, and every photo for every caption."""
    if not any(has_head(model, name) for name in HEADS):
        raise ValueError(
            f"retrieval needs the {' or '.join(HEADS.values())} head, which {run} was trained without: take another "
            "checkpoint, or a task of pairs (valse, foil, sugarcrepe)"
        )
    raise AssertionError("no checkpoint has such a head yet")
