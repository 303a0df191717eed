"""Which tokens are masked and what replaces them: against a plain Python reading, in numbers, and frozen for ever."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from posmask.kernels.mask_plan import MaskPlan
from posmask.kernels.mask_tokens import mask_tokens, select_reference
from posmask.kernels.philox import SELECT, draw_words
from posmask.prep.pos import MASKABLE, UPOS_BIT, WORD_START

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


def run(text, plan, seed=1, epoch=2, capacity=None):
    capacity = len(text.tokens) if capacity is None else capacity
    key = text.caption_key
    return mask_tokens(text.tokens, text.tags, None, text.caption_starts, key, plan, seed, epoch, capacity)


def select(text, plan, seed=1, epoch=2):
    return select_reference(text.tags, text.caption_starts, text.caption_key, plan, seed, epoch)


def pick(text, captions):
    """The same captions in another batch."""
    spans = [slice(*text.caption_starts[c : c + 2].tolist()) for c in captions]
    lengths = torch.tensor([0] + [span.stop - span.start for span in spans])
    picked = type(text)(
        tokens=torch.cat([text.tokens[s] for s in spans]), tags=torch.cat([text.tags[s] for s in spans])
    )
    picked.caption_starts, picked.caption_key = lengths.cumsum(0).int(), text.caption_key[captions]
    return picked, spans


class Plainly:
    """One caption, read plainly: lists of positions, one Python loop for each rule."""

    def __init__(self, tags, words, plan):
        self.plan, self.draws = plan, words
        self.length = len(tags)
        self.starts = [bool(tag & WORD_START) for tag in tags]
        self.maskable = [i for i, tag in enumerate(tags) if tag & plan.maskable]
        self.candidates = [i for i in self.maskable if tags[i] & plan.candidates]

    def units(self, pieces, by_word=True):
        units = []
        for i in pieces:
            if by_word and units and units[-1][-1] == i - 1 and not self.starts[i]:
                units[-1].append(i)
            else:
                units.append([i])
        return units

    def google_loop(self, units, budget, draw):
        masked = []
        for unit in sorted(units, key=lambda unit: (self.draws[draw][unit[0]], unit[0])):
            if len(masked) >= budget:
                break
            if len(masked) + len(unit) > budget:
                continue
            masked += unit
        return masked

    def fill(self, pieces, count, draw):
        count = min(count, len(pieces))
        words = self.google_loop(self.units(pieces), count, draw)
        if len(words) == count:
            return words
        return sorted(pieces, key=lambda i: (self.draws[draw + 1][i], i))[:count]

    def masked(self):
        plan = self.plan
        units = self.units(self.candidates, by_word=plan.unit_start != 0)
        budget = max(1, round(self.length * plan.rate))
        if plan.amount == "rate":
            chosen = [i for unit in units if self.draws[0][unit[0]] < plan.rate * 2**32 for i in unit]
        elif plan.amount == "one":
            chosen = min(units, key=lambda unit: (self.draws[0][unit[0]], unit[0]), default=[])
        elif plan.amount == "budget" and plan.unit_start and plan.exact:
            chosen = self.fill(self.candidates, budget, 0)
        elif plan.amount == "budget":
            chosen = self.google_loop(units, budget, 0)
        else:
            chosen = self.candidates
        return self.fill(self.maskable, len(chosen), 2) if plan.matched else chosen


@pytest.mark.parametrize("name", PLANS)
def test_equals_a_plain_reading_on_512_captions(name, make_text, poisoned_memory):
    text, plan = make_text(512), PLANS[name]
    chosen = select(text, plan).tolist()
    tags, starts = text.tags.tolist(), text.caption_starts.tolist()
    lengths = text.caption_starts.long().diff()
    caption = torch.arange(512).repeat_interleave(lengths)
    position = torch.arange(len(tags)) - text.caption_starts.long()[caption]
    draws = [word.tolist() for word in draw_words(SELECT, position, caption, text.caption_key, 1, 2)]
    expected = []
    for a, b in pairwise(starts):
        masked = set(Plainly(tags[a:b], [word[a:b] for word in draws], plan).masked())
        expected += [i in masked for i in range(b - a)]
    assert chosen == expected
    assert 0.01 < sum(chosen) / len(chosen) < 0.9, "the comparison has something to compare"


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
    text, plan = make_text(60), replace(PLANS[name], replace=BERT.replace, random_ranges=BERT.random_ranges)
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
        caption_starts=torch.tensor([0, 1, 1, 2], dtype=torch.int32),
        caption_key=text.caption_key[:3],
    )
    result = run(single, replace(plan, rate=1.0))
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
}


@pytest.mark.parametrize("name", PLANS)
def test_masks_are_frozen(name, make_text):
    plan = replace(PLANS[name], replace=BERT.replace, random_ranges=BERT.random_ranges)
    # Not from make_text: NumPy may change its streams.
    i = torch.arange(400, dtype=torch.int64)
    text = make_text(20)
    text.caption_starts = torch.arange(21, dtype=torch.int32) * 20
    inside = (i % 20 != 0) & (i % 20 != 19)
    tags = 1 << (i * i + i // 7) % 17 | torch.where(i % 3 != 1, WORD_START, 0) | MASKABLE
    text.tags, text.tokens = torch.where(inside, tags, 0).int(), (10 + i).int()
    c = torch.arange(20)
    text.caption_key = torch.stack([c % 5 | 1 << 16, c * 40503, -c], 1).int()
    result = run(text, plan, seed=2024, epoch=3)
    written = ",".join(map(str, [*result.tokens.tolist(), *result.index[: result.num_masked].tolist()]))
    assert hashlib.sha256(written.encode()).hexdigest()[:16] == GOLDEN[name]


def test_a_caption_longer_than_the_plan_allows_is_an_error(make_text):
    with pytest.raises(IndexError):
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


def test_unknown_backend(make_text):
    text = make_text(2)
    with pytest.raises(ValueError, match=r"'triton'.*'torch' is the only one built"):
        mask_tokens(
            text.tokens, text.tags, None, text.caption_starts, text.caption_key, NOUN, 0, 0, 128, backend="triton"
        )


@pytest.mark.parametrize("name", PLANS)
def test_nothing_waits_for_the_device(name, make_text):
    # Meta tensors have shapes and no values: what would need a value (.item(), nonzero, a mask as index) raises.
    text = make_text(5)
    text = type(text)(**{field: value.to("meta") for field, value in vars(text).items()})
    result = run(text, replace(PLANS[name], replace=BERT.replace, random_ranges=BERT.random_ranges), capacity=128)
    assert [x.shape for x in result] == [text.tokens.shape, (128,), (128,), (), ()]
    with pytest.raises(RuntimeError):
        result.num_masked.item()
