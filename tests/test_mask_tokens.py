"""Which tokens are masked and what replaces them: against a plain Python reading, in numbers, and frozen for ever."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from posmask.kernels.mask_plan import TOP_WEIGHTS, MaskMix, MaskPlan
from posmask.kernels.mask_tokens import caption_arms, mask_tokens, select_reference
from posmask.kernels.philox import ARM, SELECT, draw_words
from posmask.prep.pos import MASKABLE, UPOS_BIT, UPOS_MASK, WORD_START

NOUN = MaskPlan(candidates=UPOS_BIT["NOUN"], maskable=MASKABLE, mask_id=4, unit_start=WORD_START, word_start=WORD_START)
# Half of the classes, so that a caption has runs of candidates and gaps between them.
MANY = replace(NOUN, candidates=0b10101010101010101)
EVERY = replace(MANY, candidates=MASKABLE)
WHOLE_WORD = replace(EVERY, amount="budget", exact=False)
PIECES = replace(EVERY, unit_start=0, amount="rate")
PLANS = {
    "noun": NOUN,
    "many rate": replace(MANY, amount="rate", rate=0.5),
    "many one": replace(MANY, amount="one"),
    "many budget": replace(MANY, amount="budget", rate=0.3),
    "whole-word": WHOLE_WORD,
    "whole-word .4": replace(WHOLE_WORD, rate=0.4),
    "random": PIECES,
    "random budget": replace(PIECES, amount="budget"),
    "random one": replace(PIECES, amount="one"),
    "matched:noun": replace(NOUN, matched=True),
    "matched:many": replace(MANY, matched=True),
    "matched:random": replace(PIECES, matched=True),
}
BERT = replace(PIECES, replace=(0.8, 0.1, 0.1), random_ranges=((1, 3), (999, 1002), (5000, 5007)))
# Frozen later than those above, which hold for ever.
SPAN = replace(WHOLE_WORD, rate=0.4, span_lengths=tuple(n * 2**32 // 4 for n in (1, 2, 3, 4)), replace_units=True)
PLANS |= {
    "excluded": replace(MANY, excluded=UPOS_BIT["NUM"] | UPOS_BIT["ADJ"]),
    "weighted pieces": replace(PIECES, amount="budget", rate=0.4, weights="bits"),
    "weighted words": replace(WHOLE_WORD, rate=0.3, weights="bits"),
    "weighted one": replace(MANY, amount="one", weights="bits"),
    "by rank": replace(PIECES, amount="budget", rate=0.3, weights="rank", score=1),
    "top": replace(EVERY, amount="one", weights="top", score=1),
    "span": SPAN,
    "matched:span": replace(SPAN, matched=True),
    "shuffled": replace(NOUN, shuffled=UPOS_MASK),
    "shuffled many": replace(MANY, shuffled=UPOS_MASK),
    "noun or one": replace(NOUN, otherwise=replace(EVERY, amount="one")),
    "matched:(noun or one)": replace(NOUN, matched=True, otherwise=replace(EVERY, amount="one")),
}
PLANS["mix"] = MaskMix((PLANS["noun"], SPAN, PLANS["matched:(noun or one)"]), (0.25, 0.25, 0.5))
WEIGHTS = torch.tensor([1 + 37 * i * i % 1000 for i in range(17)], dtype=torch.int32)


def with_replacements(plan):
    """The plan with all three kinds of replacement."""
    if isinstance(plan, MaskMix):
        return replace(plan, plans=tuple(with_replacements(part) for part in plan.plans))
    return replace(plan, replace=BERT.replace, random_ranges=BERT.random_ranges)


def run(text, plan, seed=1, epoch=2, capacity=None, backend="auto"):
    capacity = len(text.tokens) if capacity is None else capacity
    return mask_tokens(
        text.tokens, text.tags, text.scores, text.caption_starts, text.caption_key, plan, seed, epoch, capacity,
        backend, WEIGHTS.to(text.tokens.device),
    )  # fmt: skip


def select(text, plan, seed=1, epoch=2):
    return select_reference(
        text.tags, text.caption_starts, text.caption_key, plan, seed, epoch, text.scores, WEIGHTS
    )  # fmt: skip


def pick(text, captions):
    """The same captions in another batch."""
    spans = [slice(*text.caption_starts[c : c + 2].tolist()) for c in captions]
    lengths = torch.tensor([0] + [span.stop - span.start for span in spans])
    columns = ("tokens", "tags", "scores")
    picked = type(text)(**{name: torch.cat([getattr(text, name)[s] for s in spans]) for name in columns})
    picked.caption_starts, picked.caption_key = lengths.cumsum(0).int(), text.caption_key[captions]
    return picked, spans


class Plainly:
    """One caption, read plainly: lists of positions, one Python loop for each rule."""

    def __init__(self, tags, scores, words, plan):
        self.plan, self.draws, self.scores = plan, words, scores
        self.length = len(tags)
        self.starts = [bool(tag & WORD_START) for tag in tags]
        self.maskable = [i for i, tag in enumerate(tags) if tag & plan.maskable]
        if plan.shuffled:
            heads = [word[0] for word in self.units(self.maskable)]
            sources = sorted(heads, key=lambda i: (words[2][i], i))
            tags, before = list(tags), tags
            for word, source in zip(self.units(self.maskable), sources, strict=True):
                for i in word:
                    tags[i] = before[i] & ~plan.shuffled | before[source] & plan.shuffled
        self.tags = tags
        self.candidates = [i for i in self.maskable if tags[i] & plan.candidates and not tags[i] & plan.excluded]

    def units(self, pieces, by_word=True):
        units = []
        for i in pieces:
            if by_word and units and units[-1][-1] == i - 1 and not self.starts[i]:
                units[-1].append(i)
            else:
                units.append([i])
        return units

    def google_loop(self, units, budget, order):
        masked = []
        for unit in sorted(units, key=lambda unit: (order(unit[0]), unit[0])):
            if len(masked) >= budget:
                break
            if len(masked) + len(unit) > budget:
                continue
            masked += unit
        return masked

    def fill(self, pieces, count, draw):
        count = min(count, len(pieces))
        words = self.google_loop(self.units(pieces), count, lambda i: self.draws[draw][i])
        if len(words) == count:
            return words
        return sorted(pieces, key=lambda i: (self.draws[draw + 1][i], i))[:count]

    def spans(self, units, budget):
        unit_of = {i: unit for unit in units for i in unit}
        masked = []
        for i in sorted(unit_of, key=lambda i: (self.draws[0][i], i)):
            unit, left = unit_of[i], 1 + sum(self.draws[1][i] >= limit for limit in self.plan.span_lengths[:-1])
            while left and unit and unit[0] not in masked and len(masked) + len(unit) <= budget:
                masked += unit
                after = unit_of.get(unit[-1] + 1)
                unit, left = after, left - 1
        return masked

    def weight(self, units):
        """Of each unit's first piece; 0 rules a unit out."""
        weights, rule = {}, self.plan.weights
        ranked = sorted((unit[0] for unit in units if self.scores[unit[0]]), key=lambda i: (-self.scores[i], i))
        for unit in units:
            i = unit[0]
            if rule == "bits":
                bits = [b for b in range(17) if self.tags[i] >> b & 1]
                weights[i] = int(WEIGHTS[bits[0]]) if bits else 1
            elif rule == "rank":
                weights[i] = len(units) - sum(self.scores[other[0]] > self.scores[i] for other in units)
            else:
                table = TOP_WEIGHTS[min(len(ranked), 3) - 1] if ranked else ()
                weights[i] = table[ranked.index(i)] if i in ranked[: len(table)] else 0
        return weights

    def race(self, i, weight):
        word = self.draws[0][i]
        zeros = 32 - word.bit_length()
        entry = (word << zeros + 1 & 0xFFFFFFFF) >> 20
        log = zeros * 2**20 + round(2**20 * (1 - math.log2(1 + (entry + 0.5) / 4096)))
        return log * (2**24 // weight)

    def masked(self):
        plan = self.plan
        units = self.units(self.candidates, by_word=plan.unit_start != 0)
        budget = max(1, round(self.length * plan.rate))
        weights = None if plan.weights == "equal" else self.weight(units)
        if weights is not None:
            units = [unit for unit in units if weights[unit[0]]]

        def order(i):
            return self.draws[0][i] if weights is None else self.race(i, weights[i])

        if plan.amount == "rate":
            chosen = [i for unit in units if self.draws[0][unit[0]] < plan.rate * 2**32 for i in unit]
        elif plan.amount == "one":
            chosen = min(units, key=lambda unit: (order(unit[0]), unit[0]), default=[])
        elif plan.span_lengths:
            chosen = self.spans(units, budget)
        elif plan.amount == "budget" and plan.unit_start and plan.exact:
            chosen = self.fill(self.candidates, budget, 0)
        elif plan.amount == "budget":
            chosen = self.google_loop(units, budget, order)
        else:
            chosen = self.candidates
        if plan.otherwise and not units:
            chosen = Plainly(self.tags, self.scores, self.draws, plan.otherwise).masked()
        return self.fill(self.maskable, len(chosen), 2) if plan.matched else chosen


@pytest.mark.parametrize("name", PLANS)
def test_equals_a_plain_reading_on_512_captions(name, make_text, poisoned_memory):
    text, plan = make_text(512), PLANS[name]
    chosen = select(text, plan).tolist()
    tags, scores, starts = text.tags.tolist(), text.scores.tolist(), text.caption_starts.tolist()
    lengths = text.caption_starts.long().diff()
    caption = torch.arange(512).repeat_interleave(lengths)
    position = torch.arange(len(tags)) - text.caption_starts.long()[caption]
    draws = [word.tolist() for word in draw_words(SELECT, position, caption, text.caption_key, 1, 2)]
    arms = caption_arms(text.caption_key, plan, 1, 2).tolist()
    expected = []
    for c, (a, b) in enumerate(pairwise(starts)):
        mine = plan.plans[arms[c]] if isinstance(plan, MaskMix) else plan
        column = [score[mine.score] for score in scores[a:b]]
        masked = set(Plainly(tags[a:b], column, [word[a:b] for word in draws], mine).masked())
        expected += [i in masked for i in range(b - a)]
    assert chosen == expected
    assert 0.01 < sum(chosen) / len(chosen) < 0.9, "the comparison has something to compare"


def test_arms_of_a_mix_are_drawn_with_their_shares(make_text):
    text, mix = make_text(4000, max_words=0), PLANS["mix"]
    arms = caption_arms(text.caption_key, mix, 1, 2)
    word = draw_words(ARM, torch.zeros(4000, dtype=torch.int64), torch.arange(4000), text.caption_key, 1, 2)[0]
    assert torch.equal(arms, (word >= 2**30).long() + (word >= 2**31).long())
    for i, share in enumerate(mix.shares):
        assert abs((arms == i).sum() - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


def test_one_replacement_for_a_whole_unit(make_text):
    text = make_text(2000)
    plan = replace(with_replacements(SPAN), replace=(0.5, 0.0, 0.5))
    result, whole = run(text, plan), run(text, replace(plan, replace=(1.0, 0.0, 0.0)))
    masked, chosen = result.tokens == 4, whole.tokens == 4
    assert 0.45 < masked.sum() / chosen.sum() < 0.55
    # Neighbours in a caption that are both chosen belong to one span, unless two spans meet.
    follows = chosen[1:] & chosen[:-1]
    assert (masked[1:] == masked[:-1])[follows].float().mean() > 0.85
    inside_word = follows & (text.tags[1:] & WORD_START == 0)
    assert torch.equal(masked[1:][inside_word], masked[:-1][inside_word])


def test_budget_is_the_one_of_bert():
    for rate in (0.15, 0.2, 0.5, 0.4):
        lengths = torch.arange(1, 256)
        expected = [max(1, round(n * rate)) for n in range(1, 256)]
        assert replace(WHOLE_WORD, rate=rate).budget(lengths).tolist() == expected
        assert replace(WHOLE_WORD, rate=rate).budget(lengths.numpy()).tolist() == expected


def test_exact_budget_and_one_piece(make_text):
    text = make_text(400)
    lengths = text.caption_starts.long().diff()

    def per_caption(chosen):
        return torch.stack([part.sum() for part in chosen.split(lengths.tolist())])

    available = per_caption(text.tags & MASKABLE != 0)
    for name in ("random budget", "many budget"):
        plan = PLANS[name]
        candidates = per_caption((text.tags & plan.candidates != 0) & (text.tags & MASKABLE != 0))
        assert torch.equal(per_caption(select(text, plan)), torch.minimum(plan.budget(lengths), candidates))
    assert torch.equal(per_caption(select(text, PLANS["random one"])), available.clamp(max=1))


@pytest.mark.parametrize("name", PLANS)
def test_a_caption_has_the_same_mask_in_any_batch(name, make_text):
    text, plan = make_text(60), with_replacements(PLANS[name])
    whole = run(text, plan).tokens
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    for captions in (shuffled, shuffled[:17], [shuffled[0]]):
        part, spans = pick(text, captions)
        assert torch.equal(run(part, plan).tokens, torch.cat([whole[s] for s in spans]))


@pytest.mark.parametrize("change", ["seed", "epoch", "masking", "caption", "id"])
def test_everything_in_the_key_changes_the_mask(change, make_text):
    text = make_text(200)
    before = select(text, PIECES)
    settings = {change: 7} if change in ("seed", "epoch") else {}
    column, added = {"masking": (0, 1 << 16), "caption": (0, 1), "id": (2, 1)}.get(change, (0, 0))
    text.caption_key[:, column] += added
    after = select(text, PIECES, **settings)
    # Independent masks agree on .15² of the places.
    agreement = (before & after).sum() / (text.tags & MASKABLE != 0).sum()
    assert 0.01 < agreement < 0.04


@pytest.mark.parametrize("rate", [0.001, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("unit_start", [0, WORD_START])
def test_bernoulli_rate(rate, unit_start, make_text):
    text = make_text(1500)
    chosen = select(text, replace(PIECES, rate=rate, unit_start=unit_start))
    # A unit's first piece is drawn for all of it; counting first pieces keeps the draws independent.
    heads = select(text, replace(EVERY, unit_start=unit_start)) & (text.tags & WORD_START != 0)
    n = heads.sum().item()
    assert abs((chosen & heads).sum().item() - n * rate) <= 4 * (n * rate * (1 - rate)) ** 0.5


def test_replacements(make_text):
    text = make_text(1500)
    plan = replace(BERT, rate=1.0)
    result = run(text, plan)
    n = result.num_masked.item()
    new, true = result.tokens[result.index[:n].long()], result.targets[:n]
    assert torch.equal(true, text.tokens[result.index[:n].long()])
    masked, kept = new == plan.mask_id, new == true
    drawn = new[~masked & ~kept]
    for count, rate in ((masked.sum(), 0.8), (kept.sum(), 0.1), (torch.tensor(len(drawn)), 0.1)):
        # A random token equals the true one now and then, hence the 0.001.
        assert abs(count.item() - n * rate) <= 4 * (n * rate * (1 - rate)) ** 0.5 + 0.001 * n
    allowed = [1, 2, 999, 1000, 1001, *range(5000, 5007)]
    counts = torch.bincount(drawn, minlength=5007)
    assert counts.sum() == counts[allowed].sum(), "only allowed ids"
    expected = len(drawn) / len(allowed)
    assert (counts[allowed] - expected).abs().max() <= 4.5 * expected**0.5, "each equally often"


def test_always_mask_never_keeps(make_text):
    text = make_text(50)
    result = run(text, EVERY)
    assert torch.equal(result.tokens == 4, text.tags & MASKABLE != 0)
    only_random = run(text, replace(EVERY, replace=(0, 1, 0), random_ranges=((2000, 2001),))).tokens
    assert torch.equal(only_random == 2000, text.tags & MASKABLE != 0)
    kept = run(text, replace(EVERY, replace=(0, 0, 1)))
    assert torch.equal(kept.tokens, text.tokens) and kept.num_masked == (text.tags & MASKABLE != 0).sum()


def test_rows_are_packed_and_spare_rows_marked(make_text, poisoned_memory):
    text = make_text(30)
    chosen = select(text, MANY).nonzero().flatten()
    result = run(text, MANY, capacity=len(chosen) + 5)
    assert result.num_masked == len(chosen) and result.overflow == 0
    assert torch.equal(result.index[:-5].long(), chosen) and not result.index[-5:].any()
    assert torch.equal(result.targets[:-5], text.tokens[chosen]) and (result.targets[-5:] == -100).all()
    untouched = torch.ones_like(text.tags, dtype=torch.bool)
    untouched[chosen] = False
    assert torch.equal(result.tokens[untouched], text.tokens[untouched])
    assert [x.dtype for x in result] == [torch.int32] * 5


def test_overflow_is_counted_and_leaves_the_rest_whole(make_text, poisoned_memory):
    text = make_text(30)
    whole = run(text, MANY)
    n = whole.num_masked.item()
    short = run(text, MANY, capacity=n - 3)
    assert short.overflow == 3 and short.num_masked == n - 3
    assert torch.equal(short.index, whole.index[: n - 3]) and torch.equal(short.targets, whole.targets[: n - 3])
    lost = whole.index[n - 3 : n].long()
    assert torch.equal(short.tokens[lost], text.tokens[lost])
    assert run(text, MANY, capacity=n).overflow == 0, "exactly full is not an overflow"


@pytest.mark.parametrize("name", PLANS)
def test_degenerate_batches(name, make_text, poisoned_memory):
    plan, text = PLANS[name], make_text(9)
    nothing = type(text)(**{**vars(text), "tags": torch.zeros_like(text.tags)})
    result = run(nothing, plan)
    assert result.num_masked == 0 and torch.equal(result.tokens, text.tokens) and (result.targets == -100).all()

    # One-token captions, all maskable with every tag, and a caption without tokens between them.
    single = type(text)(
        tokens=torch.tensor([7, 8], dtype=torch.int32),
        tags=torch.full((2,), MASKABLE | WORD_START | (1 << 17) - 1, dtype=torch.int32),
        scores=torch.full((2, 2), 200, dtype=torch.uint8),
        caption_starts=torch.tensor([0, 1, 1, 2], dtype=torch.int32),
        caption_key=text.caption_key[:3],
    )
    result = run(single, plan if isinstance(plan, MaskMix) else replace(plan, rate=1.0))
    if name == "excluded":
        assert result.num_masked == 0
        return
    assert result.num_masked == 2 and result.tokens.tolist() == [4, 4] and result.targets.tolist() == [7, 8]


@pytest.mark.parametrize("name", ["noun", "many rate", "whole-word", "random"])
def test_matched_masks_as_many_in_each_caption(name, make_text):
    text, plan = make_text(300), PLANS[name]
    lengths = text.caption_starts.diff().tolist()
    ours, twin = select(text, plan), select(text, replace(plan, matched=True))
    assert [part.sum() for part in ours.split(lengths)] == [part.sum() for part in twin.split(lengths)]
    assert not (twin & (text.tags & MASKABLE == 0)).any()
    assert not torch.equal(ours, twin)


def test_matched_places_are_uniform_and_independent(make_text):
    # 4,000 times the caption [CLS] w w n w n w [SEP] of one-piece words, 2 of 6 masked.
    word, noun = MASKABLE | WORD_START | UPOS_BIT["DET"], MASKABLE | WORD_START | UPOS_BIT["NOUN"]
    text = make_text(4000, max_words=0)
    text.tags = torch.tensor([0, word, word, noun, word, noun, word, 0] * 4000, dtype=torch.int32)
    text.tokens = torch.full_like(text.tags, 9)
    text.caption_starts = torch.arange(4001, dtype=torch.int32) * 8
    twin = select(text, replace(NOUN, matched=True)).view(4000, 8)
    assert (twin.sum(1) == 2).all()
    z = (twin.sum(0)[1:7] - 4000 / 3) / (4000 * 2 / 9) ** 0.5
    assert z.abs().max() < 4
    # Each of the 15 pairs equally often: 99.9 % quantile of chi² with 14 degrees of freedom is 36.1.
    pairs = torch.bincount((twin[:, 1:7].long() * 2 ** torch.arange(6)).sum(1), minlength=64)
    pairs = pairs[pairs > 0]
    assert len(pairs) == 15 and ((pairs - 4000 / 15) ** 2 / (4000 / 15)).sum() < 36.1


def test_one_is_uniform_over_units(make_text):
    # [CLS] a b ##b c [SEP]: the middle word has two pieces and must be no likelier than the others.
    start = MASKABLE | WORD_START | UPOS_BIT["NOUN"]
    text = make_text(3000, max_words=0)
    text.tags = torch.tensor([0, start, start, start & ~WORD_START, start, 0] * 3000, dtype=torch.int32)
    text.tokens, text.caption_starts = torch.full_like(text.tags, 9), torch.arange(3001, dtype=torch.int32) * 6
    chosen = select(text, replace(NOUN, amount="one")).view(3000, 6)
    assert torch.equal(chosen[:, 2], chosen[:, 3])
    assert (chosen[:, [1, 2, 4]].sum(1) == 1).all()
    assert ((chosen[:, [1, 2, 4]].sum(0) - 1000).abs() < 4 * (3000 * 2 / 9) ** 0.5).all()


# The first digits of SHA-256 over the masked tokens and the index. They depend on nothing but this package: a change
# here changes every mask that anybody has trained with, and needs a new format version instead.
GOLDEN = {
    "noun": "9b14ca460f3f2e18",
    "many rate": "72b48b2625aeb460",
    "many one": "994d64fd71eef061",
    "many budget": "0088ab4e55f10ee5",
    "whole-word": "eb9592f70c26dac7",
    "whole-word .4": "0362e73aa2a9f98c",
    "random": "8443df71fefe89f2",
    "random budget": "0eb11f75bae361ed",
    "random one": "8fe4d771ad94a315",
    "matched:noun": "9ca13f46704d3067",
    "matched:many": "aa5ca84e932ba77d",
    "matched:random": "3b33c73d1de367ca",
    "excluded": "60cd19c300843a01",
    "weighted pieces": "f0cdea82b32280b4",
    "weighted words": "32039eba5f804e03",
    "weighted one": "e15c68fffe56a0ca",
    "by rank": "aa5cf528860f5dc3",
    "top": "1d799ea80b5e720a",
    "span": "57965cebf8b9acd6",
    "matched:span": "f287dcda6a34c192",
    "shuffled": "ec60da58c382bd8d",
    "shuffled many": "7bc1b3e08633cc2b",
    "noun or one": "b9bb92ad9c952dbc",
    "matched:(noun or one)": "cab2ddded68c93a4",
    "mix": "155c6d04cbeff90d",
}


@pytest.mark.parametrize("name", PLANS)
def test_masks_are_frozen(name, make_text):
    plan = with_replacements(PLANS[name])
    # Not from make_text: NumPy may change its streams.
    i = torch.arange(400, dtype=torch.int64)
    text = make_text(20)
    text.caption_starts = torch.arange(21, dtype=torch.int32) * 20
    inside = (i % 20 != 0) & (i % 20 != 19)
    tags = 1 << (i * i + i // 7) % 17 | torch.where(i % 3 != 1, WORD_START, 0) | MASKABLE
    text.tags, text.tokens = torch.where(inside, tags, 0).int(), (10 + i).int()
    text.scores = torch.stack([i * 7 % 5 * 50, i * 11 % 6 * 51], 1).to(torch.uint8)
    c = torch.arange(20)
    text.caption_key = torch.stack([c % 5 | 1 << 16, c * 40503, -c], 1).int()
    result = run(text, plan, seed=2024, epoch=3)
    written = ",".join(map(str, [*result.tokens.tolist(), *result.index[: result.num_masked].tolist()]))
    assert hashlib.sha256(written.encode()).hexdigest()[:16] == GOLDEN[name]


def test_a_caption_longer_than_the_plan_allows_is_an_error(make_text):
    with pytest.raises(RuntimeError, match="out of bounds"):
        select(make_text(50), replace(WHOLE_WORD, max_caption_tokens=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"amount": "most"}, "'most' is unknown; choose one of all, rate, budget, one"),
        ({"rate": 0.0}, "mask rate 0.0 must be above 0"),
        ({"rate": 1.5}, "mask rate 1.5 must be above 0 and at most 1"),
        ({"rate": float("nan")}, "mask rate nan"),
        ({"replace": (0.8, 0.1, 0.2)}, "sum to 1"),
        ({"replace": (1.1, -0.1, 0.0)}, "three probabilities"),
        ({"replace": (0.5, 0.5)}, "three probabilities"),
        ({"replace": (0.8, 0.1, 0.1), "random_ranges": ()}, "the vocabulary offers none"),
    ],
)
def test_wrong_plans_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(NOUN, **changes)


def on_device(text, device):
    return type(text)(**{field: value.to(device) for field, value in vars(text).items()})


def assert_backends_agree(text, plan, capacity, device):
    ours = run(on_device(text, device), plan, seed=2**32 - 5, capacity=capacity, backend="triton")
    reference = run(text, plan, seed=2**32 - 5, capacity=capacity, backend="torch")
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine.cpu(), theirs)
    return reference


def bounded(plan, num_tokens):
    """The plan for captions of at most `num_tokens`: the kernels' blocks follow."""
    if isinstance(plan, MaskMix):
        return replace(plan, plans=tuple(bounded(part, num_tokens) for part in plan.plans))
    return replace(plan, max_caption_tokens=num_tokens)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU test runs the same kernels compiled")
@pytest.mark.parametrize("name", PLANS)
def test_triton_equals_the_reference_in_the_interpreter(name, make_text, poisoned_memory):
    # 7 captions of 2 to 15 tokens: off every block's grid.
    text, plan = make_text(7, seed=52, max_words=4), bounded(with_replacements(PLANS[name]), 18)
    result = assert_backends_agree(text, plan, len(text.tokens) + 3, "cpu")
    assert result.num_masked > 0
    assert assert_backends_agree(text, plan, 1, "cpu").overflow == result.num_masked - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU test runs the same kernels compiled")
@pytest.mark.parametrize("name", ["random", "matched:many", "mix"])
def test_triton_on_degenerate_batches(name, make_text, poisoned_memory):
    plan, text = bounded(with_replacements(PLANS[name]), 18), make_text(3, seed=3, max_words=4)
    every = MASKABLE | WORD_START | UPOS_MASK
    shapes = {
        "no candidate": ([0] * 9, [0, 4, 9]),
        "all candidates": ([every] * 9, [0, 4, 9]),
        "one token": ([every], [0, 1]),
        "captions without tokens": ([every] * 2, [0, 1, 1, 2]),
    }
    for tags, starts in shapes.values():
        case = type(text)(
            tokens=text.tokens[: len(tags)], tags=torch.tensor(tags, dtype=torch.int32),
            scores=text.scores[: len(tags)], caption_starts=torch.tensor(starts, dtype=torch.int32),
            caption_key=text.caption_key[: len(starts) - 1],
        )  # fmt: skip
        assert_backends_agree(case, plan, 128, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_triton_equals_the_reference_on_a_gpu(name, make_text):
    plan = with_replacements(PLANS[name])
    for num_captions in (1, 7, 1100):
        text = make_text(num_captions, seed=num_captions)
        for capacity in (1, 128, len(text.tokens) + 3):
            assert_backends_agree(text, plan, capacity, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_a_gpu_is_never_waited_for(name, make_text):
    plan, text = with_replacements(PLANS[name]), on_device(make_text(300), "cuda")
    weights = WEIGHTS.cuda()

    def masked():
        return mask_tokens(
            text.tokens, text.tags, text.scores, text.caption_starts, text.caption_key, plan, 1, 2, 1024,
            bit_weights=weights,
        )  # fmt: skip

    expected = masked()  # compiles, and copies constants to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        masked()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = masked()
    for tensor in result:
        tensor.fill_(-7)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("name", PLANS)
def test_nothing_waits_for_the_device(name, make_text):
    # Meta tensors have shapes and no values: what would need a value (.item(), nonzero, a mask as index) raises.
    text = make_text(5)
    text = type(text)(**{field: value.to("meta") for field, value in vars(text).items()})
    result = run(text, with_replacements(PLANS[name]), capacity=128)
    assert [x.shape for x in result] == [text.tokens.shape, (128,), (128,), (), ()]
    with pytest.raises(RuntimeError):
        result.num_masked.item()
