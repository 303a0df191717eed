"""`mask_tokens` on a GPU: the integers of its reference, in two to four kernels and no synchronisation.

A program of `_select_kernel` decides for one caption, and writes for each token which replacement it gets (KEEP_OUT
where it is not chosen); a fallback and a matched twin are further launches that look at the caption's count.
`_emit_kernel` then packs: index, targets, replaced tokens. All sums are of integers: the order of programs is nowhere
seen.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from posmask.kernels.mask_plan import IGNORED, MaskMix, MaskPlan, plans_of
from posmask.kernels.mask_tokens import MaskedTokens
from posmask.kernels.philox import ARM, REPLACE, SELECT, VALUE
from posmask.kernels.race import FRACTION_BITS, TABLE_BITS, WEIGHT_BITS, log_table

# What `_select_kernel` writes for a token.
KEEP_OUT, MASK, RANDOM, ITSELF = range(4)
NO_CANDIDATE = -1  # count of a caption that waits for the plan's fallback
MAX_EMIT_PROGRAMS = 1024  # each sums the counts of all captions before its own, so few programs read little

_SELECT, _REPLACE, _VALUE, _ARM = (tl.constexpr(purpose) for purpose in (SELECT, REPLACE, VALUE, ARM))
_KEEP_OUT, _MASK, _RANDOM, _ITSELF = (tl.constexpr(kind) for kind in (KEEP_OUT, MASK, RANDOM, ITSELF))
_FRACTION_BITS, _TABLE_SHIFT = tl.constexpr(FRACTION_BITS), tl.constexpr(32 - TABLE_BITS)
_UNIT_KEY = tl.constexpr(1 << WEIGHT_BITS)  # key of a race of weight 1, for each bit of the logarithm
_NO_CANDIDATE, _IGNORED = tl.constexpr(NO_CANDIDATE), tl.constexpr(IGNORED)


@triton.jit
def _draw(purpose, position, key_ptr, seed, epoch):
    """The four words of `philox.draw_words` at `position`, for the caption whose key lies at key_ptr."""
    c0 = (position | (purpose << 16)).to(tl.uint32)
    zero = c0 * 0
    c1 = zero + tl.load(key_ptr).to(tl.uint32, bitcast=True)
    c2 = zero + tl.load(key_ptr + 1).to(tl.uint32, bitcast=True)
    c3 = zero + tl.load(key_ptr + 2).to(tl.uint32, bitcast=True)
    return philox_impl(c0, c1, c2, c3, zero + seed.to(tl.uint32), zero + epoch.to(tl.uint32))


@triton.jit
def _is_mine(key_ptr, arm_low, arm_high, seed, epoch, IS_MIXED: tl.constexpr):
    """Whether a caption follows the plan of a mix whose draws are in [arm_low, arm_high)."""
    mine = arm_low < arm_high
    if IS_MIXED:
        word, _, _, _ = _draw(_ARM, tl.full((1,), 0, tl.int32), key_ptr, seed, epoch)
        arm_draw = tl.sum(word.to(tl.int64))
        mine = (arm_draw >= arm_low) & (arm_draw < arm_high)
    return mine


@triton.jit
def _load(values_ptr, starts_ptr, caption, BLOCK: tl.constexpr):
    """start, length, positions and values (0 beyond the end) of a caption."""
    start = tl.load(starts_ptr + caption)
    length = tl.load(starts_ptr + caption + 1) - start
    position = tl.arange(0, BLOCK)
    return start, length, position, tl.load(values_ptr + start + position, mask=position < length, other=0)


@triton.jit
def _rank(runs, key, position):
    """For each position, how many of those with `runs` come before it by (key, position)."""
    earlier = (key[None, :] < key[:, None]) | ((key[None, :] == key[:, None]) & (position[None, :] < position[:, None]))
    return tl.sum((runs[None, :] & earlier).to(tl.int32), axis=1)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _heads(candidate, starts_unit, position):
    """Position of the first piece of each candidate's unit; elsewhere whatever comes."""
    after_gap = tl.gather(candidate.to(tl.int32), tl.maximum(position - 1, 0), 0) == 0
    begins = candidate & (starts_unit | (position == 0) | after_gap)
    return tl.associative_scan(tl.where(begins, position, 0), 0, _larger)


@triton.jit
def _num_pieces(candidate, head, position):
    """For each position, the pieces of the unit that begins there."""
    return tl.sum(((head[:, None] == position[None, :]) & candidate[:, None]).to(tl.int32), axis=0)


@triton.jit
def _take_units(candidate, head, is_head, budget, rank, position):
    """BERT's loop: in order of rank, a unit is taken if it fits."""
    num_pieces = _num_pieces(candidate, head, position)
    taken = tl.zeros_like(position)
    left = budget
    for r in range(tl.sum(is_head.to(tl.int32))):
        here = is_head & (rank == r)
        pieces = tl.sum(tl.where(here, num_pieces, 0))
        fits = pieces <= left
        taken += tl.where(here & fits, 1, 0)
        left -= tl.where(fits, pieces, 0)
    return candidate & (tl.gather(taken, head, 0) != 0)


@triton.jit
def _take_spans(candidate, head, is_head, budget, rank, num_units, position, MAX_UNITS: tl.constexpr):
    """SpanBERT's loop: what is taken, and the first position of its span."""
    num_pieces = _num_pieces(candidate, head, position)
    span = tl.full(position.shape, -1, tl.int32)
    left = budget
    for r in range(tl.sum(candidate.to(tl.int32))):
        here = candidate & (rank == r)
        first = tl.sum(tl.where(here, head, 0))
        wanted = tl.sum(tl.where(here, num_units, 0))
        unit = first
        goes_on = left > 0
        for n in range(MAX_UNITS):
            at = is_head & (position == unit)
            pieces = tl.sum(tl.where(at, num_pieces, 0))
            is_free = tl.sum((at & (span < 0)).to(tl.int32)) > 0
            goes_on = goes_on & is_free & (n < wanted) & (pieces <= left)
            span = tl.where(at & goes_on, first, span)
            left -= tl.where(goes_on, pieces, 0)
            unit += pieces
    of_piece = tl.gather(span, head, 0)
    return candidate & (of_piece >= 0), tl.maximum(of_piece, 0)


@triton.jit
def _fill(candidate, head, is_head, count, unit_draw, piece_draw, position):
    """`count` candidates, or all; whole units if they come to it exactly, else pieces."""
    count = tl.minimum(count, tl.sum(candidate.to(tl.int32)))
    units = _take_units(candidate, head, is_head, count, _rank(is_head, unit_draw, position), position)
    pieces = candidate & (_rank(candidate, piece_draw, position) < count)
    return tl.where(tl.sum(units.to(tl.int32)) == count, units, pieces)


@triton.jit
def _shuffle(tags, maskable, word_start, traded, draw, position):
    """The tags after the words have traded the bits `traded` of their first pieces."""
    head = _heads(maskable, (tags & word_start) != 0, position)
    is_head = maskable & (head == position)
    drawn, nth = _rank(is_head, draw, position), _rank(is_head, position, position)
    # The word whose bits the n-th word gets is the one drawn n-th.
    from_here = is_head[:, None] & is_head[None, :] & (drawn[:, None] == nth[None, :])
    source = tl.sum(tl.where(from_here, position[:, None], 0), axis=0)
    bits = tl.gather(tl.gather(tags, source, 0), head, 0)
    return tl.where(maskable, (bits & traded) | (tags & ~traded), tags)


@triton.jit
def _shift_up(word, zeros, SHIFT: tl.constexpr):
    """One step of counting leading zeros: shifts words whose upper SHIFT bits are zero."""
    short = word < (1 << (32 - SHIFT))
    return tl.where(short, word << SHIFT, word), zeros + tl.where(short, SHIFT, 0)


@triton.jit
def _race_keys(word, weight, log_ptr):
    """`race.race_keys` of 32-bit words."""
    zeros = tl.zeros_like(weight)
    rest = word
    for step in tl.static_range(5):
        rest, zeros = _shift_up(rest, zeros, 16 >> step)
    zeros += tl.where(rest == 0, 1, 0)
    entry = ((rest << 1) >> _TABLE_SHIFT).to(tl.int32)
    log = (zeros << _FRACTION_BITS) + tl.load(log_ptr + entry)
    return log.to(tl.int64) * (tl.full(weight.shape, _UNIT_KEY, tl.int32) // weight).to(tl.int64)


@triton.jit
def _top_weight(n, nth):
    """`mask_plan.TOP_WEIGHTS` for the nth of n units."""
    of_three = tl.where(nth == 0, 55, tl.where(nth == 1, 30, tl.where(nth == 2, 15, 0)))
    of_two = tl.where(nth == 0, 75, tl.where(nth == 1, 25, 0))
    return tl.where(n >= 3, of_three, tl.where(n == 2, of_two, tl.where(nth == 0, 1, 0)))


@triton.jit
def _kinds(chosen, group, mask_below, random_below, key_ptr, seed, epoch, DRAWS: tl.constexpr):
    """What replaces each chosen token, decided by the draw of its group."""
    if DRAWS:
        word, _, _, _ = _draw(_REPLACE, group, key_ptr, seed, epoch)
        kind = word.to(tl.int64)
        kinds = tl.where(kind < mask_below, _MASK, tl.where(kind < random_below, _RANDOM, _ITSELF))
    else:
        kinds = tl.full(group.shape, _MASK, tl.int32)
    return tl.where(chosen, kinds, _KEEP_OUT).to(tl.int8)


_CHANGING = ("seed", "epoch", "rate_below", "numerator", "denominator", "mask_below", "random_below", "num_scores",
             "score", "arm_low", "arm_high")  # fmt: skip


@triton.jit(do_not_specialize=_CHANGING)
def _select_kernel(
    tags_ptr, scores_ptr, starts_ptr, keys_ptr, bit_weights_ptr, log_ptr, span_ptr, kinds_ptr, counts_ptr,
    candidates, maskable_bit, excluded, unit_start, word_start, traded,
    rate_below, numerator, denominator, score, num_scores, mask_below, random_below, arm_low, arm_high, seed, epoch,
    AMOUNT: tl.constexpr, WEIGHTS: tl.constexpr, HAS_UNITS: tl.constexpr, EXACT: tl.constexpr,
    MAX_UNITS: tl.constexpr, SHUFFLED: tl.constexpr, HAS_FALLBACK: tl.constexpr, IS_FALLBACK: tl.constexpr,
    IS_MIXED: tl.constexpr, DRAWS_KIND: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One caption a program; the names are those of `MaskPlan`."""
    caption = tl.program_id(0)
    key_ptr = keys_ptr + caption * 3
    mine = _is_mine(key_ptr, arm_low, arm_high, seed, epoch, IS_MIXED)
    if IS_FALLBACK:
        mine = mine & (tl.load(counts_ptr + caption) == _NO_CANDIDATE)
    if mine:
        start, length, position, tags = _load(tags_ptr, starts_ptr, caption, BLOCK)
        inside = position < length
        u0, u1, u2, _ = _draw(_SELECT, position, key_ptr, seed, epoch)
        maskable = (tags & maskable_bit) != 0
        if SHUFFLED:
            tags = _shuffle(tags, maskable, word_start, traded, u2, position)
        candidate = maskable & ((tags & candidates) != 0) & ((tags & excluded) == 0)
        head = position
        if HAS_UNITS:
            head = _heads(candidate, (tags & unit_start) != 0, position)
        is_head = candidate & (head == position)

        order = u0.to(tl.int64)
        if WEIGHTS != "equal":
            if WEIGHTS == "bits":
                low = tags & 0x1FFFF
                low = low & -low
                bit = tl.zeros_like(position)
                for i in tl.static_range(17):
                    bit += (low > (1 << i)).to(tl.int32)
                weight = tl.load(bit_weights_ptr + bit, mask=low != 0, other=1)
            else:
                value = tl.load(scores_ptr + (start + position) * num_scores + score, mask=inside, other=0).to(tl.int32)
                if WEIGHTS == "rank":
                    higher = candidate[None, :] & (value[None, :] > value[:, None])
                    weight = tl.sum(candidate.to(tl.int32)) - tl.sum(higher.to(tl.int32), axis=1)
                else:
                    ranked = is_head & (value > 0)
                    nth = _rank(ranked, 255 - value, position)
                    weight = tl.where(ranked, _top_weight(tl.sum(ranked.to(tl.int32)), nth), 0)
            candidate = candidate & (tl.gather(weight, head, 0) > 0)
            is_head = candidate & (head == position)
            order = _race_keys(u0, tl.maximum(weight, 1), log_ptr)

        # max(1, round(length · numerator / denominator)), ties to even
        scaled = length.to(tl.int64) * numerator
        whole = scaled // denominator
        twice_rest = 2 * (scaled - whole * denominator)
        budget = tl.maximum(whole + (twice_rest + whole % 2 > denominator).to(tl.int64), 1).to(tl.int32)

        group = head
        chosen = candidate
        if AMOUNT == "rate":
            chosen = candidate & (tl.gather(u0.to(tl.int64), head, 0) < rate_below)
        elif AMOUNT == "one":
            first = is_head & (_rank(is_head, order, position) == 0)
            chosen = candidate & (tl.gather(first.to(tl.int32), head, 0) != 0)
        elif AMOUNT == "budget":
            if MAX_UNITS > 0:
                num_units = tl.full(position.shape, 1, tl.int32)
                for i in range(MAX_UNITS - 1):
                    num_units += (u1.to(tl.int64) >= tl.load(span_ptr + i)).to(tl.int32)
                rank = _rank(candidate, order, position)
                chosen, group = _take_spans(candidate, head, is_head, budget, rank, num_units, position, MAX_UNITS)
            elif not HAS_UNITS:
                chosen = candidate & (_rank(candidate, order, position) < budget)
            elif EXACT:
                chosen = _fill(candidate, head, is_head, budget, u0, u1, position)
            else:
                chosen = _take_units(candidate, head, is_head, budget, _rank(is_head, order, position), position)
        count = tl.sum(chosen.to(tl.int32))
        if HAS_FALLBACK:
            count = tl.where(tl.sum(candidate.to(tl.int32)) == 0, _NO_CANDIDATE, count)
        tl.store(counts_ptr + caption, count)
        if not GROUPS:
            group = position
        kinds = _kinds(chosen, group, mask_below, random_below, key_ptr, seed, epoch, DRAWS_KIND)
        tl.store(kinds_ptr + start + position, kinds, mask=inside)


@triton.jit(do_not_specialize=_CHANGING)
def _match_kernel(
    tags_ptr, starts_ptr, keys_ptr, kinds_ptr, counts_ptr, maskable_bit, word_start, mask_below, random_below,
    arm_low, arm_high, seed, epoch,
    IS_MIXED: tl.constexpr, DRAWS_KIND: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The control: as many pieces of each caption as were counted, uniformly over all that are maskable."""
    caption = tl.program_id(0)
    key_ptr = keys_ptr + caption * 3
    mine = _is_mine(key_ptr, arm_low, arm_high, seed, epoch, IS_MIXED)
    if mine:
        start, length, position, tags = _load(tags_ptr, starts_ptr, caption, BLOCK)
        inside = position < length
        _, _, u2, u3 = _draw(_SELECT, position, key_ptr, seed, epoch)
        maskable = (tags & maskable_bit) != 0
        head = _heads(maskable, (tags & word_start) != 0, position)
        is_head = maskable & (head == position)
        count = tl.load(counts_ptr + caption)
        chosen = _fill(maskable, head, is_head, count, u2, u3, position)
        group = position
        if GROUPS:
            group = head
        kinds = _kinds(chosen, group, mask_below, random_below, key_ptr, seed, epoch, DRAWS_KIND)
        tl.store(kinds_ptr + start + position, kinds, mask=inside)


@triton.jit(do_not_specialize=("num_captions", "per_program", "num_random", "num_ranges", "seed", "epoch"))
def _emit_kernel(
    tokens_ptr, starts_ptr, keys_ptr, kinds_ptr, counts_ptr, ranges_ptr, masked_ptr, index_ptr, targets_ptr,
    num_masked_ptr, overflow_ptr, num_captions, per_program, capacity, mask_id, num_random, num_ranges, seed, epoch,
    DRAWS_TOKEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CAPTIONS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Packs the rows of `per_program` captions a program; spare rows are shared out among the programs."""
    program = tl.program_id(0)
    first = program * per_program
    row, total = 0, 0
    for at in range(0, num_captions, BLOCK_CAPTIONS):
        caption = at + tl.arange(0, BLOCK_CAPTIONS)
        counts = tl.load(counts_ptr + caption, mask=caption < num_captions, other=0)
        total += tl.sum(counts)
        row += tl.sum(tl.where(caption < first, counts, 0))
    for caption in range(first, tl.minimum(first + per_program, num_captions)):
        start, length, position, token = _load(tokens_ptr, starts_ptr, caption, BLOCK)
        inside = position < length
        kind = tl.load(kinds_ptr + start + position, mask=inside, other=0).to(tl.int32)
        chosen = inside & (kind != _KEEP_OUT)
        rows = row + tl.cumsum(chosen.to(tl.int32), 0) - 1
        row += tl.sum(chosen.to(tl.int32))
        live = chosen & (rows < capacity)
        tl.store(index_ptr + rows, start + position, mask=live)
        tl.store(targets_ptr + rows, token, mask=live)
        new = tl.where(live & (kind == _MASK), mask_id, token)
        if DRAWS_TOKEN:
            word, _, _, _ = _draw(_VALUE, position, keys_ptr + caption * 3, seed, epoch)
            nth = ((word.to(tl.int64) * num_random) >> 32).to(tl.int32)
            drawn, num_before = nth, 0
            for i in range(num_ranges):
                low = tl.load(ranges_ptr + 2 * i).to(tl.int32)
                drawn = tl.where(nth >= num_before, nth - num_before + low, drawn)
                num_before += tl.load(ranges_ptr + 2 * i + 1).to(tl.int32) - low
            new = tl.where(live & (kind == _RANDOM), drawn, new)
        tl.store(masked_ptr + start + position, new, mask=inside)
    for at in range(total + program * BLOCK_ROWS, capacity, tl.num_programs(0) * BLOCK_ROWS):
        spare = at + tl.arange(0, BLOCK_ROWS)
        tl.store(index_ptr + spare, 0, mask=spare < capacity)
        tl.store(targets_ptr + spare, _IGNORED, mask=spare < capacity)
    if program == 0:
        tl.store(num_masked_ptr, tl.minimum(total, capacity))
        tl.store(overflow_ptr, tl.maximum(total - capacity, 0))


def _select_constants(plan: MaskPlan) -> dict:
    ratio = plan.ratio
    return {
        "candidates": plan.candidates, "maskable_bit": plan.maskable, "excluded": plan.excluded,
        "unit_start": plan.unit_start, "word_start": plan.word_start, "traded": plan.shuffled,
        "rate_below": round(plan.rate * 2**32), "numerator": ratio.numerator, "denominator": ratio.denominator,
        "score": plan.score, "AMOUNT": plan.amount, "WEIGHTS": plan.weights, "HAS_UNITS": plan.unit_start != 0,
        "EXACT": plan.exact, "MAX_UNITS": len(plan.span_lengths), "SHUFFLED": plan.shuffled != 0,
    }  # fmt: skip


def _kind_constants(plan: MaskPlan) -> dict:
    mask_below, random_below = plan.thresholds
    return {
        "mask_below": mask_below, "random_below": random_below, "DRAWS_KIND": mask_below < 2**32,
        "GROUPS": plan.replace_units,
    }  # fmt: skip


@cache
def _constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers on the device, copied there once: a copy for each call would wait for it."""
    return torch.tensor(values or (0,), dtype=torch.int64, device=device)


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word: its type must not depend on its value."""
    return word - (word >> 31 << 32)


def mask_tokens_triton(
    tokens: Tensor, tags: Tensor, scores: Tensor | None, caption_starts: Tensor, caption_key: Tensor,
    plan: MaskPlan | MaskMix, seed: int, epoch: int, capacity: int, bit_weights: Tensor | None = None,
) -> MaskedTokens:  # fmt: skip
    """`mask_tokens` by Triton, whose arguments it shares."""
    for tensor in (tokens, tags, caption_starts, caption_key):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    device, num_captions = tokens.device, len(caption_starts) - 1
    plans, is_mixed = plans_of(plan), isinstance(plan, MaskMix)
    limits = (0, *plan.thresholds, 2**32) if is_mixed else (0, 2**32)
    words = {"seed": _signed(seed), "epoch": _signed(epoch)}
    block = max(16, triton.next_power_of_2(max(p.max_caption_tokens for p in plans)))
    shape = {"BLOCK": block, "num_warps": 1 if block <= 64 else 4}
    kinds = torch.empty_like(tokens, dtype=torch.int8)
    counts = torch.empty(num_captions, dtype=torch.int32, device=device)
    unused = counts  # for pointers that this plan does not follow
    for i, chosen in enumerate(plans):
        common = words | shape | _kind_constants(chosen)
        common |= {"arm_low": limits[i], "arm_high": limits[i + 1], "IS_MIXED": is_mixed}
        for stage in (chosen, chosen.otherwise):
            if stage is None:
                continue
            assert stage.weights != "bits" or bit_weights is not None, "these weights are state: the caller passes them"
            _select_kernel[(num_captions,)](
                tags, unused if scores is None else scores, caption_starts, caption_key,
                unused if bit_weights is None else bit_weights, log_table(device),
                _constant(stage.span_lengths, device), kinds, counts,
                **_select_constants(stage), **common,
                num_scores=0 if scores is None else scores.shape[1],
                HAS_FALLBACK=stage.otherwise is not None, IS_FALLBACK=stage is not chosen,
            )  # fmt: skip
        if chosen.matched:
            _match_kernel[(num_captions,)](
                tags, caption_starts, caption_key, kinds, counts, chosen.maskable, chosen.word_start, **common
            )  # fmt: skip

    ranges = plans[0].random_ranges
    result = MaskedTokens(
        torch.empty_like(tokens),
        *torch.empty(2, capacity, dtype=torch.int32, device=device).unbind(),
        *torch.empty(2, dtype=torch.int32, device=device).unbind(),
    )
    per_program = triton.cdiv(num_captions, MAX_EMIT_PROGRAMS)
    _emit_kernel[(triton.cdiv(num_captions, per_program),)](
        tokens, caption_starts, caption_key, kinds, counts, _constant(sum(ranges, ()), device), *result,
        num_captions, per_program, capacity, plans[0].mask_id, plans[0].num_random, len(ranges), **words,
        DRAWS_TOKEN=any(p.replace[1] > 0 for p in plans), BLOCK_CAPTIONS=1024, BLOCK_ROWS=128, **shape,
    )  # fmt: skip
    return result
