"""Masks by name: what a specification and its flags mean, and what is refused and how."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posmask.kernels.mask_plan import MaskMix
from posmask.kernels.mask_tokens import mask_tokens
from posmask.prep.pos import (
    BITS,
    CONTENT_UPOS,
    FUNCTION_WORD,
    MASKABLE,
    PHRASE_START,
    UPOS,
    UPOS_BIT,
    WORD_START,
    upos_bits,
)
from posmask.train import masking
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


def test_mixes_and_schedules():
    masks = masking.parse_mask("noun@0.7+verb@0.3->random@0.5->adj@0.75", tokenizer=TOKENIZER, bits_computed=ALL_BITS)
    mix = masks.at(0.0)
    assert isinstance(mix, MaskMix) and mix.shares == (0.7, 0.3)
    assert [part.candidates for part in mix.plans] == [UPOS_BIT["NOUN"], UPOS_BIT["VERB"]]
    assert masks.at(0.4999) == mix and masks.policy == ""
    assert masks.at(0.5) == masks.at(0.7499) == plan_of("random")
    assert masks.at(0.75) == masks.at(0.999) == plan_of("adj")


def test_decay():
    decay = masking.parse_mask("decay:random", tokenizer=TOKENIZER, bits_computed=ALL_BITS)
    rates = [decay.at(t).rate for t in (0.0, 0.5, 1.0)]
    assert rates == pytest.approx([0.32, 0.17, 0.02])  # p(1 + cos(πt)) + 0.02 with p = 0.15
    linear = masking.parse_mask("decay-linear:noun", tokenizer=TOKENIZER, bits_computed=ALL_BITS, rate=0.3)
    assert (linear.at(0.0).amount, linear.at(0.0).candidates) == ("rate", UPOS_BIT["NOUN"])
    assert [linear.at(t).rate for t in (0.0, 0.5, 0.75)] == pytest.approx([0.6, 0.3, 0.15])
    assert masking.parse_mask("decay:noun", tokenizer=TOKENIZER, bits_computed=ALL_BITS, rate=0.9).at(0).rate == 1.0


def test_when_empty_and_unit():
    plan = plan_of("verb", when_empty="content", replace=(0.5, 0.0, 0.5))
    fallback = plan.otherwise
    assert (fallback.candidates, fallback.excluded, fallback.amount) == (MASKABLE, FUNCTION_WORD, "one")
    assert plan_of("verb", when_empty="random").otherwise.amount == "budget"
    assert plan_of("object", when_empty="random").otherwise == plan_of("object").otherwise, "an arm's own comes first"
    assert plan_of("random", unit="phrase").unit_start == PHRASE_START
    assert plan_of("noun", unit="piece").unit_start == 0


def test_only_one_arm_may_learn():
    masks = masking.parse_mask("random->weighted@0.5", tokenizer=TOKENIZER, bits_computed=ALL_BITS)
    assert masks.policy == "loss"


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
            "'nuon' is unknown; choose from random, whole-word, adj, .* x, content, function, .*A,B, matched:ARM",
        ),
        ("NOUN", {}, "'NOUN' is unknown"),
        ("noun,", {}, "'' is unknown"),
        ("matched:matched:noun", {}, "'matched:matched' is unknown before a colon; choose from random"),
        ("twin:noun", {}, "'twin' is unknown before a colon"),
        ("noun@0.5", {}, r"a mix has several arms, such as noun@0.5\+random@0.5"),
        ("noun@0.5+verb", {}, "'verb' needs a share, such as verb@0.5"),
        ("noun@half+verb@0.5", {}, "'noun@half' needs a share, such as noun@0.5"),
        ("noun@0.5+verb@0.6", {}, r"shares \(0.5, 0.6\) of a mix must .* sum to 1"),
        ("content-high@0.5+verb@0.5", {}, "an arm that is a mix itself cannot be in another"),
        ("noun->verb", {}, "'verb' needs a share, such as verb@0.5"),
        ("noun->verb@0.5->adj@0.5", {}, "the switch at 0.5 must come after 0.5 and before 1"),
        ("noun->verb@1", {}, "the switch at 1 must come after 0 and before 1"),
        ("decay:object", {}, "an arm that masks one unit a caption has no rate that could fall"),
        ("shuffled:random", {}, "--mask shuffled:random: random does not go by tags"),
        ("shuffled:concrete", {"scores": ("concreteness",)}, "concrete does not go by tags"),
        ("span", {"unit": "piece"}, "--mask span contradicts --mask-unit piece; spans are made of words"),
        ("noun", {"unit": "sentence"}, "--mask-unit sentence is unknown; choose one of piece, word, phrase"),
        ("noun", {"when_empty": "cry"}, "--when-empty cry is unknown; choose one of skip, random, content"),
        ("concrete", {}, "needs the score concreteness, which these shards lack; build them with --concreteness FILE"),
        ("difference", {"scores": ("concreteness",)}, "needs the score difference, .* --frequencies FILE"),
        ("entity", {"bits": ("maskable",)}, "--mask entity needs the bits phrase_start, which these shards lack"),
        ("pmi", {"bits": ("maskable",)}, "--mask pmi needs the bits collocation_start, which"),
        ("object", {"bits": ("maskable", "word_start")}, "--mask object needs the bits function_word, object, which"),
        (
            "noun", {"bits": ("maskable", "word_start", "upos"), "when_empty": "content"},
            "needs the bits function_word",
        ),
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
    listed = {name: line for name, _, line in list_masks()}
    published = "random whole-word content function object content-high concrete difference span entity pmi weighted"
    assert set(masking.ARMS) >= {*published.split(), *(tag.lower() for tag in UPOS)}
    assert all(arm.source for arm in masking.ARMS.values())
    assert all(len(line) > 15 and "\n" not in line for line in listed.values())
    assert "NOUN" in listed["noun"]
    with pytest.raises(ValueError, match="'noun' is registered twice"):
        masking.register("noun", "nobody")(masking.content)


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
