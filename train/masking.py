"""Masking arms by name: `--mask noun`, `--mask noun,propn`, `--mask matched:noun`.

An arm is one registered function that returns an `Arm`; its docstring's first line is its help text. `parse_mask`
turns a name and the flags beside it into the plan of integers that `kernels.mask_tokens` follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from posmask.kernels.mask_plan import AMOUNTS, MaskPlan
from posmask.prep.pos import BITS, CONTENT_UPOS, FUNCTION_UPOS, MASKABLE, UPOS, WORD_START, upos_bits

DEFAULT_RATE = 0.15
BERT_REPLACE = (0.8, 0.1, 0.1)
ALWAYS_MASK = (1.0, 0.0, 0.0)
MATCHED = "matched:"


@dataclass(frozen=True)
class Arm:
    """What an arm masks by default, and which `--mask-amount`s make sense for it."""

    candidates: int  # bits of posmask.prep.pos
    needs: frozenset[str]  # names in the manifest's bits_computed
    amount: str
    replace: tuple[float, float, float]
    unit_start: int = 0  # bit that starts a unit; 0: pieces
    exact: bool = True  # see MaskPlan
    amounts: tuple[str, ...] = AMOUNTS


ARMS: dict[str, Callable[[], Arm]] = {}


def register(name: str) -> Callable[[Callable[[], Arm]], Callable[[], Arm]]:
    """Make a function that returns an `Arm` known as `--mask name`."""

    def add(function: Callable[[], Arm]) -> Callable[[], Arm]:
        if name in ARMS:
            raise ValueError(f"mask {name!r} is registered twice; give one of the two another name")
        assert function.__doc__, f"mask {name!r} has no docstring: its first line is the help text"
        ARMS[name] = function
        return function

    return add


@register("none")
def nothing() -> Arm:
    """nothing, for a run without masked language modelling (--objectives itm)"""
    return Arm(0, frozenset(), "all", ALWAYS_MASK, amounts=("all",))


@register("random")
def random_pieces() -> Arm:
    """each piece with probability 0.15; 80 % [MASK], 10 % a random token, 10 % unchanged (BERT)"""
    return Arm(MASKABLE, frozenset(), "rate", BERT_REPLACE, amounts=("rate", "budget", "one"))


@register("whole-word")
def whole_word() -> Arm:
    """whole words in random order up to 15 % of the caption's tokens; 80/10/10 (BERT's whole-word masking)"""
    needs = frozenset({"word_start"})
    return Arm(MASKABLE, needs, "budget", BERT_REPLACE, unit_start=WORD_START, exact=False, amounts=("budget",))


def _tagged(tags: tuple[str, ...]) -> Arm:
    return Arm(upos_bits(tags), frozenset({"upos", "word_start"}), "all", ALWAYS_MASK, unit_start=WORD_START)


def _register_upos(tag: str) -> None:
    def arm() -> Arm:
        return _tagged((tag,))

    arm.__doc__ = f"all words tagged {tag}; always [MASK]"
    register(tag.lower())(arm)


for _tag in UPOS:
    _register_upos(_tag)


@register("content")
def content() -> Arm:
    """all content words (ADJ ADV NOUN PROPN VERB); always [MASK]"""
    return _tagged(CONTENT_UPOS)


@register("function")
def function_words() -> Arm:
    """all words that are not content words, punctuation included; always [MASK]"""
    return _tagged(FUNCTION_UPOS)


def list_masks() -> list[tuple[str, str]]:
    """What `--mask` may be, each with one line of help, the compound forms last."""
    known = [(name, (arm.__doc__ or "").splitlines()[0]) for name, arm in ARMS.items()]
    known.append(("A,B", "the union of arms that mask all of their words, such as noun,propn"))
    known.append((f"{MATCHED}ARM", "the control: as many pieces a caption as ARM masks, placed at random"))
    return known


def arm_slug(spec: str) -> str:
    """The arm's name for a run folder: `matched:noun,propn` → `matched-noun-propn`."""
    return re.sub(r"[^A-Za-z0-9]+", "-", spec).strip("-")


def find_arm(spec: str) -> Arm:
    """The arm that a name or a comma list of names means. Raises ValueError for one that is not known, or no union."""
    names = spec.split(",")
    if "none" in names and len(names) > 1:
        raise ValueError(f"--mask {spec}: none masks nothing, so it adds nothing to a union; leave it out")
    for name in names:
        if name not in ARMS:
            known = ", ".join(name for name, _ in list_masks())
            raise ValueError(f"--mask {spec}: {name!r} is unknown; choose from {known}")
    arms = [ARMS[name]() for name in names]
    if len(arms) == 1:
        return arms[0]
    if len(set(names)) < len(names):
        raise ValueError(f"--mask {spec} names an arm twice; leave one out")
    bits = 0
    for name, arm in zip(names, arms, strict=True):
        if arm != replace(arms[0], candidates=arm.candidates) or arm.amount != "all":
            raise ValueError(f"--mask {spec}: {name!r} does not mask all of its words, so it cannot be in a union")
        bits |= arm.candidates
    return replace(arms[0], candidates=bits)


def random_ranges(vocab_size: int, never: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """The ids of [0, vocab_size) that are not in `never`, as ascending [low, high) ranges."""
    walls = sorted({-1, vocab_size, *never})
    return tuple((a + 1, b) for a, b in pairwise(walls) if b - a > 1)


def parse_mask(
    spec: str,
    *,
    tokenizer: Mapping[str, Any],
    bits_computed: Iterable[str],
    amount: str | None = None,
    rate: float | None = None,
    replace: Sequence[float] | None = None,
    max_tokens: int = 255,
) -> MaskPlan:
    """The plan that `--mask spec` and its flags mean for given shards.

    amount, rate, replace: `--mask-amount`, `--mask-rate`, `--replace`; None is the arm's own default. tokenizer: the
    manifest's entry (mask_id, vocab_size, never_drawn: ids that no random replacement may yield). bits_computed: the
    manifest's list. max_tokens: no caption is longer, [CLS] and [SEP] included. For `matched:ARM` the flags apply to
    ARM.
    Raises ValueError for an unknown arm, flags that contradict it or each other, and bits that the shards lack.
    """
    matched = spec.startswith(MATCHED)
    arm = find_arm(spec.removeprefix(MATCHED))
    needs = arm.needs | {"maskable"} | ({"word_start"} if matched else set())
    computed = set(bits_computed)
    if missing := sorted(needs - computed):
        raise ValueError(
            f"--mask {spec} needs the bits {', '.join(missing)}, which these shards lack"
            f" (they have {', '.join(sorted(computed, key=list(BITS).index))}); build them again with this version"
        )
    if amount is not None and amount not in AMOUNTS:
        raise ValueError(f"--mask-amount {amount} is unknown; choose one of {', '.join(AMOUNTS)}")
    if amount is not None and amount not in arm.amounts:
        raise ValueError(f"--mask {spec} contradicts --mask-amount {amount}; it works with {', '.join(arm.amounts)}")
    amount = amount or arm.amount
    if rate is not None and amount not in ("rate", "budget"):
        raise ValueError(
            f"--mask-rate {rate} contradicts --mask {spec} with --mask-amount {amount}, which uses no rate;"
            " leave it out or choose --mask-amount rate or budget"
        )
    return MaskPlan(
        candidates=arm.candidates,
        maskable=MASKABLE,
        mask_id=tokenizer["mask_id"],
        amount=amount,
        rate=DEFAULT_RATE if rate is None else rate,
        unit_start=arm.unit_start,
        exact=arm.exact,
        matched=matched,
        word_start=WORD_START,
        replace=arm.replace if replace is None else tuple(replace),
        random_ranges=random_ranges(tokenizer["vocab_size"], tokenizer["never_drawn"]),
        max_caption_tokens=max_tokens,
    )


def capacity(plan: MaskPlan, tags: np.ndarray, caption_starts: np.ndarray) -> int:
    """Rows that `mask_tokens` needs for this batch, a multiple of 128 and at least 128.

    tags: (T,) any integers; caption_starts: (C+1,). Never too small where the tags bound the count (all, budget, one);
    for a rate it is the mean + 6 standard deviations, exceeded in fewer than one batch in a hundred million.
    """
    tags, starts = np.asarray(tags).astype(np.int64), np.asarray(caption_starts).astype(np.int64)
    candidate = ((tags & plan.maskable) != 0) & ((tags & plan.candidates) != 0)
    num_before = np.concatenate([[0], np.cumsum(candidate)])
    per_caption = num_before[starts[1:]] - num_before[starts[:-1]]
    rows = int(per_caption.sum())
    if plan.amount == "budget":
        rows = int(np.minimum(per_caption, plan.budget(np.diff(starts))).sum())
    elif plan.amount in ("one", "rate"):
        at_unit = (tags & plan.unit_start) != 0 if plan.unit_start else np.ones_like(candidate)
        at_unit[starts[:-1][starts[:-1] < len(tags)]] = True
        at_unit[1:] |= ~candidate[:-1]
        heads = np.flatnonzero(candidate & at_unit)
        num_pieces = np.diff(num_before[np.append(heads, len(tags))])
        if plan.amount == "one":
            longest = np.zeros_like(per_caption)
            np.maximum.at(longest, np.searchsorted(starts, heads, side="right") - 1, num_pieces)
            rows = int(longest.sum())
        else:
            spread = 6 * np.sqrt((num_pieces**2).sum() * plan.rate * (1 - plan.rate))
            rows = min(rows, int(np.ceil(rows * plan.rate + spread)))
    return max(1, -(-rows // 128)) * 128
