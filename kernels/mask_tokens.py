"""Choose and replace the tokens to predict: on the tensors' device, without synchronising, all captions at once.

C captions, T packed tokens (captions one after the other, no padding). A *unit* is what is masked as a whole: a piece,
or a run of candidate pieces that begins at a start bit (a word). What the bits mean is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from posmask.kernels.philox import REPLACE, SELECT, VALUE, draw_words

AMOUNTS = ("all", "rate", "budget", "one")
IGNORED = -100  # target of a spare row


@dataclass(frozen=True)
class MaskPlan:
    """Which pieces are masked, how many, and what replaces them.

    amount: "all" candidates; "rate": each unit with probability `rate`; "budget": max(1, round(rate · caption length))
    pieces, [CLS] and [SEP] counted as in BERT; "one" unit a caption. A caption without a candidate is left alone.
    """

    candidates: int  # a piece with any of these bits may be masked
    maskable: int  # ... if it has this bit too
    mask_id: int
    amount: str = "all"
    rate: float = 0.15
    unit_start: int = 0  # bit that starts a unit; 0: each piece is one
    # Budget over longer units. True: whole units where they fill it exactly, else pieces. False: BERT's loop, which
    # takes units in random order and skips those that overshoot, so it may stay below the budget.
    exact: bool = True
    # The control: as many pieces a caption as this plan would mask, placed uniformly over all maskable ones; whole
    # words (they start at `word_start`) where they fill the count exactly, else pieces.
    matched: bool = False
    word_start: int = 0
    replace: tuple[float, float, float] = (1.0, 0.0, 0.0)  # [MASK], a random token, the token itself
    random_ranges: tuple[tuple[int, int], ...] = ()  # [low, high) ids that a random token may be
    max_caption_tokens: int = 255  # no caption is longer; the shard format's limit

    def __post_init__(self):
        if self.amount not in AMOUNTS:
            raise ValueError(f"mask amount {self.amount!r} is unknown; choose one of {', '.join(AMOUNTS)}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"mask rate {self.rate} must be above 0 and at most 1")
        if len(self.replace) != 3 or min(self.replace) < 0 or abs(sum(self.replace) - 1) > 1e-6:
            raise ValueError(f"replace {self.replace} must be three probabilities (mask, random, keep) that sum to 1")
        if self.replace[1] > 0 and self.num_random < 1:
            raise ValueError(f"replace {self.replace} draws random tokens, but the vocabulary offers none")
        assert self.candidates and self.maskable, "a plan without candidates masks nothing"
        assert self.word_start or not self.matched, "matched counts are placed in words: word_start is missing"

    @property
    def num_random(self) -> int:
        """How many token ids a random replacement may be."""
        return sum(high - low for low, high in self.random_ranges)

    def budget(self, lengths):
        """max(1, round(rate · length)) for integer arrays or tensors, ties to even like Python's round.

        The rate is taken as the decimal it was written as (0.15 = 3/20), so no device's floating point enters.
        """
        ratio = Fraction(self.rate).limit_denominator(1_000_000)
        scaled = lengths * ratio.numerator
        whole = scaled // ratio.denominator
        twice_rest = 2 * (scaled - whole * ratio.denominator)
        rounded = whole + (twice_rest + whole % 2 > ratio.denominator)
        return rounded + (rounded < 1)


class MaskedTokens(NamedTuple):
    """The result. Rows past `num_masked` are spare: index 0 (safe to gather), target -100, to be ignored."""

    tokens: Tensor  # (T,) int32, the input with its replacements
    index: Tensor  # (capacity,) int32, where the targets stand, ascending
    targets: Tensor  # (capacity,) int32, the true tokens there, those replaced by themselves included
    num_masked: Tensor  # () int32, live rows
    overflow: Tensor  # () int32, chosen tokens that found no row and were left as they are; must be 0


class _Layout(NamedTuple):
    caption: Tensor  # (T,) int64
    position: Tensor  # (T,) int64, index inside the caption
    place: Tensor  # (T,) int64, index inside the batch
    lengths: Tensor  # (C,) int64
    max_caption_tokens: int

    def sum_per_caption(self, chosen: Tensor) -> Tensor:
        """(T,) bool → (C,) int64."""
        return torch.zeros_like(self.lengths).scatter_add_(0, self.caption, chosen.long())

    def rank(self, runs: Tensor, draw: Tensor) -> Tensor:
        """(T,) int64: a permutation of each caption's positions, those with `runs` first, by (draw, position)."""
        order = torch.argsort(self.caption << 33 | torch.where(runs, draw, 1 << 32), stable=True)
        return torch.empty_like(order).scatter_(0, order, self.position)

    def heads(self, candidate: Tensor, starts_unit: Tensor | None) -> Tensor:
        """(T,) int64: place of the first piece of each candidate's unit; what it holds elsewhere means nothing."""
        if starts_unit is None:
            return self.place
        after_gap = (self.position == 0) | ~candidate.roll(1)
        return torch.where(candidate & (starts_unit | after_gap), self.place, 0).cummax(0).values


def _take_units(candidate: Tensor, head: Tensor, budget: Tensor, draw: Tensor, layout: _Layout) -> Tensor:
    """BERT's loop over each caption's units, all captions at once: in order of their draws, a unit is taken if it fits.

    Rule: google-research/bert, create_pretraining_data.py. budget: (C,); the rest (T,). Returns (T,) bool.
    """
    is_head = candidate & (head == layout.place)
    rank = layout.rank(is_head, draw)
    num_pieces = torch.zeros_like(head).scatter_add_(0, head, candidate.long())
    too_long = 1 << 30
    num_ranks, left = min(layout.max_caption_tokens, len(head)), budget.clone()
    pieces_by_rank = torch.full((num_ranks, len(left)), too_long, device=head.device)
    pieces_by_rank[rank, layout.caption] = torch.where(is_head, num_pieces, too_long)
    taken = torch.empty_like(pieces_by_rank, dtype=torch.bool)
    for pieces, fits in zip(pieces_by_rank.unbind(), taken.unbind(), strict=True):
        torch.le(pieces, left, out=fits)
        left -= pieces * fits
    return candidate & taken[rank, layout.caption][head]


def _fill(candidate: Tensor, head: Tensor, count: Tensor, draws: tuple[Tensor, ...], layout: _Layout) -> Tensor:
    """(T,) bool: `count` (C,) candidates a caption, or all; whole units if they come to it exactly, else pieces."""
    count = torch.minimum(count, layout.sum_per_caption(candidate))
    units = _take_units(candidate, head, count, draws[0], layout)
    pieces = candidate & (layout.rank(candidate, draws[1]) < count[layout.caption])
    return torch.where((layout.sum_per_caption(units) == count)[layout.caption], units, pieces)


def select_reference(
    tags: Tensor, caption_starts: Tensor, caption_key: Tensor, plan: MaskPlan, seed: int, epoch: int
) -> Tensor:
    """(T,) bool: the tokens to predict. Arguments as in `mask_tokens`."""
    maskable = (tags & plan.maskable) != 0
    candidate = maskable & ((tags & plan.candidates) != 0)
    if plan.amount == "all" and not plan.matched:
        return candidate
    starts = caption_starts.long()
    lengths, place = starts.diff(), torch.arange(len(tags), device=tags.device)
    caption = torch.arange(len(lengths), device=tags.device).repeat_interleave(lengths, output_size=len(tags))
    layout = _Layout(caption, place - starts[caption], place, lengths, plan.max_caption_tokens)
    # Words 0 and 1 choose units and pieces of the plan, 2 and 3 those of its twin, which must not follow the plan's.
    draws = draw_words(SELECT, layout.position, caption, caption_key, seed, epoch)

    head = layout.heads(candidate, (tags & plan.unit_start) != 0 if plan.unit_start else None)
    if plan.amount == "rate":
        chosen = candidate & (draws[0][head] < round(plan.rate * 2**32))
    elif plan.amount == "one":
        chosen = candidate & (layout.rank(candidate & (head == place), draws[0])[head] == 0)
    elif plan.amount == "budget":
        budget = plan.budget(lengths)
        if not plan.unit_start:
            chosen = candidate & (layout.rank(candidate, draws[0]) < budget[caption])
        elif plan.exact:
            chosen = _fill(candidate, head, budget, draws[:2], layout)
        else:
            chosen = _take_units(candidate, head, budget, draws[0], layout)
    else:
        chosen = candidate
    if plan.matched:
        head = layout.heads(maskable, (tags & plan.word_start) != 0)
        chosen = _fill(maskable, head, layout.sum_per_caption(chosen), draws[2:], layout)
    return chosen


def _replacements(
    targets: Tensor, index: Tensor, caption_starts: Tensor, caption_key: Tensor, plan: MaskPlan, seed: int, epoch: int
) -> Tensor:
    """(capacity,) int32: what stands in the place of each target. Values of spare rows mean nothing."""
    mask_below = round(plan.replace[0] * 2**32)
    random_below = round((plan.replace[0] + plan.replace[1]) * 2**32)
    if mask_below == 2**32:
        return torch.full_like(targets, plan.mask_id)
    starts = caption_starts.long()
    caption = torch.searchsorted(starts, index, right=True) - 1
    position = index - starts[caption]
    kind = draw_words(REPLACE, position, caption, caption_key, seed, epoch)[0]
    new = torch.where(kind < mask_below, plan.mask_id, targets)
    if random_below > mask_below:
        # Multiply and shift: unbiased to num_random / 2³², and the same integers on every device.
        nth = draw_words(VALUE, position, caption, caption_key, seed, epoch)[0] * plan.num_random >> 32
        token, num_before = nth, 0
        for low, high in plan.random_ranges:
            token = torch.where(nth >= num_before, nth - num_before + low, token)
            num_before += high - low
        new = torch.where((kind >= mask_below) & (kind < random_below), token.to(new.dtype), new)
    return new


def mask_tokens_reference(
    tokens: Tensor,
    tags: Tensor,
    caption_starts: Tensor,
    caption_key: Tensor,
    plan: MaskPlan,
    seed: int,
    epoch: int,
    capacity: int,
) -> MaskedTokens:
    """The readable form of `mask_tokens`, whose arguments it shares."""
    num_tokens = len(tokens)
    place = torch.arange(num_tokens, device=tokens.device)
    chosen = select_reference(tags, caption_starts, caption_key, plan, seed, epoch)
    count = chosen.sum()
    # Both writes send what has no place to one extra slot at the end, which is then cut off.
    row = torch.where(chosen, chosen.cumsum(0) - 1, capacity).clamp_(max=capacity)
    index = torch.full((capacity + 1,), num_tokens, device=tokens.device).scatter_(0, row, place)[:capacity]
    live = index < num_tokens
    safe_index = torch.where(live, index, 0)
    targets = torch.where(live, tokens[safe_index], IGNORED)
    new = _replacements(targets, safe_index, caption_starts, caption_key, plan, seed, epoch)
    masked = torch.cat([tokens, tokens[:1]]).scatter_(0, index, new)[:num_tokens]
    num_masked = count.clamp(max=capacity)
    return MaskedTokens(masked, safe_index.int(), targets, num_masked.int(), (count - num_masked).int())


def mask_tokens(
    tokens: Tensor,
    tags: Tensor,
    scores: Tensor | None,
    caption_starts: Tensor,
    caption_key: Tensor,
    plan: MaskPlan,
    seed: int,
    epoch: int,
    capacity: int,
    backend: str = "auto",
) -> MaskedTokens:
    """Mask a batch of packed captions. The same caption gets the same mask in any batch, on any device and rank.

    tokens, tags: (T,) int32, T > 0. scores: (T, S) uint8 for arms that weigh by score, or None. caption_starts: (C+1,)
    int32 from 0 to T. caption_key: (C, 3) int32 as in `philox.draw_words`. seed, epoch: in [0, 2³²). capacity: rows of
    the result (`train.masking.capacity` computes it); what does not fit is counted in `overflow`, which the caller
    must check now and then.
    """
    if backend not in ("auto", "torch"):
        raise ValueError(f"mask_tokens has no backend {backend!r}; 'torch' is the only one built (or 'auto')")
    return mask_tokens_reference(tokens, tags, caption_starts, caption_key, plan, seed, epoch, capacity)
