"""Retrieval: which caption belongs to the image, which image to the caption? R@1, R@5, R@10 both ways.

    python eval/run.py retrieval --checkpoint runs/itm --annotations captions_val2014.json --images val2014

--annotations is a COCO captions file. The checkpoint must have been trained to match images with texts: with itc its
cosines rank everything, with itm the probability of a match does, with both itm ranks the --shortlist of itc (ALBEF).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from posmask.eval import photos
from posmask.eval.annotations import read_entries
from posmask.eval.photos import PhotoEncoder, PhotoFolders
from posmask.eval.results import Outcome, draw_bars, percent, percent_interval, render
from posmask.eval.scoring import HEADS, Encoder, Text, batches, encode, has_head
from posmask.eval.stats import rate
from posmask.train.model import Packing, PosMaskModel

MEASURE = "R@1"
DIRECTIONS = ("image_to_text", "text_to_image")
DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class Captions:
    """C captions of I photos."""

    photos: list[str]  # I names
    texts: list[str]  # C
    image_of: np.ndarray  # (C,) int64, the photo of each caption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    photos.add_arguments(parser, "the first N photos")
    parser.add_argument("--score", choices=tuple(HEADS), help="one head alone (both, if the checkpoint has them)")
    parser.add_argument("--shortlist", type=int, default=128, help="candidates that itm ranks after itc (%(default)s)")
    parser.add_argument("--max-tokens", type=int, help="longer captions are cut and counted (48)")


def item_value(prediction: dict) -> tuple[str, str, float]:
    """(direction, image or caption, whether the best is right) of a line of predictions.jsonl, for comparisons."""
    return prediction["group"], prediction["id"], float(prediction["rank"] == 1)


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


def recalls(found: np.ndarray) -> dict:
    """R@1, R@5, R@10 with intervals, and the median rank (1: the best), of ranks from 0."""
    return {f"r{depth}": rate(found < depth) for depth in DEPTHS} | {"median_rank": float(np.median(found)) + 1}


def keep_photos(captions: Captions, wanted: list[str]) -> Captions:
    """Only the photos `wanted`, in their order, with their captions."""
    number = {name: i for i, name in enumerate(wanted)}
    chosen = [c for c, image in enumerate(captions.image_of) if captions.photos[image] in number]
    image_of = [number[captions.photos[captions.image_of[c]]] for c in chosen]
    return Captions(wanted, [captions.texts[c] for c in chosen], np.array(image_of, np.int64))


def evaluate(model: PosMaskModel, run: Path, config: dict, args: argparse.Namespace) -> Outcome:
    """Ranks every caption for every photo, and every photo for every caption."""
    heads = [name for name in HEADS if has_head(model, name)]
    if not heads or (args.score and args.score not in heads):
        needed = HEADS[args.score] if args.score else " or ".join(HEADS.values())
        raise ValueError(
            f"retrieval needs the {needed} head, which {run} was trained without: take another checkpoint"
            + (f" or --score {heads[0]}" if heads else ", or a task of pairs (valse, foil, sugarcrepe)")
        )
    heads = [args.score] if args.score else heads
    photos.check_limit(args.limit)
    if args.shortlist < 1:
        raise ValueError(f"--shortlist {args.shortlist}: must be at least 1")
    every = read(args.annotations)
    limited = every.photos[: args.limit]
    folders = PhotoFolders(args.images)
    missing = folders.missing(limited, args.allow_missing)
    captions = keep_photos(every, [name for name in limited if name not in set(missing)])
    texts = Encoder(run, model, args.max_tokens)(captions.texts)
    windows = PhotoEncoder(model, folders, config["decode"]).windows(captions.photos)
    features = torch.cat([found for _, found in windows])

    to_text, to_image = score_matrices(model, texts, features, heads, args.shortlist)
    found = dict(zip(DIRECTIONS, (ranks(to_text, captions.image_of)[0], ranks(to_image, captions.image_of)[1]),
                     strict=True))  # fmt: skip
    names = dict(zip(DIRECTIONS, (captions.photos, map(str, range(len(texts)))), strict=True))
    predictions = [
        {"id": name, "group": group, "rank": int(rank) + 1}
        for group in DIRECTIONS
        for name, rank in zip(names[group], found[group], strict=True)
    ]
    chance = {"image_to_text": [chance_of(captions.image_of, depth) for depth in DEPTHS],
              "text_to_image": [min(1.0, depth / len(captions.photos)) for depth in DEPTHS]}  # fmt: skip
    results = {
        "data": args.annotations, "num_items": len(predictions), "num_missing": len(missing),
        "missing_photos": missing, "num_photos": len(captions.photos), "num_captions": len(texts),
        "num_cut": sum(text.is_cut for text in texts), "score": "+".join(heads),
        "shortlist": args.shortlist if len(heads) > 1 else None, "chance": chance,
        **{group: recalls(found[group]) for group in DIRECTIONS},
    }  # fmt: skip
    title = f"retrieval of {run}, score {results['score']}, {len(captions.photos):,} photos, {len(texts):,} captions "
    title += f"of {args.annotations}; 95 % intervals over items"
    if missing:
        title += f"\n{len(missing):,} photos are missing; they and their captions are left out"
    return Outcome(results, predictions, make_table(title, results), lambda figure: draw(figure, results, title))


def chance_of(image_of: np.ndarray, depth: int) -> float:
    """Chance that one of an image's captions is among `depth` drawn from all, averaged over the images."""
    total, own = len(image_of), np.bincount(image_of)
    misses = np.ones(len(own))
    for drawn in range(min(depth, total)):
        misses *= np.maximum(0, total - own - drawn) / (total - drawn)
    return float(1 - misses.mean())


def score_matrices(
    model: PosMaskModel, texts: list[Text], features: Tensor, heads: list[str], shortlist: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (I, C) by which captions are ranked for an image, and by which images are for a caption.

    With both heads: itm on the `shortlist` best of itc in that direction, above the cosines of the rest.
    """
    num_images, num_texts = len(features), len(texts)
    if heads == ["itm"]:
        pairs = np.indices((num_images, num_texts)).reshape(2, -1)
        scores = match_probabilities(model, texts, features, *pairs).reshape(num_images, num_texts)
        return scores, scores
    cosines = np.empty((num_images, num_texts))
    image = model.itc.embed_image(features)
    for batch in batches([len(text.ids) for text in texts]):
        text_TD, packing = encode(model, [texts[i].ids for i in batch])
        cosines[:, batch] = (image @ model.itc.embed_text(text_TD[packing.starts[:-1].long()]).T).double().cpu().numpy()
    if heads == ["itc"]:
        return cosines, cosines
    listed = [np.zeros(cosines.shape, bool), np.zeros(cosines.shape, bool)]
    for axis, one in zip((1, 0), listed, strict=True):
        count = min(shortlist, cosines.shape[axis])
        np.put_along_axis(one, np.argsort(-cosines, axis, kind="stable").take(range(count), axis), True, axis)
    both = np.nonzero(listed[0] | listed[1])
    matched = np.full(cosines.shape, np.nan)
    matched[both] = match_probabilities(model, texts, features, *both)
    return tuple(np.where(one, 2 + matched, cosines) for one in listed)


def match_probabilities(
    model: PosMaskModel, texts: list[Text], features: Tensor, images: np.ndarray, captions: np.ndarray
) -> np.ndarray:
    """P(match) of pairs (P,) of an image and a caption; a caption's text runs through the text encoder once."""
    found = np.empty(len(images))
    by_caption = np.argsort(captions, kind="stable")
    bounds = np.searchsorted(captions[by_caption], np.arange(len(texts) + 1))
    for batch in batches([len(text.ids) for text in texts]):
        text_TD, packing = encode(model, [texts[i].ids for i in batch])
        starts = packing.starts.cpu().numpy()
        place = np.concatenate([np.full(bounds[c + 1] - bounds[c], k) for k, c in enumerate(batch)])
        pairs = np.concatenate([by_caption[bounds[c] : bounds[c + 1]] for c in batch])
        lengths = np.diff(starts)[place]
        for part in batches(lengths):
            ends = np.cumsum(lengths[part])
            source = np.arange(ends[-1]) + np.repeat(starts[place[part]] - ends + lengths[part], lengths[part])
            copies = torch.from_numpy(np.concatenate([[0], ends])).to(text_TD.device)
            repeated = Packing.of(copies, int(ends[-1]), int(lengths[part].max()))
            rows = text_TD[torch.from_numpy(source).to(text_TD.device)]
            image = torch.from_numpy(images[pairs[part]]).to(text_TD.device, torch.int32)
            logits = model.itm(model.fuse(rows, repeated, features, image), repeated)
            found[pairs[part]] = logits.double().sigmoid().cpu().numpy()
    return found


def rows_of(results: dict) -> list[tuple[str, dict[str, dict], float]]:
    """(label, {"image": rate}, chance) of each recall."""
    return [
        (f"{group.replace('_', ' ')} R@{depth}", {"image": results[group][f"r{depth}"]}, chance)
        for group in DIRECTIONS
        for depth, chance in zip(DEPTHS, results["chance"][group], strict=True)
    ]


def make_table(title: str, results: dict) -> str:
    """One row a direction and depth."""
    rows = [
        [label, percent(entry["image"]["accuracy"]), percent_interval(entry["image"]["interval"]), percent(chance)]
        for label, entry, chance in rows_of(results)
    ]
    medians = ", ".join(f"{group.replace('_', ' ')} {results[group]['median_rank']:g}" for group in DIRECTIONS)
    return render(title + f"\nmedian rank: {medians}", ["recall", "found", "95 %", "chance"], rows)


def draw(figure: Figure, results: dict, title: str) -> None:
    """Recalls, chance dashed."""
    rows = rows_of(results)
    draw_bars(figure, title, [row[:2] for row in rows], "recall [%]", [row[2] for row in rows])
