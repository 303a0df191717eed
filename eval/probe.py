"""How well is each part of speech predicted with its image, with a blank one, and with another image?

One word is masked at a time (--all-at-once: all words of the part of speech), whole words of the tagger, every piece
[MASK]. Loss is nats per piece; image_gain = loss(blank) - loss(image) is what looking is worth. It means something only
if the model has met blank images in training (`pretrain.py --blank-rate`): otherwise the results say calibrated: false.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from posmask.eval.results import Outcome, render
from posmask.kernels import philox
from posmask.prep.pos import MASKABLE, NUM_UPOS, TOKEN_START, UPOS, UPOS_MASK
from posmask.train.loader import Batch, Collator, Shards, View, evaluation_batches
from posmask.train.model import Packing, PosMaskModel

CONDITIONS = ("image", "blank", "other")
MEASURE = "loss with the image [nats]"
IMAGES_PER_BATCH = 64
SEQUENCES_PER_FORWARD = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    parser.add_argument("--data", help="folder of shards (the run's --val)")
    parser.add_argument("--all-at-once", action="store_true", help="mask all words of a part of speech together")
    parser.add_argument(
        "--words-per-pos", type=int, default=2000, help="about as many of each part of speech, 0: all (%(default)s)"
    )


def item_value(prediction: dict) -> tuple[str, str, float]:
    """(part of speech, hole, loss with the image) of a line of predictions.jsonl, for comparisons."""
    hole = f"{prediction['id']}/{prediction['caption']}/{prediction['positions'][0]}"
    return prediction["pos"], hole, prediction["loss"]["image"]


@dataclass(frozen=True)
class Holes:
    """N copies of captions, each with one word (or one class of words) to mask. Host arrays."""

    caption: np.ndarray  # (N,) int64, caption of the batch that is copied
    upos: np.ndarray  # (N,) int64, index in UPOS
    pieces: list[np.ndarray]  # per copy: places in the batch's tokens that are masked
    num_words: np.ndarray  # (N,) int64


def evaluate(model: PosMaskModel, run: Path, config: dict, args: argparse.Namespace) -> Outcome:
    """Probes `model` on the shards of --data. Raises ValueError if they do not fit the model."""
    if "mlm" not in model.config.objectives:
        raise ValueError(f"the probe needs masked language modelling, which {run} was trained without")
    data = args.data or config["val"]
    if data is None:
        raise ValueError(f"{run} was trained without --val: say which shards to probe with --data")
    shards = Shards((data,))
    manifest = shards.manifest
    vocabulary = (run / "tokenizer" / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    check_fits(shards, data, run, model)
    if len(shards) < 2:
        raise ValueError(f"--data {data}: the probe needs at least 2 images, to show a caption another one")

    device = next(model.parameters()).device
    model_config = model.config
    view = View(0, model_config.image_size, model_config.image_mean, model_config.image_std)
    collate = Collator(view, len(manifest.scores), IMAGES_PER_BATCH, config["decode"], device)
    per_upos = np.array([manifest.counts["per_upos"][tag] for tag in UPOS])
    keep = np.minimum(1.0, args.words_per_pos / np.maximum(per_upos, 1)) if args.words_per_pos else np.ones(NUM_UPOS)

    tally = {name: np.zeros((NUM_UPOS, 3)) for name in CONDITIONS}  # loss, top-1, top-5 summed over pieces
    num_words, num_pieces = np.zeros(NUM_UPOS, np.int64), np.zeros(NUM_UPOS, np.int64)
    predictions, previous = [], None
    for batch in evaluation_batches(shards, collate, IMAGES_PER_BATCH, None):
        batch = batch.to(device, torch.float32)
        images = {"image": model.image(batch.images), "blank": model.image(torch.zeros_like(batch.images[:1]))}
        # Every caption is shown the image before its own; the first image of all is shown the last of its batch.
        last = images["image"][-1:]
        images["other"] = torch.cat([last if previous is None else previous, images["image"][:-1]])
        previous = last
        holes = find_holes(batch, keep, args.all_at_once)
        for start in range(0, len(holes.caption), SEQUENCES_PER_FORWARD):
            part = slice(start, start + SEQUENCES_PER_FORWARD)
            scores, best = score(model, batch, images, holes, part, manifest.tokenizer.mask_id)
            pieces = holes.pieces[part]
            owner = np.repeat(np.arange(start, start + len(pieces)), [len(p) for p in pieces])
            for name in CONDITIONS:
                np.add.at(tally[name], holes.upos[owner], scores[name])
            np.add.at(num_pieces, holes.upos[owner], 1)
            np.add.at(num_words, holes.upos[part], holes.num_words[part])
            predictions += describe(batch, holes, owner, scores, best, vocabulary)

    pos = {}
    for i, tag in enumerate(UPOS):
        if num_pieces[i]:
            means = {name: tally[name][i] / num_pieces[i] for name in CONDITIONS}
            entry = {"words": int(num_words[i]), "tokens": int(num_pieces[i])}
            for column, key in enumerate(("loss", "top1", "top5")):
                entry[key] = {name: float(means[name][column]) for name in CONDITIONS}
            pos[tag.lower()] = entry | {"image_gain": entry["loss"]["blank"] - entry["loss"]["image"]}
    if not pos:
        raise ValueError(f"--data {data} has no tagged words to mask")
    calibrated = config["blank_rate"] > 0
    results = {
        "data": data, "num_items": int(num_words.sum()), "num_missing": 0, "blank_rate": config["blank_rate"],
        "calibrated": calibrated, "all_at_once": args.all_at_once, "pos": pos,
    }  # fmt: skip
    how = "all words of a class" if args.all_at_once else "one word"
    title = f"probe of {run} (--mask {config['mask']}), {how} masked, {len(shards):,} images of {data}"
    if not calibrated:
        title += "\nuncalibrated: the model never saw a blank image (--blank-rate 0), so image gain is inflated"
    return Outcome(results, predictions, make_table(title, pos), lambda figure: draw(figure, pos, title))


def check_fits(shards: Shards, data: str, run: Path, model: PosMaskModel) -> None:
    """Raises ValueError unless the shards' tokens are the model's."""
    ours = (run / "tokenizer" / "vocab.txt").read_bytes()
    theirs = (shards.local_folders[0] / "tokenizer" / "vocab.txt").read_bytes()
    if ours != theirs:
        raise ValueError(f"--data {data} has another tokenizer than {run}: build it with --tokenizer {run}/tokenizer")
    if shards.manifest.longest_caption > model.config.max_positions:
        raise ValueError(
            f"--data {data} has captions of {shards.manifest.longest_caption} tokens, the model {run} has "
            f"{model.config.max_positions} positions: build it with a smaller --max-tokens"
        )


def find_holes(batch: Batch, keep: np.ndarray, all_at_once: bool) -> Holes:
    """What to mask in each caption of the batch; keep (17,) is the share of words of each part of speech to take."""
    tags = batch.host_tags.astype(np.int64)
    starts = batch.host_caption_starts.astype(np.int64)
    caption = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    upos = np.full(len(tags), -1)
    low = tags & UPOS_MASK
    tagged = (low != 0) & ((tags & MASKABLE) != 0)
    upos[tagged] = np.log2((low & -low)[tagged]).astype(np.int64)
    place = np.arange(len(tags))
    begins = ((tags & TOKEN_START) != 0) | (place == starts[caption])
    word = np.cumsum(begins) - 1
    if all_at_once:  # a word is then all words of a class in a caption
        group = caption * NUM_UPOS + upos
        order = np.argsort(group, kind="stable")
    else:
        group, order = word, place
    order = order[tagged[order]]
    bounds = np.flatnonzero(np.diff(group[order])) + 1
    pieces = np.split(order, bounds) if len(order) else []
    first = np.array([p[0] for p in pieces], np.int64)
    if len(first):
        # Thinned by a draw of the word's own, so that the same words are taken whatever the batch.
        row, position = torch.from_numpy(caption[first]), torch.from_numpy(first - starts[caption[first]])
        draw = philox.draw_words(philox.SELECT, position, row, batch.caption_key.cpu(), 0, 0)[0].numpy()
        taken = np.flatnonzero(draw < keep[upos[first]] * 2**32)
    else:
        taken = np.zeros(0, np.int64)
    return Holes(
        caption=caption[first[taken]],
        upos=upos[first[taken]],
        pieces=[pieces[i] for i in taken],
        num_words=np.array([len(np.unique(word[pieces[i]])) for i in taken], np.int64),
    )


def score(
    model: PosMaskModel, batch: Batch, images: dict[str, Tensor], holes: Holes, part: slice, mask_id: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Per condition (M, 3) of loss, top-1 and top-5 of each masked piece, and (M,) the guess with the image."""
    device = batch.tokens.device
    starts = batch.host_caption_starts.astype(np.int64)
    captions = holes.caption[part]
    lengths = (starts[1:] - starts[:-1])[captions]
    copy_starts = np.concatenate([[0], np.cumsum(lengths)])
    source = np.arange(copy_starts[-1]) - np.repeat(copy_starts[:-1] - starts[captions], lengths)
    moved = zip(holes.pieces[part], copy_starts[:-1] - starts[captions], strict=True)
    index = np.concatenate([pieces + shift for pieces, shift in moved])

    tokens = batch.tokens[torch.from_numpy(source).to(device)]
    index = torch.from_numpy(index).to(device)
    targets = tokens[index].long()
    tokens[index] = mask_id
    packing = Packing.of(torch.from_numpy(copy_starts).to(device), tokens.numel(), int(lengths.max()))
    text = model.encode_text(tokens, packing)  # shared by the conditions
    image_of = batch.caption_image.long()[torch.from_numpy(captions).to(device)]
    scores, best = {}, None
    for name in CONDITIONS:
        caption_image = torch.zeros_like(image_of) if name == "blank" else image_of
        logits = model.logits(model.fuse(text, packing, images[name], caption_image)[index])
        top = logits.topk(5, dim=1).indices
        hits = top == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="none")
        scores[name] = torch.stack([loss, hits[:, 0].float(), hits.any(1).float()], 1).cpu().double().numpy()
        if name == "image":
            best = top[:, 0].cpu().numpy()
    return scores, best


def describe(batch: Batch, holes: Holes, owner: np.ndarray, scores: dict, best: np.ndarray, vocabulary: list[str]):
    """One JSON object for each copy: which sample, caption and places, the truth, the guess, loss per condition."""
    starts = batch.host_caption_starts
    keys = batch.caption_key.cpu().numpy().view(np.uint32)
    tokens = batch.tokens.cpu().numpy()
    lines = []
    for number in np.unique(owner):
        rows = owner == number
        pieces, caption = holes.pieces[number], holes.caption[number]
        lines.append({
            "id": int(batch.sample_ids[int(batch.caption_image[caption])]),
            "caption": int(keys[caption, 0]),
            "positions": (pieces - starts[caption]).tolist(),
            "pos": UPOS[holes.upos[number]].lower(),
            "truth": [vocabulary[i] for i in tokens[pieces]],
            "guess": [vocabulary[i] for i in best[rows]],
            "loss": {name: round(float(scores[name][rows, 0].mean()), 5) for name in CONDITIONS},
        })  # fmt: skip
    return lines


def make_table(title: str, pos: dict) -> str:
    """Rows by loss with the image: what the arm has learned comes first."""
    header = ["POS", "words", "loss image", "blank", "other", "image gain"]
    header += ["top-1 image", "blank", "other", "top-5 image"]
    rows = []
    for name, entry in sorted(pos.items(), key=lambda item: item[1]["loss"]["image"]):
        loss, top1, top5 = entry["loss"], entry["top1"], entry["top5"]
        rows.append(
            [name, f"{entry['words']:,}"]
            + [f"{loss[c]:.3f}" for c in CONDITIONS]
            + [f"{entry['image_gain']:+.3f}"]
            + [f"{top1[c]:.1%}" for c in CONDITIONS]
            + [f"{top5['image']:.1%}"]
        )
    return render(title, header, rows)


def draw(figure: Figure, pos: dict, title: str) -> None:
    """Left: loss with and without the image; right: top-1. One group of bars a part of speech."""
    figure.suptitle(title, fontsize=9)
    names = sorted(pos, key=lambda name: pos[name]["loss"]["image"])
    x = np.arange(len(names))
    measures = ("loss", "loss [nats/piece]"), ("top1", "top-1 accuracy")
    for axis, (key, label) in zip(figure.subplots(1, 2), measures, strict=True):
        for i, condition in enumerate(CONDITIONS):
            axis.bar(x + 0.27 * (i - 1), [pos[name][key][condition] for name in names], 0.27, label=condition)
        axis.set_xticks(x, names, rotation=60)
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, title="shown image")
