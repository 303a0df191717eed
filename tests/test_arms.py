"""Every arm on random captions: what it may mask and how much, and that its static capacity holds it."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posmask.kernels.mask_plan import MaskMix
from posmask.kernels.mask_tokens import caption_arms, mask_tokens
from posmask.prep import build_shards, pos
from posmask.prep.pos import BITS, MASKABLE, UPOS_BIT, WORD_START
from posmask.train.capacity import capacity
from posmask.train.loader import Shards, caption_keys
from posmask.train.masking import ARMS, parse_mask

TOKENIZER = {"mask_id": 4, "vocab_size": 1000, "never_drawn": [0, 1, 2, 3, 4, 100, 101]}
SCORES = ("concreteness", "difference")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WEIGHTS = torch.arange(1, 18, dtype=torch.int32)


def plan_of(spec, bits=tuple(BITS), **flags):
    return parse_mask(spec, tokenizer=TOKENIZER, bits_computed=bits, scores=SCORES, **flags).at(0.1)


def run(text, plan, rows):
    return mask_tokens(
        text.tokens, text.tags, text.scores, text.caption_starts, text.caption_key, plan, 3, 1, rows,
        bit_weights=WEIGHTS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def make_rich_text(make_text):
    """make_text with all the other bits: start bits at word starts, classes for whole words."""

    def make(num_captions, seed=0):
        text, rng = make_text(num_captions, seed), np.random.default_rng(seed)
        tags = text.tags.numpy().astype(np.int64)
        starts = (tags & WORD_START) != 0
        word = np.cumsum(starts)
        for bit, share in ((pos.PHRASE_START, 0.6), (pos.COLLOCATION_START, 0.7)):
            tags |= np.where(starts & (rng.random(len(tags)) < share), bit, 0)
        for bit, share in ((pos.FUNCTION_WORD, 0.4), (pos.OBJECT, 0.2)):
            tags |= np.where((rng.random(word.max() + 1) < share)[word] & ((tags & MASKABLE) != 0), bit, 0)
        text.tags = torch.from_numpy(tags.astype(np.int32))
        return text

    return make


def units(tags, is_candidate, start_bit):
    """Runs of candidates of one caption, as lists of positions."""
    runs = []
    for i, tag in enumerate(tags):
        if not is_candidate(tag):
            continue
        if runs and runs[-1][-1] == i - 1 and start_bit and not tag & start_bit:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def is_maskable(tag):
    return bool(tag & MASKABLE)


def is_content(tag):
    return is_maskable(tag) and not tag & pos.FUNCTION_WORD


# Arm: (which pieces it may mask, the bit that begins its units, how many pieces of a caption of `length` tokens).
CONTENT = pos.upos_bits(pos.CONTENT_UPOS)
BUDGET = "at most 15 %"
RULES = {
    "random": (is_maskable, 0, None),
    "whole-word": (is_maskable, WORD_START, BUDGET),
    "span": (is_maskable, WORD_START, BUDGET),
    "entity": (is_maskable, pos.PHRASE_START, None),
    "pmi": (is_maskable, pos.COLLOCATION_START, BUDGET),
    "weighted": (is_maskable, WORD_START, BUDGET),
    "bandit": (is_maskable, WORD_START, "at most 30 %"),
    "difference": (is_maskable, 0, "15 %"),
    "concrete": (is_maskable, WORD_START, "one"),
    "object": (lambda tag: is_maskable(tag) and (tag & pos.OBJECT or is_content(tag)), 0, "one"),
    "content-high": (is_maskable, 0, "one"),
    "content": (lambda tag: is_maskable(tag) and tag & CONTENT, 0, "all"),
    "function": (lambda tag: is_maskable(tag) and tag & (pos.UPOS_MASK & ~CONTENT), 0, "all"),
    "none": (lambda tag: False, 0, "all"),
    **{tag.lower(): (lambda t, bit=bit: is_maskable(t) and t & bit, 0, "all") for tag, bit in UPOS_BIT.items()},
}


def test_every_arm_has_a_rule():
    assert set(RULES) == set(ARMS)


def assert_rule(text, name):
    plan = plan_of(name)
    result = run(text, plan, capacity(plan, text.tags.numpy(), text.caption_starts.numpy()))
    assert result.overflow == 0
    chosen = torch.zeros(len(text.tags), dtype=torch.bool)
    chosen[result.index[: result.num_masked].long()] = True
    allowed, start_bit, amount = RULES[name]
    for a, b in pairwise(text.caption_starts.tolist()):
        tags, mine = text.tags[a:b].tolist(), chosen[a:b].tolist()
        count, num_allowed = sum(mine), sum(bool(allowed(tag)) for tag in tags)
        assert not mine[0] and not mine[-1], "[CLS] and [SEP]"
        assert all(allowed(tag) for tag, is_chosen in zip(tags, mine, strict=True) if is_chosen)
        if start_bit:
            whole = [len({mine[i] for i in unit}) == 1 for unit in units(tags, is_maskable, start_bit)]
            assert all(whole), "a unit is split"
        budget = max(1, round(0.15 * len(tags)))
        if amount == "all":
            assert count == num_allowed
        elif amount == "15 %":
            assert count == min(budget, num_allowed)
        elif amount == BUDGET:
            assert count <= budget
        elif amount == "at most 30 %":
            assert count <= max(1, round(0.3 * len(tags)))
        elif amount == "one":
            places = [i for i, is_chosen in enumerate(mine) if is_chosen]
            if places:
                assert places == list(range(places[0], places[-1] + 1))
            else:
                assert num_allowed == 0 or name == "concrete"


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_captions=st.integers(1, 40))
@pytest.mark.parametrize("name", RULES)
def test_an_arm_keeps_its_rule(make_rich_text, name, seed, num_captions):
    assert_rule(make_rich_text(num_captions, seed), name)


@pytest.fixture(scope="module")
def real_text(tmp_path_factory):
    """All captions of the real photos, with every bit and both scores (of made-up ratings and vectors)."""
    if not DATA.is_dir():
        pytest.skip(f"no {DATA}")
    folder, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    annotations = DATA / "coco_photos" / "captions_val2017.json"
    captions = [entry["caption"] for entry in json.loads(annotations.read_text())["annotations"]]
    words = sorted({word for caption in captions for word in re.findall("[a-z]+", caption.lower())})
    rows = {
        "concreteness": [f"{word}\t{rng.uniform(1, 5):.2f}" for word in words[::2]],
        "frequencies": [f"{word}\t{rng.integers(1, 1000)}" for word in words],
        "embeddings": [f"{word} {' '.join(f'{x:.3f}' for x in rng.normal(size=5))}" for word in words],
    }
    flags = []
    for name, lines in rows.items():
        (folder / name).write_text("\n".join(lines) + "\n")
        flags += [f"--{name}", str(folder / name)]
    images = DATA / "coco_photos" / "val2017"
    argv = ["coco", "--annotations", str(annotations), "--images", str(images), "--out", str(folder / "shards")]
    assert build_shards.main([*argv, *flags, "--tokenizer", f"{DATA}/bert_uncased/vocab.txt"]) == 0
    shards = Shards((str(folder / "shards"),))
    assert set(shards.manifest.bits_computed) == set(BITS) and shards.manifest.scores == SCORES
    samples = [shards[i] for i in range(len(shards))]
    tokens, tags, scores, lengths = (
        np.concatenate([sample[name] for sample in samples]) for name in ("tokens", "tags", "scores", "caption_lengths")
    )
    num_captions = [len(sample["captions"]) for sample in samples]
    ids = np.repeat(np.array([sample["id"] for sample in samples], np.uint64), num_captions)
    return SimpleNamespace(
        tokens=torch.from_numpy(tokens.astype(np.int32)), tags=torch.from_numpy(tags.view(np.int32)),
        scores=torch.from_numpy(scores),
        caption_starts=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)),
        caption_key=caption_keys(ids, np.concatenate([np.arange(n) for n in num_captions])),
    )  # fmt: skip


@pytest.mark.real_data
@pytest.mark.parametrize("name", RULES)
def test_an_arm_keeps_its_rule_on_real_captions(real_text, name):
    assert_rule(real_text, name)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["noun", "random", "span", "object", "content"])
def test_matched_counts_on_real_captions(real_text, name):
    lengths = real_text.caption_starts.diff().tolist()
    counts = []
    for spec in (name, f"matched:{name}"):
        result = run(real_text, plan_of(spec), 1 << 14)
        chosen = torch.zeros(len(real_text.tags), dtype=torch.int64)
        chosen[result.index[: result.num_masked].long()] = 1
        counts.append([int(part.sum()) for part in chosen.split(lengths)])
    assert counts[0] == counts[1] and sum(counts[0]) > 500


@pytest.mark.parametrize("name", [*RULES, "matched:noun", "shuffled:noun", "decay:span", "noun@0.5+span@0.5"])
def test_a_caption_has_the_same_mask_on_any_rank(make_rich_text, name):
    text, plan = make_rich_text(40), plan_of(name)
    whole = run(text, plan, 4096).tokens
    for start, stop in ((0, 20), (20, 40), (7, 8)):
        a, b = text.caption_starts[start].item(), text.caption_starts[stop].item()
        part = type(text)(
            tokens=text.tokens[a:b], tags=text.tags[a:b], scores=text.scores[a:b],
            caption_starts=text.caption_starts[start : stop + 1] - a, caption_key=text.caption_key[start:stop],
        )  # fmt: skip
        assert torch.equal(run(part, plan, 4096).tokens, whole[a:b])


def test_content_high_draws_content_four_times_of_five(make_rich_text):
    text, plan = make_rich_text(4000), plan_of("content-high")
    assert isinstance(plan, MaskMix) and plan.shares == (0.8, 0.2)
    chosen = run(text, plan, 1 << 16)
    tags = text.tags[chosen.index[: chosen.num_masked].long()]
    captions = [text.tags[a:b] for a, b in pairwise(text.caption_starts.tolist())]
    both = [bool(((c & MASKABLE != 0) & (c & pos.FUNCTION_WORD == 0)).any() & (c & pos.FUNCTION_WORD != 0).any())
            for c in captions]  # fmt: skip
    arms = caption_arms(text.caption_key, plan, 3, 1)
    assert (tags & pos.FUNCTION_WORD != 0).sum() > 0
    n = sum(both)
    assert abs((arms[torch.tensor(both)] == 0).sum().item() - 0.8 * n) < 4 * (n * 0.16) ** 0.5


def test_spans_are_as_long_as_published(make_text):
    # One caption of 250 one-piece words and a budget of two fifths: spans are rarely cut short by one another.
    lengths = []
    for seed in range(60):
        text = make_text(1, seed, max_words=0)
        text.tags = torch.full((252,), MASKABLE | WORD_START | UPOS_BIT["NOUN"], dtype=torch.int32)
        text.tags[[0, -1]] = 0
        text.tokens = torch.full_like(text.tags, 9)
        text.scores = torch.zeros(252, 2, dtype=torch.uint8)
        text.caption_starts = torch.tensor([0, 252], dtype=torch.int32)
        chosen = run(text, plan_of("span", rate=0.1), 256)
        place = chosen.index[: chosen.num_masked].tolist()
        gaps = [i for i in range(1, len(place)) if place[i] != place[i - 1] + 1]
        lengths += [b - a for a, b in pairwise([0, *gaps, len(place)])]
    # Mean 3.8 words (SpanBERT); meeting and cut spans move it a little.
    assert max(lengths) > 8 and 3.3 < np.mean(lengths) < 4.6


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
        result = mask_tokens(text.tokens, text.tags, text.scores, text.caption_starts, key, plan, seed, 0, rows)
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
