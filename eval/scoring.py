"""How well does a text fit an image? Scores of texts, of one word, of a slot; every condition of the image at once.

A model with an MLM head alone scores a text by the log-likelihood of its pieces (pseudo-log-likelihood, Salazar et al.,
arXiv 1910.14659), in nats:

    pll            each piece given all others
    pll-word-l2r   the same, but the later pieces of its word are masked too (Kauf & Ivanova, arXiv 2305.10588)
    diff           the pieces in which a caption and its foil differ, masked together
    itm            probability of a match, from the matching head
    itc            cosine of the contrast head's vectors
    image-gain:S   score S with the image minus score S with a blank one

Texts are copied once for each hole, equal copies are computed once, and copies travel packed. The text encoder runs
once for all conditions of the image, the image encoder once an image.

Shapes: B images, N image tokens, D width, T packed tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from posmask.prep.wordpiece import CaptionEncoder
from posmask.train.model import Packing, PosMaskModel

LIKELIHOODS = ("pll", "pll-word-l2r", "diff")
HEADS = {"itm": "image-text matching", "itc": "image-text contrast"}
GAIN = "image-gain"
SCORES = (*LIKELIHOODS, *HEADS)
CONTROLS = ("blank", "noise", "shuffled")
CONDITIONS = ("image", *CONTROLS)
DEFAULT_MAX_TOKENS = 48  # what prep cuts captions to by default: later positions were hardly trained
TOKENS_PER_FORWARD = 8192
ROWS_PER_FORWARD = 1024  # rows of logits: V of them are wide


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every task that scores texts."""
    names = f"{', '.join(SCORES)}, or {GAIN}:NAME"
    parser.add_argument("--score", metavar="NAME", help=f"{names} (itm if the checkpoint has it, else pll-word-l2r)")
    parser.add_argument("--controls", default="blank", help=f"comma list of {', '.join(CONTROLS)} (%(default)s)")
    parser.add_argument("--max-tokens", type=int, help=f"longer texts are cut and counted ({DEFAULT_MAX_TOKENS})")


def parse_controls(text: str) -> tuple[str, ...]:
    """--controls; the blank image is always among them. Raises ValueError for an unknown name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in CONTROLS]:
        raise ValueError(f"--controls {text}: {unknown[0]!r} is unknown, choose from {', '.join(CONTROLS)}")
    return tuple(name for name in CONTROLS if name == "blank" or name in names)


class Text(NamedTuple):
    """A caption as L tokens, [CLS] and [SEP] included; words are runs of pieces."""

    ids: np.ndarray  # (L,) int32
    word_of: np.ndarray  # (L,) int64, number of the word, -1 on [CLS] and [SEP]
    spans: list[tuple[int, int]]  # (L - 2) characters [start, end) of each piece
    is_cut: bool
    has_unknown: bool  # a word that the vocabulary cannot spell


class Query(NamedTuple):
    """What to ask of one masked copy: the log-probability of `targets` at `positions`, a part of `owner`'s score."""

    masked: np.ndarray  # (L,) int32
    image: int
    positions: Sequence[int]
    targets: Sequence[int]
    owner: int


@dataclass(frozen=True)
class Score:
    """A score by name: the base score, and whether its value with a blank image is subtracted."""

    base: str
    is_gain: bool

    @staticmethod
    def parse(name: str | None, has_itm: bool = False) -> Score:
        """--score, None for the default. Raises ValueError for an unknown name."""
        default = "itm" if has_itm else "pll-word-l2r"
        gain, _, base = (name or default).partition(":")
        is_gain = gain == GAIN
        base = (base or default) if is_gain else (name or default)
        if base not in SCORES:
            raise ValueError(f"--score {name}: must be one of {', '.join(SCORES)}, or {GAIN}:NAME of one of them")
        return Score(base, is_gain)

    @property
    def name(self) -> str:
        return f"{GAIN}:{self.base}" if self.is_gain else self.base

    def check(self, model: PosMaskModel, run: Path) -> None:
        """Raises ValueError if `model` lacks the head that this score needs, or never trained it."""
        if self.base in LIKELIHOODS and "mlm" not in model.config.objectives:
            others = [f"--score {name}" for name in HEADS if has_head(model, name)]
            raise ValueError(
                f"--score {self.name} needs masked language modelling, which {run} was trained without: take "
                f"{' or '.join(others) or 'another checkpoint'}"
            )
        if self.base in HEADS and not has_head(model, self.base):
            raise ValueError(
                f"--score {self.name} needs the {HEADS[self.base]} head, which {run} was trained without: take "
                f"--score pll-word-l2r, or another checkpoint"
            )

    def match(self, score: np.ndarray) -> np.ndarray | None:
        """The score as a match probability with .5 between match and mismatch; None where it has no such threshold.

        A gain of 0 is the threshold of a gain, a cosine of 0 that of a cosine; a likelihood has none.
        """
        if self.is_gain:
            return np.exp(-np.logaddexp(0, -score))
        if self.base == "itc":
            return (1 + score) / 2
        return score if self.base == "itm" else None


def has_head(model: PosMaskModel, name: str) -> bool:
    return getattr(model, name, None) is not None


class Encoder:
    """Texts of a benchmark in the tokens of a run, cut to `max_tokens` (None: 48, or the run's positions if fewer)."""

    def __init__(self, run: Path, model: PosMaskModel, max_tokens: int | None = None):
        limit = model.config.max_positions
        max_tokens = min(DEFAULT_MAX_TOKENS, limit) if max_tokens is None else max_tokens
        if not 8 <= max_tokens <= limit:
            raise ValueError(f"--max-tokens {max_tokens}: must be 8 to {limit}, the positions of {run}")
        self.encode = CaptionEncoder(run / "tokenizer", max_tokens)
        self.mask_id = self.encode.tokenizer.token_to_id("[MASK]")

    def __call__(self, texts: Sequence[str]) -> list[Text]:
        out = []
        for encoded in self.encode(texts):
            words = np.cumsum(encoded.word_starts) - 1 if encoded.word_starts else np.zeros(0, np.int64)
            word_of = np.concatenate([[-1], words, [-1]])
            ids = np.array(encoded.ids, np.int32)
            out.append(Text(ids, word_of, encoded.pieces, encoded.is_cut, self.encode.unk_id in encoded.ids))
        return out


def pll_holes(text: Text, words_l2r: bool) -> Iterator[tuple[np.ndarray, int]]:
    """(places to mask, place to score) for each piece of a text."""
    for place in range(1, len(text.ids) - 1):
        if words_l2r:
            later = np.flatnonzero(text.word_of[place:] == text.word_of[place]) + place
            yield later, place
        else:
            yield np.array([place]), place


def text_queries(text: Text, image: int, owner: int, score: str, mask_id: int) -> Iterator[Query]:
    """The queries whose sum is `score` (pll or pll-word-l2r) of a text."""
    for masked, place in pll_holes(text, score == "pll-word-l2r"):
        yield Query(hide(text.ids, masked, mask_id), image, [place], [int(text.ids[place])], owner)


def differing(a: np.ndarray, b: np.ndarray) -> tuple[list[int], list[int]]:
    """Places of the pieces of `a` and of `b` that an alignment of the two leaves over (difflib's longest matches)."""
    left, right = [], []
    for kind, a0, a1, b0, b1 in SequenceMatcher(None, a.tolist(), b.tolist(), autojunk=False).get_opcodes():
        if kind != "equal":
            left += range(a0, a1)
            right += range(b0, b1)
    return left, right


def pair_queries(caption: Text, foil: Text, image: int, owner: int, score: str, mask_id: int) -> list[Query] | None:
    """Queries of a caption (owner) and its foil (owner + 1); None if `diff` finds nothing to score on one side."""
    if score != "diff":
        return [
            *text_queries(caption, image, owner, score, mask_id),
            *text_queries(foil, image, owner + 1, score, mask_id),
        ]
    places = differing(caption.ids, foil.ids)
    if not all(places):
        return None
    return [
        Query(hide(text.ids, masked, mask_id), image, masked, text.ids[masked].tolist(), owner + side)
        for side, (text, masked) in enumerate(zip((caption, foil), places, strict=True))
    ]


def hide(ids: np.ndarray, places, mask_id: int) -> np.ndarray:
    masked = ids.copy()
    masked[places] = mask_id
    return masked


def log_probs(
    model: PosMaskModel, queries: Sequence[Query], images: dict[str, Tensor], num_owners: int
) -> dict[str, np.ndarray]:
    """Sums of log-probabilities, in nats, for each condition and owner: {condition: (num_owners,) fp64}.

    images: {condition: (B, N, D)}, or (1, N, D) where all images are the same one.
    """
    copies: dict[tuple[int, bytes], int] = {}
    sequences, image_of = [], []
    copy_of = []
    for query in queries:
        key = (query.image, query.masked.tobytes())
        if key not in copies:
            copies[key] = len(sequences)
            sequences.append(query.masked)
            image_of.append(query.image)
        copy_of.append(copies[key])
    count = np.array([len(query.positions) for query in queries], np.int64)
    row_copy = np.repeat(np.array(copy_of, np.int64), count)
    row_position = np.array([p for query in queries for p in query.positions], np.int64)
    row_target = np.array([t for query in queries for t in query.targets], np.int64)
    row_owner = np.repeat(np.array([query.owner for query in queries], np.int64), count)
    totals = {name: np.zeros(num_owners) for name in images}
    rows_by_copy = np.argsort(row_copy, kind="stable")
    row_bounds = np.searchsorted(row_copy[rows_by_copy], np.arange(len(sequences) + 1))
    for batch in batches([len(s) for s in sequences]):
        rows = np.concatenate([rows_by_copy[row_bounds[c] : row_bounds[c + 1]] for c in batch])
        lengths = np.array([len(sequences[c]) for c in batch])
        place_in_batch = np.zeros(len(sequences), np.int64)
        place_in_batch[batch] = np.cumsum(lengths) - lengths
        # Candidates for one slot share its row of logits.
        wanted, column = np.unique(place_in_batch[row_copy[rows]] + row_position[rows], return_inverse=True)
        text = encode(model, [sequences[c] for c in batch])
        images_of_batch = np.array(image_of)[batch]
        for name, found in _read(model, *text, images_of_batch, images, wanted, column, row_target[rows]):
            np.add.at(totals[name], row_owner[rows], found)
    return totals


def head_scores(
    model: PosMaskModel, texts: Sequence[Text], image_of: Sequence[int], images: dict[str, Tensor], head: str
) -> dict[str, np.ndarray]:
    """The score `head` (itm or itc) of each text with its image, by condition: {condition: (len(texts),) fp64}."""
    totals = {name: np.zeros(len(texts)) for name in images}
    image_of = np.asarray(image_of)
    for batch in batches([len(text.ids) for text in texts]):
        text_TD, packing = encode(model, [texts[i].ids for i in batch])
        first = packing.starts[:-1].long()
        own = torch.from_numpy(image_of[batch]).to(text_TD.device, torch.int32)
        for name, features in images.items():
            image = own if len(features) > 1 else torch.zeros_like(own)
            if head == "itm":
                scores = model.itm(model.fuse(text_TD, packing, features, image), packing).double().sigmoid()
            else:
                scores = (model.itc.embed_text(text_TD[first]) * model.itc.embed_image(features)[image.long()]).sum(1)
            totals[name][batch] = scores.double().cpu().numpy()
    return totals


def encode(model: PosMaskModel, sequences: Sequence[np.ndarray]) -> tuple[Tensor, Packing]:
    """Token sequences, packed, through the text encoder: (T, D), and where they lie."""
    device = next(model.parameters()).device
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in sequences])])
    packing = Packing.of(torch.from_numpy(starts).to(device), int(starts[-1]), int(np.diff(starts).max()))
    return model.encode_text(torch.from_numpy(np.concatenate(sequences)).to(device), packing), packing


def batches(lengths: Sequence[int]) -> Iterator[np.ndarray]:
    """Indices of sequences, shortest first, in runs of at most TOKENS_PER_FORWARD padded tokens."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * lengths[order[end]] <= TOKENS_PER_FORWARD:
            end += 1
        yield order[start:end]
        start = end


def _read(
    model: PosMaskModel, text: Tensor, packing: Packing, image_of: np.ndarray, images: dict[str, Tensor],
    wanted: np.ndarray, column: np.ndarray, targets: np.ndarray,
) -> Iterator[tuple[str, np.ndarray]]:  # fmt: skip
    """For each condition the log-probability of targets (R,) in the rows wanted[column] of the packed text (T, D)."""
    device = text.device
    own = torch.from_numpy(image_of).to(device, torch.int32)
    rows = torch.from_numpy(wanted).to(device)
    for name, features in images.items():
        image = own if len(features) > 1 else torch.zeros_like(own)
        hidden = model.fuse(text, packing, features, image, index=rows)
        found = np.empty(len(targets))
        for start in range(0, len(wanted), ROWS_PER_FORWARD):
            log_p = model.logits(hidden[start : start + ROWS_PER_FORWARD]).float().log_softmax(-1)
            here = np.flatnonzero((column >= start) & (column < start + ROWS_PER_FORWARD))
            index = torch.from_numpy(np.stack([column[here] - start, targets[here]])).to(device)
            found[here] = log_p[index[0], index[1]].double().cpu().numpy()
        yield name, found


def conditions(model: PosMaskModel, features: Tensor, names: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Image tokens (B, N, D) as they are, and what the controls `names` put in their place.

    blank: the mean colour, zeros after normalisation, one for all. noise: one picture of normal noise for all.
    shuffled: another image of the window, by a random cycle.
    """
    size = model.config.image_size
    shown = {"image": features}
    for name in names:
        if name == "shuffled":
            if len(features) < 2:
                raise ValueError("--controls shuffled: needs at least 2 photos, to show a text another one")
            cycle = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
            partner = torch.empty_like(cycle)
            partner[cycle] = cycle.roll(1)
            shown[name] = features[partner.to(features.device)]
        else:
            picture = torch.zeros(1, 3, size, size)
            if name == "noise":
                picture.normal_(generator=torch.Generator().manual_seed(seed))
            shown[name] = model.image(picture.to(features.device))
    return shown
