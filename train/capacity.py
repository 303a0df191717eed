"""How many rows of masked tokens a batch may need: known on the host before the device has chosen any."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from posmask.kernels.mask_plan import MaskMix, MaskPlan

ROWS = 128  # capacities are multiples, so that the shapes of a run are few


class _Demand(NamedTuple):
    """Masked pieces of each caption, (C,) float64 each: never more than `most`."""

    mean: np.ndarray
    variance: np.ndarray
    most: np.ndarray


def capacity(plan: MaskPlan | MaskMix, tags: np.ndarray, caption_starts: np.ndarray) -> int:
    """Rows that `mask_tokens` needs for this batch, a multiple of 128 and at least 128.

    tags: (T,) any integers; caption_starts: (C+1,). Never too small where the tags bound the count (all, budget, one);
    for rates and mixes it is the mean + 6 standard deviations, exceeded in fewer than one batch in a hundred million.
    """
    tags, starts = np.asarray(tags).astype(np.int64), np.asarray(caption_starts).astype(np.int64)
    if isinstance(plan, MaskPlan) and plan.amount == "all" and not (plan.shuffled or plan.otherwise):
        # Counted at once: the arms that most runs train with, in the thread that feeds the device.
        rows = np.count_nonzero(_candidates(plan, tags))
        return max(1, -(-int(rows) // ROWS)) * ROWS  # of Python's integers: Triton knows no others
    if isinstance(plan, MaskMix):
        parts = [(share, _demand(part, tags, starts)) for share, part in zip(plan.shares, plan.plans, strict=True)]
        mean = sum(share * part.mean for share, part in parts)
        variance = sum(share * (part.variance + part.mean**2) for share, part in parts) - mean**2
        demand = _Demand(mean, variance, np.max([part.most for _, part in parts], axis=0))
    else:
        demand = _demand(plan, tags, starts)
    likely = demand.mean.sum() + 6 * math.sqrt(max(0.0, demand.variance.sum()))
    # Sums of exact halves and products of a rate: what is whole may come out a hair above it.
    rows = math.ceil(min(demand.most.sum(), likely) - 1e-6)
    return max(1, -(-int(rows) // ROWS)) * ROWS  # of Python's integers: Triton knows no others


def _demand(plan: MaskPlan, tags: np.ndarray, starts: np.ndarray) -> _Demand:
    candidate = _candidates(plan, tags)
    heads, num_pieces, caption = _units(candidate, tags, starts, plan.unit_start)
    num_captions = len(starts) - 1
    most = np.bincount(caption, num_pieces, num_captions)
    longest = np.zeros(num_captions)
    np.maximum.at(longest, caption, num_pieces)
    if plan.shuffled:
        # Any words may get the candidates' tags: at the worst the longest ones.
        words, num_pieces, caption = _units((tags & plan.maskable) != 0, tags, starts, plan.word_start)
        first_in = np.zeros(len(words), bool)
        first_in[np.searchsorted(words, heads, side="right") - 1] = True
        num_tagged = np.bincount(caption[first_in], minlength=num_captions)
        order = np.lexsort((-num_pieces, caption))  # captions keep their places, so `caption` is in order already
        nth = np.arange(len(order)) - np.searchsorted(caption, caption)
        taken = order[nth < num_tagged[caption]]
        num_pieces, caption = num_pieces[taken], caption[taken]
        most = np.bincount(caption, num_pieces, num_captions)
        np.maximum.at(longest, caption, num_pieces)
    if plan.amount == "budget":
        most = np.minimum(most, plan.budget(np.diff(starts)))
    elif plan.amount == "one":
        most = longest
    mean, variance = most, np.zeros(num_captions)
    if plan.amount == "rate":
        mean = most * plan.rate
        variance = np.bincount(caption, num_pieces.astype(float) ** 2, num_captions) * plan.rate * (1 - plan.rate)
    demand = _Demand(mean, variance, most)
    if plan.otherwise is None:
        return demand
    other = _demand(plan.otherwise, tags, starts)
    if plan.weights == "top":  # a caption without a score has no candidate either, which the tags don't tell
        return _Demand(*(np.maximum(mine, its) for mine, its in zip(demand, other, strict=True)))
    return _Demand(*(np.where(most == 0, its, mine) for mine, its in zip(demand, other, strict=True)))


def _candidates(plan: MaskPlan, tags: np.ndarray) -> np.ndarray:
    return ((tags & plan.maskable) != 0) & ((tags & plan.candidates) != 0) & ((tags & plan.excluded) == 0)


def _units(
    candidate: np.ndarray, tags: np.ndarray, starts: np.ndarray, unit_start: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of candidates that begin at a start bit (0: single pieces): first piece, pieces and caption, (U,) each."""
    begins = (tags & unit_start) != 0 if unit_start else np.ones_like(candidate)
    begins[starts[:-1][starts[:-1] < len(tags)]] = True
    begins[1:] |= ~candidate[:-1]
    heads = np.flatnonzero(candidate & begins)
    num_before = np.concatenate([[0], np.cumsum(candidate)])
    num_pieces = np.diff(num_before[np.append(heads, len(tags))])
    return heads, num_pieces, np.searchsorted(starts, heads, side="right") - 1
