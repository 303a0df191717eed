"""Arms by name: what each masks on its own, what is refused and how, and how many rows a batch needs."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posmask.kernels.mask_tokens import mask_tokens
from posmask.prep.pos import BITS, CONTENT_UPOS, MASKABLE, UPOS, UPOS_BIT, WORD_START, upos_bits
from posmask.train import masking
from posmask.train.capacity import capacity
from posmask.train.masking import arm_slug, list_masks, parse_mask, random_ranges

TOKENIZER = {"mask_id": 4, "vocab_size": 1000, "never_drawn": [0, 1, 2, 3, 4, 100, 101]}
ALL_BITS = tuple(BITS)


def plan_of(spec, bits=ALL_BITS, **flags):
    return parse_mask(spec, tokenizer=TOKENIZER, bits_computed=bits, **flags).at(0.0)


def run(text, plan, rows):
    return mask_tokens(text.tokens, text.tags, None, text.caption_starts, text.caption_key, plan, 3, 1, rows)


@pytest.mark.parametrize("tag", UPOS)
def test_a_pos_arm_masks_all_its_pieces_and_nothing_else(tag, make_text):
    text = make_text(100)
    masked = run(text, plan_of(tag.lower()), 4096).tokens == 4
    assert torch.equal(masked, (text.tags & UPOS_BIT[tag] != 0) & (text.tags & MASKABLE != 0))
    assert masked.any()


def test_unions():
    assert plan_of("noun,propn").candidates == upos_bits(("NOUN", "PROPN"))
    assert plan_of("content,num").candidates == upos_bits((*CONTENT_UPOS, "NUM"))
    assert plan_of("content").candidates | plan_of("function").candidates == upos_bits(UPOS)
    assert plan_of("content").candidates & plan_of("function").candidates == 0


def test_defaults_of_the_arms():
    noun, random, whole_word = plan_of("noun"), plan_of("random"), plan_of("whole-word")
    assert (noun.amount, noun.replace) == ("all", (1.0, 0.0, 0.0))
    assert (random.amount, random.rate, random.replace, random.unit_start) == ("rate", 0.15, (0.8, 0.1, 0.1), 0)
    assert (whole_word.amount, whole_word.rate, whole_word.replace) == ("budget", 0.15, (0.8, 0.1, 0.1))
    assert whole_word.unit_start == WORD_START and not whole_word.exact
    assert random.random_ranges == ((5, 100), (102, 1000))


def test_flags_override_and_matched_takes_the_arms_settings():
    plan = plan_of("noun", amount="rate", rate=0.4, replace=[0.5, 0.25, 0.25], max_tokens=48)
    assert (plan.amount, plan.rate, plan.replace, plan.max_caption_tokens) == ("rate", 0.4, (0.5, 0.25, 0.25), 48)
    twin = plan_of("matched:noun", amount="rate", rate=0.4, replace=[0.5, 0.25, 0.25], max_tokens=48)
    assert twin == masking.replace(plan, matched=True)


@pytest.mark.parametrize(
    ("spec", "flags", "message"),
    [
        (
            "nuon",
            {},
            "'nuon' is unknown; choose from random, whole-word, adj, .* x, content, function, A,B, matched:ARM",
        ),
        ("NOUN", {}, "'NOUN' is unknown"),
        ("noun,", {}, "'' is unknown"),
        ("matched:matched:noun", {}, "'matched:noun' is unknown"),
        ("none", {}, "masked language modelling is the only objective"),
        ("matched:none", {}, "masked language modelling is the only objective"),
        ("noun,noun", {}, "names an arm twice"),
        ("noun,random", {}, "'random' does not mask all of its words"),
        ("whole-word,noun", {}, "'whole-word' does not mask all of its words"),
        ("noun", {"amount": "most"}, "--mask-amount most is unknown; choose one of all, rate, budget, one"),
        ("whole-word", {"amount": "all"}, "--mask whole-word contradicts --mask-amount all; it works with budget"),
        ("matched:random", {"amount": "all"}, "--mask matched:random contradicts --mask-amount all"),
        ("noun", {"rate": 0.3}, "--mask-rate 0.3 contradicts --mask noun with --mask-amount all"),
        ("noun", {"rate": 0.3, "amount": "one"}, "--mask-rate 0.3 contradicts --mask noun with --mask-amount one"),
        ("random", {"rate": 15}, "mask rate 15 must be above 0 and at most 1"),
        ("random", {"replace": (80, 10, 10)}, r"replace \(80, 10, 10\) must be three probabilities"),
        ("noun", {"bits": ("maskable",)}, r"--mask noun needs the bits upos, word_start, .* \(they have maskable\)"),
        ("random", {"bits": ("upos",)}, "needs the bits maskable"),
        ("matched:random", {"bits": ("maskable",)}, "--mask matched:random needs the bits word_start"),
    ],
)
def test_mistakes_are_named(spec, flags, message):
    with pytest.raises(ValueError, match=message):
        plan_of(spec, **flags)


def test_registry():
    listed = dict(list_masks())
    assert list(listed)[-2:] == ["A,B", "matched:ARM"]
    assert set(masking.ARMS) == {"random", "whole-word", "content", "function", *(tag.lower() for tag in UPOS)}
    assert all(len(line) > 20 and "\n" not in line for line in listed.values())
    assert "NOUN" in listed["noun"]
    with pytest.raises(ValueError, match="'noun' is registered twice"):
        masking.register("noun")(masking.content)


@pytest.mark.parametrize("spec", ["noun", "noun,propn", "matched:noun,propn", "whole-word", "a@0.5+b->c@0.5"])
def test_arm_slug_is_a_folder_name(spec):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", arm_slug(spec))
    assert arm_slug("matched:noun") == "matched-noun"


@given(st.integers(1, 60), st.sets(st.integers(0, 59)))
def test_random_ranges_leave_out_exactly_what_is_never_drawn(vocab_size, never):
    never = {i for i in never if i < vocab_size}
    ranges = random_ranges(vocab_size, never)
    assert [i for low, high in ranges for i in range(low, high)] == sorted(set(range(vocab_size)) - never)
    assert all(low < high for low, high in ranges)


FIXED = [(arm, amount) for arm in ("content", "matched:content") for amount in ("all", "budget", "one")]
FIXED += [("random", "budget"), ("random", "one"), ("whole-word", "budget"), ("matched:whole-word", "budget")]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_captions=st.integers(1, 80), rate=st.floats(0.01, 1.0))
@pytest.mark.parametrize(("spec", "amount"), FIXED)
def test_capacity_never_overflows_where_tags_bound_the_count(make_text, spec, amount, seed, num_captions, rate):
    text = make_text(num_captions, seed)
    plan = plan_of(spec, amount=amount, rate=rate if amount == "budget" else None)
    rows = capacity(plan, text.tags.numpy().astype(np.uint32), text.caption_starts.numpy())
    result = run(text, plan, rows)
    assert rows % 128 == 0 and rows >= 128 and result.overflow == 0
    if amount in ("all", "budget") and "whole-word" not in spec:
        assert rows == max(1, -(-int(result.num_masked) // 128)) * 128, "as small as it can be"


@pytest.mark.parametrize("spec", ["random", "content", "matched:random"])
@pytest.mark.parametrize("rate", [0.02, 0.15, 0.9, 1.0])
def test_capacity_of_a_rate(spec, rate, make_text):
    text = make_text(600, seed=5)
    plan = plan_of(spec, amount="rate", rate=rate)
    rows = capacity(plan, text.tags.numpy(), text.caption_starts.numpy())
    counts = []
    for seed in range(20):
        key = text.caption_key
        result = mask_tokens(text.tokens, text.tags, None, text.caption_starts, key, plan, seed, 0, rows)
        assert result.overflow == 0
        counts.append(result.num_masked.item())
    available = ((text.tags & MASKABLE != 0) & (text.tags & plan.candidates != 0)).sum().item()
    assert rows <= -(-available // 128) * 128
    assert rows - max(counts) < 128 + 8 * max(1.0, float(np.std(counts))), "not wasteful"
    assert abs(np.mean(counts) / (available * rate) - 1) < 0.15


def test_capacity_in_numbers(make_text):
    # 2,000 captions of one six-piece noun: with half of them masked the deviation is 6 · √(2000 / 4) = 134.2 pieces.
    noun = MASKABLE | UPOS_BIT["NOUN"]
    tags = np.array([0, noun | WORD_START, *[noun] * 5, 0] * 2000, np.uint32)
    starts = np.arange(2001, dtype=np.int32) * 8
    for rows, flags in (
        (12_032, {}),
        (6_912, {"amount": "rate", "rate": 0.5}),  # 6,000 + 6 · 134.2 = 6,805
        (12_032, {"amount": "one"}),
        (2_048, {"amount": "budget"}),  # max(1, round(.15 · 8)) = 1
        (4_096, {"amount": "budget", "rate": 0.25}),
    ):
        assert capacity(plan_of("noun", **flags), tags, starts) == rows
        assert capacity(plan_of("matched:noun", **flags), tags, starts) == rows


def test_capacity_of_an_empty_choice(make_text):
    text = make_text(3, max_words=0)
    for spec in ("noun", "random", "whole-word"):
        assert capacity(plan_of(spec), text.tags.numpy(), text.caption_starts.numpy()) == 128
