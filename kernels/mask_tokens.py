"""Choose and replace the tokens to predict: on the tensors' device, without synchronising, all captions at once.

C captions, T packed tokens (captions one after the other, no padding), S score columns. What is masked is a
`mask_plan.MaskPlan`, or a mix of several. `mask_tokens` is the operation; the reference is its readable form, and what
runs on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from posmask.kernels.backend import resolve
from posmask.kernels.mask_plan import IGNORED, TOP_WEIGHTS, MaskMix, MaskPlan, plans_of
from posmask.kernels.masked_lm_loss import lowest_bit
from posmask.kernels.philox import ARM, REPLACE, SELECT, VALUE, draw_words
from posmask.kernels.race import KEY_BITS, race_keys


class MaskedTokens(NamedTuple):
    """The result. Rows past `num_masked` are spare: index 0 (safe to gather), target -100, to be ignored."""

    tokens: Tensor  # (T,) int32, the input with its replacements
    index: Tensor  # (capacity,) int32, where the targets stand, ascending
    targets: Tensor  # (capacity,) int32, the true tokens there, those replaced by themselves included
    num_masked: Tensor  # () int32, live rows
    overflow: Tensor  # () int32, chosen tokens that found no row and were left as they are; must be 0


def _pick(values: Tensor, places: Tensor) -> Tensor:
    """values[places] along the first dimension, without waking all threads of a CPU for a few thousand numbers."""
    return values.index_select(0, places)


class _Layout:
    """Where each token stands, and sums and orders inside captions."""

    def __init__(self, caption_starts: Tensor, num_tokens: int):
        self.starts = caption_starts.long()
        self.lengths = self.starts.diff()  # (C,)
        self.place = torch.arange(num_tokens, device=caption_starts.device)  # (T,) index inside the batch
        # Counts the captions that have ended. Not repeat_interleave: it starts all threads for a few thousand numbers.
        ends, one = torch.zeros(num_tokens + 1, dtype=torch.int64, device=self.place.device), self.starts.new_ones(())
        self.caption = ends.scatter_add_(0, self.starts[1:], one.expand_as(self.lengths))[:-1].cumsum(0)  # (T,)
        self.position = self.place - _pick(self.starts, self.caption)  # (T,) index inside the caption

    def sum_per_caption(self, chosen: Tensor) -> Tensor:
        """(T,) bool → (C,) int64."""
        return torch.zeros_like(self.lengths).scatter_add_(0, self.caption, chosen.long())

    def rank(self, runs: Tensor, key: Tensor, key_bits: int = 32) -> Tensor:
        """(T,) int64: a permutation of each caption's positions, those with `runs` first, by (key, position)."""
        key = torch.where(runs, key, 1 << key_bits)
        if key_bits <= 32:
            order = torch.argsort(self.caption << 33 | key, stable=True)
        else:
            order = torch.argsort(key, stable=True)
            order = _pick(order, torch.argsort(_pick(self.caption, order), stable=True))
        return torch.empty_like(order).scatter_(0, order, self.position)

    def heads(self, candidate: Tensor, starts_unit: Tensor | None) -> Tensor:
        """(T,) int64: place of the first piece of each candidate's unit; what it holds elsewhere means nothing."""
        if starts_unit is None:
            return self.place
        after_gap = (self.position == 0) | ~candidate.roll(1)
        return torch.where(candidate & (starts_unit | after_gap), self.place, 0).cummax(0).values


@dataclass(frozen=True)
class _Captions:
    """The captions of a call: its arguments, and what follows from them where it is needed."""

    tags: Tensor
    scores: Tensor | None
    starts: Tensor
    key: Tensor
    bit_weights: Tensor | None

    @cached_property
    def layout(self) -> _Layout:
        return _Layout(self.starts, len(self.tags))


def _candidates(tags: Tensor, plan: MaskPlan) -> Tensor:
    """(T,) bool."""
    if plan.candidates.bit_count() == 1:  # one comparison asks for both
        both = plan.candidates | plan.maskable
        candidate = (tags & both) == both
    else:
        candidate = ((tags & plan.maskable) != 0) & ((tags & plan.candidates) != 0)
    return candidate & ((tags & plan.excluded) == 0) if plan.excluded else candidate


def _take_units(candidate: Tensor, head: Tensor, budget: Tensor, rank: Tensor, plan: MaskPlan, at: _Layout) -> Tensor:
    """BERT's loop over each caption's units, all captions at once: in order of `rank`, a unit is taken if it fits.

    Rule: google-research/bert, create_pretraining_data.py. budget: (C,); rank: (T,), first those of heads; the rest
    (T,). Returns (T,) bool.
    """
    is_head = candidate & (head == at.place)
    num_pieces = torch.zeros_like(head).scatter_add_(0, head, candidate.long())
    too_long = 1 << 30
    num_ranks, left = min(plan.max_caption_tokens, len(head)), budget.clone()
    cell = rank * len(left) + at.caption  # of the table of ranks by captions
    pieces_by_rank = torch.full((num_ranks * len(left),), too_long, device=head.device)
    pieces_by_rank.scatter_(0, cell, torch.where(is_head, num_pieces, too_long))
    pieces_by_rank = pieces_by_rank.view(num_ranks, len(left))
    taken = torch.empty_like(pieces_by_rank, dtype=torch.bool)
    for pieces, fits in zip(pieces_by_rank.unbind(), taken.unbind(), strict=True):
        torch.le(pieces, left, out=fits)
        left -= pieces * fits
    return candidate & _pick(_pick(taken.flatten(), cell), head)


def _take_spans(
    candidate: Tensor, head: Tensor, budget: Tensor, rank: Tensor, num_units: Tensor, plan: MaskPlan, at: _Layout
) -> tuple[Tensor, Tensor]:
    """SpanBERT's loop: in order of `rank` a piece that is still free begins a span of `num_units` (T,) units at most.

    A span begins with the whole unit of its first piece and ends before a unit that is taken, does not follow at once
    or does not fit into what is left of the budget. Source: arXiv 1907.10529, whose code cuts the last word instead.
    Returns (T,) bool and, for what was taken, the place of its span's first piece.
    """
    num_pieces = torch.zeros_like(head).scatter_add_(0, head, candidate.long())
    num_ranks, left = min(plan.max_caption_tokens, len(head)), budget.clone()
    anchors = torch.full((num_ranks * len(left),), -1, device=head.device)
    anchors.scatter_(0, rank * len(left) + at.caption, torch.where(candidate, at.place, -1))
    anchors = anchors.view(num_ranks, len(left))
    # One entry more than there are tokens: what has nowhere to be written goes there.
    span = torch.full((len(head) + 1,), -1, device=head.device)
    last = len(head) - 1
    for anchor in anchors.unbind():
        first = head[anchor.clamp(min=0)]  # (C,) from here on
        unit, wanted = first, num_units[anchor.clamp(min=0)]
        goes_on = (anchor >= 0) & (left > 0)
        for n in range(len(plan.span_lengths)):
            # A unit that follows begins where the one before ended, in the same caption.
            begins = candidate[unit] & (head[unit] == unit) & (at.caption[unit] == at.caption[first])
            goes_on &= begins & (n < wanted) & (span[unit] < 0) & (num_pieces[unit] <= left)
            span[torch.where(goes_on, unit, len(head))] = first
            left -= num_pieces[unit] * goes_on
            unit = (unit + num_pieces[unit]).clamp(max=last)
        if left.device.type == "cpu" and not left.any():
            break
    of_piece = _pick(span, head)
    return candidate & (of_piece >= 0), of_piece.clamp(min=0)


def _fill(candidate: Tensor, head: Tensor, count: Tensor, draws, plan: MaskPlan, at: _Layout) -> Tensor:
    """(T,) bool: `count` (C,) candidates a caption, or all; whole units if they come to it exactly, else pieces."""
    count = torch.minimum(count, at.sum_per_caption(candidate))
    rank = at.rank(candidate & (head == at.place), draws[0])
    units = _take_units(candidate, head, count, rank, plan, at)
    pieces = candidate & (at.rank(candidate, draws[1]) < _pick(count, at.caption))
    return torch.where(_pick(at.sum_per_caption(units) == count, at.caption), units, pieces)


def _shuffle_words(tags: Tensor, maskable: Tensor, draw: Tensor, plan: MaskPlan, at: _Layout) -> Tensor:
    """`tags` (T,) after the words of each caption have traded the bits `plan.shuffled` of their first pieces."""
    head = at.heads(maskable, (tags & plan.word_start) != 0)
    is_head = maskable & (head == at.place)
    first = _pick(at.starts, at.caption)
    by_draw = torch.empty_like(head).scatter_(0, first + at.rank(is_head, draw), at.place)
    source = _pick(by_draw, first + at.rank(is_head, at.position))  # of a word: the one whose bits it gets
    traded = _pick(tags, _pick(source, head)) & plan.shuffled | tags & ~plan.shuffled
    return torch.where(maskable, traded, tags)


def _weights(candidate: Tensor, head: Tensor, tags: Tensor, of: _Captions, plan: MaskPlan, at: _Layout) -> Tensor:
    """(T,) int64 weight of the unit that begins at each place; 0 for one that may not be drawn."""
    if plan.weights == "bits":
        assert of.bit_weights is not None, "these weights are state: the caller passes them"
        weights = torch.cat([of.bit_weights.long(), torch.ones_like(of.bit_weights[:1], dtype=torch.int64)])
        return _pick(weights, lowest_bit(tags).long() % len(weights))  # without a bit: the last entry
    assert of.scores is not None and plan.score < of.scores.shape[1], "these weights need a column of scores"
    score = of.scores[:, plan.score].long()
    if plan.weights == "rank":
        # Candidates of the caption with a higher score: the place of the first equal key in the order of all.
        key = at.caption << 9 | torch.where(candidate, 255 - score, 256)
        num_higher = torch.searchsorted(key.sort().values, key) - _pick(at.starts, at.caption)
        return _pick(at.sum_per_caption(candidate), at.caption) - num_higher
    ranked = candidate & (head == at.place) & (score > 0)
    rank, count = at.rank(ranked, 255 - score), _pick(at.sum_per_caption(ranked), at.caption)
    weight = torch.zeros_like(head)
    for n, table in enumerate(TOP_WEIGHTS, start=1):
        at_least = n == len(TOP_WEIGHTS)
        for nth, value in enumerate(table):
            weight = torch.where(ranked & ((count >= n) if at_least else (count == n)) & (rank == nth), value, weight)
    return weight


def _select_one(of: _Captions, plan: MaskPlan, draws: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """One plan on all captions: (T,) bool what is chosen, and (T,) the first place of its unit (of its span)."""
    at, tags, maskable = of.layout, of.tags, (of.tags & plan.maskable) != 0
    if plan.shuffled:
        tags = _shuffle_words(tags, maskable, draws[2], plan, at)
    candidate = _candidates(tags, plan)
    head = at.heads(candidate, (tags & plan.unit_start) != 0 if plan.unit_start else None)
    key, key_bits = draws[0], 32
    if plan.weights != "equal":
        weights = _weights(candidate, head, tags, of, plan, at)
        candidate &= _pick(weights, head) > 0
        key, key_bits = race_keys(draws[0], weights.clamp(min=1)), KEY_BITS
    chosen, group = candidate, head
    if plan.amount == "rate":
        chosen = candidate & (_pick(draws[0], head) < round(plan.rate * 2**32))
    elif plan.amount != "all":
        is_head, budget = candidate & (head == at.place), plan.budget(at.lengths)
        if plan.amount == "one":
            chosen = candidate & (_pick(at.rank(is_head, key, key_bits), head) == 0)
        elif plan.span_lengths:
            num_units = 1 + sum((draws[1] >= limit).long() for limit in plan.span_lengths[:-1])
            chosen, group = _take_spans(candidate, head, budget, at.rank(candidate, draws[0]), num_units, plan, at)
        elif not plan.unit_start:
            chosen = candidate & (at.rank(candidate, key, key_bits) < _pick(budget, at.caption))
        elif plan.exact:
            chosen = _fill(candidate, head, budget, draws[:2], plan, at)
        else:
            chosen = _take_units(candidate, head, budget, at.rank(is_head, key, key_bits), plan, at)
    if plan.otherwise is not None:
        other, other_group = _select_one(of, plan.otherwise, draws)
        empty = _pick(at.sum_per_caption(candidate) == 0, at.caption)
        chosen, group = chosen | other & empty, torch.where(empty, other_group, group)
    if plan.matched:
        group = at.heads(maskable, (of.tags & plan.word_start) != 0)
        chosen = _fill(maskable, group, at.sum_per_caption(chosen), draws[2:], plan, at)
    return chosen, group


def caption_arms(caption_key: Tensor, plan: MaskPlan | MaskMix, seed: int, epoch: int) -> Tensor:
    """(C,) int64: which plan of a mix each caption follows; 0 for a single plan. caption_key as in `draw_words`."""
    caption = torch.arange(len(caption_key), device=caption_key.device)
    arm = torch.zeros_like(caption)
    if isinstance(plan, MaskMix):
        word = draw_words(ARM, arm, caption, caption_key, seed, epoch)[0]
        for limit in plan.thresholds:
            arm = arm + (word >= limit)
    return arm


def _select(of: _Captions, plan: MaskPlan | MaskMix, seed: int, epoch: int) -> tuple[Tensor, Tensor | None]:
    """(T,) bool what is chosen, and (T,) the place whose draw decides each replacement; None if it is the own one."""
    first, *others = plans_of(plan)
    if not others and first.amount == "all" and not (first.matched or first.shuffled or first.otherwise):
        return _candidates(of.tags, first), None
    at = of.layout
    # Words 0 and 1 choose units and pieces of the plan, 2 and 3 those of its twin, which must not follow the plan's.
    draws = draw_words(SELECT, at.position, at.caption, of.key, seed, epoch)
    chosen, group = _select_one(of, first, draws)
    if not others:
        return chosen, group if first.replace_units else None
    group = group if first.replace_units else at.place
    arm = _pick(caption_arms(of.key, plan, seed, epoch), at.caption)
    for i, other in enumerate(others, start=1):
        other_chosen, other_group = _select_one(of, other, draws)
        other_group = other_group if other.replace_units else at.place
        chosen, group = torch.where(arm == i, other_chosen, chosen), torch.where(arm == i, other_group, group)
    return chosen, group


def _replacements(
    targets: Tensor, index: Tensor, group: Tensor | None, of: _Captions, plan: MaskPlan | MaskMix, seed: int, epoch: int
) -> Tensor:
    """(M,) int32: what stands in the place of each target. index (M,) int64; group (M,) int64 or None.

    Values of spare rows mean nothing.
    """
    plans = plans_of(plan)
    if all(p.thresholds[0] == 2**32 for p in plans):
        return torch.full_like(targets, plans[0].mask_id)
    position, caption = of.layout.position, _pick(of.layout.caption, index)
    # One call for both draws: what [MASK] competes with is drawn for the group, the random token for the piece.
    positions = torch.cat([_pick(position, index if group is None else group), _pick(position, index)])
    purposes = torch.tensor([[REPLACE], [VALUE]], device=index.device).expand(2, len(index)).flatten()
    words = draw_words(purposes, positions, torch.cat([caption, caption]), of.key, seed, epoch)[0]
    kind, value = words.view(2, len(index))
    mask_below, random_below = (limit if len(plans) == 1 else None for limit in plans[0].thresholds)
    if len(plans) > 1:
        arm = _pick(caption_arms(of.key, plan, seed, epoch), caption)
        limits = torch.tensor([p.thresholds for p in plans], device=index.device)[arm]
        mask_below, random_below = limits.unbind(1)
    new = torch.where(kind < mask_below, plans[0].mask_id, targets)
    if plans[0].num_random:
        # Multiply and shift: unbiased to num_random / 2³², and the same integers on every device.
        nth = value * plans[0].num_random >> 32
        token, num_before = nth, 0
        for low, high in plans[0].random_ranges:
            token = torch.where(nth >= num_before, nth - num_before + low, token)
            num_before += high - low
        new = torch.where((kind >= mask_below) & (kind < random_below), token.to(new.dtype), new)
    return new


def _emit_on_cpu(
    tokens: Tensor, chosen: Tensor, group: Tensor | None, of: _Captions, plan: MaskPlan | MaskMix, seed: int,
    epoch: int, capacity: int,
) -> MaskedTokens:  # fmt: skip
    """The end of `mask_tokens_reference` where a count may be read at once: the work shrinks to the live rows."""
    place = chosen.numpy().nonzero()[0]
    live, masked = place[:capacity], tokens.numpy().copy()
    index, targets = np.zeros(capacity, np.int32), np.full(capacity, IGNORED, np.int32)
    index[: len(live)], targets[: len(live)] = live, masked[live]
    rows = torch.from_numpy(live)
    group = None if group is None else _pick(group, rows)
    masked[live] = _replacements(torch.from_numpy(targets[: len(live)]), rows, group, of, plan, seed, epoch).numpy()
    counts = np.array([len(live), len(place) - len(live)], np.int32)
    return MaskedTokens(*map(torch.from_numpy, (masked, index, targets)), *torch.from_numpy(counts).unbind())


def select_reference(
    tags: Tensor, caption_starts: Tensor, caption_key: Tensor, plan: MaskPlan | MaskMix, seed: int, epoch: int,
    scores: Tensor | None = None, bit_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(T,) bool: the tokens to predict. Arguments as in `mask_tokens`."""
    return _select(_Captions(tags, scores, caption_starts, caption_key, bit_weights), plan, seed, epoch)[0]


def mask_tokens_reference(
    tokens: Tensor, tags: Tensor, scores: Tensor | None, caption_starts: Tensor, caption_key: Tensor,
    plan: MaskPlan | MaskMix, seed: int, epoch: int, capacity: int, bit_weights: Tensor | None = None,
) -> MaskedTokens:  # fmt: skip
    """The readable form of `mask_tokens`, whose arguments it shares."""
    of = _Captions(tags, scores, caption_starts, caption_key, bit_weights)
    chosen, group = _select(of, plan, seed, epoch)
    if tokens.device.type == "cpu":
        return _emit_on_cpu(tokens, chosen, group, of, plan, seed, epoch, capacity)
    num_tokens, count = len(tokens), chosen.sum()
    place = torch.arange(num_tokens, device=tokens.device)
    # Both writes send what has no place to one extra slot at the end, which is then cut off.
    row = torch.where(chosen, chosen.cumsum(0) - 1, capacity).clamp_(max=capacity)
    index = torch.full((capacity + 1,), num_tokens, device=tokens.device).scatter_(0, row, place)[:capacity]
    live = index < num_tokens
    safe_index = torch.where(live, index, 0)
    targets = torch.where(live, tokens[safe_index], IGNORED)
    new = _replacements(targets, safe_index, None if group is None else group[safe_index], of, plan, seed, epoch)
    masked = torch.cat([tokens, tokens[:1]]).scatter_(0, index, new)[:num_tokens]
    num_masked = count.clamp(max=capacity)
    return MaskedTokens(masked, safe_index.int(), targets, num_masked.int(), (count - num_masked).int())


def mask_tokens(
    tokens: Tensor, tags: Tensor, scores: Tensor | None, caption_starts: Tensor, caption_key: Tensor,
    plan: MaskPlan | MaskMix, seed: int, epoch: int, capacity: int, backend: str = "auto",
    bit_weights: Tensor | None = None,
) -> MaskedTokens:  # fmt: skip
    """Mask a batch of packed captions. The same caption gets the same mask in any batch, on any device and rank.

    tokens, tags: (T,) int32, T > 0. scores: (T, S) uint8 for plans that weigh by score, or None. caption_starts: (C+1,)
    int32 from 0 to T. caption_key: (C, 3) int32 as in `philox.draw_words`. seed, epoch: in [0, 2³²). capacity: rows of
    the result (`train.masking.capacity` computes it); what does not fit is counted in `overflow`, which the caller
    must check now and then. bit_weights: (17,) int32 in [1, 2²⁴] on the device, for plans that weigh by bit.
    """
    arguments = (tokens, tags, scores, caption_starts, caption_key, plan, seed, epoch, capacity)
    if resolve(backend, tokens, "mask_tokens") == "triton":
        from posmask.kernels.mask_tokens_triton import mask_tokens_triton  # where there is no Triton it can't load

        return mask_tokens_triton(*arguments, bit_weights)
    return mask_tokens_reference(*arguments, bit_weights)
