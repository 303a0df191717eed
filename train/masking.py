"""Masking arms by name: `--mask noun`, `--mask noun,propn`, `--mask matched:noun`, `--mask noun@0.5+random@0.5`.

An arm is one registered function that returns an `Arm`; its docstring's first line is its help text. `parse_mask`
turns a specification and the flags beside it into a `Masking`: the plan of integers that `kernels.mask_tokens` follows
at each point of the training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from posmask.kernels.mask_plan import AMOUNTS, MaskMix, MaskPlan
from posmask.prep.pos import (
    ATTRIBUTE,
    BITS,
    COLLOCATION_START,
    CONTENT_UPOS,
    FUNCTION_UPOS,
    FUNCTION_WORD,
    MASKABLE,
    OBJECT,
    PHRASE_START,
    RELATION,
    UPOS,
    UPOS_MASK,
    WORD_START,
    upos_bits,
)  # fmt: skip

DEFAULT_RATE = 0.15
BERT_REPLACE = (0.8, 0.1, 0.1)
ALWAYS_MASK = (1.0, 0.0, 0.0)
UNITS = {"piece": 0, "word": WORD_START, "phrase": PHRASE_START, "collocation": COLLOCATION_START}
UNIT_BITS = {WORD_START: "word_start", PHRASE_START: "phrase_start", COLLOCATION_START: "collocation_start"}
WHEN_EMPTY = ("skip", "random", "content")
# What the words of a caption trade in `shuffled:ARM`: all that an arm can choose them by.
TRADED_BITS = UPOS_MASK | FUNCTION_WORD | OBJECT | ATTRIBUTE | RELATION
# SpanBERT: lengths of 1 to 10 words, Geometric(0.2) cut off there; probabilities of at most n words, times 2³².
SPAN_LENGTHS = tuple(round(2**32 * (1 - 0.8**n) / (1 - 0.8**10)) for n in range(1, 11))

Plan = MaskPlan | MaskMix


@dataclass(frozen=True)
class Arm:
    """What an arm masks by default, and which `--mask-amount`s make sense for it. Names as in `MaskPlan`."""

    candidates: int  # bits of posmask.prep.pos
    amount: str
    replace: tuple[float, float, float]
    needs: frozenset[str] = frozenset()  # names in the manifest's bits_computed, beside those of the units
    excluded: int = 0
    unit_start: int = 0
    exact: bool = True
    rate: float = DEFAULT_RATE
    weights: str = "equal"
    score: str = ""  # name of the score column that the weights read
    policy: str = ""  # "loss" or "reward": what moves the weights by part of speech during training
    span_lengths: tuple[int, ...] = ()
    replace_units: bool = False
    otherwise: Arm | None = None  # for captions without a candidate
    amounts: tuple[str, ...] = AMOUNTS


@dataclass(frozen=True)
class Mix:
    """Arms of which one is drawn for each caption."""

    arms: tuple[Arm, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Registered:
    make: Callable[[], Arm | Mix]
    source: str
    help: str


ARMS: dict[str, Registered] = {}


def register(name: str, source: str) -> Callable[[Callable[[], Arm | Mix]], Callable[[], Arm | Mix]]:
    """Make a function that returns an `Arm` or a `Mix` known as `--mask name`; `source` says who proposed it."""

    def add(function: Callable[[], Arm | Mix]) -> Callable[[], Arm | Mix]:
        if name in ARMS:
            raise ValueError(f"mask {name!r} is registered twice; give one of the two another name")
        assert function.__doc__, f"mask {name!r} has no docstring: its first line is the help text"
        ARMS[name] = Registered(function, source, function.__doc__.splitlines()[0])
        return function

    return add


@register("random", "BERT, arXiv 1810.04805")
def random_pieces() -> Arm:
    """each piece with probability 0.15; 80 % [MASK], 10 % a random token, 10 % unchanged"""
    return Arm(MASKABLE, "rate", BERT_REPLACE, amounts=("rate", "budget", "one"))


@register("whole-word", "BERT's repository")
def whole_word() -> Arm:
    """whole words in random order up to 15 % of the caption's tokens, one that overshoots is skipped; 80/10/10"""
    return Arm(MASKABLE, "budget", BERT_REPLACE, unit_start=WORD_START, exact=False, amounts=("budget",))


def _tagged(tags: tuple[str, ...]) -> Arm:
    return Arm(upos_bits(tags), "all", ALWAYS_MASK, frozenset({"upos"}), unit_start=WORD_START)


def _register_upos(tag: str) -> None:
    def arm() -> Arm:
        return _tagged((tag,))

    arm.__doc__ = f"all words tagged {tag}; always [MASK]"
    register(tag.lower(), "Universal POS tags")(arm)


for _tag in UPOS:
    _register_upos(_tag)


@register("content", "Yang et al. 2023, arXiv 2208.10806")
def content() -> Arm:
    """all content words (ADJ ADV NOUN PROPN VERB); always [MASK]"""
    return _tagged(CONTENT_UPOS)


@register("function", "complement of content")
def function_words() -> Arm:
    """all words that are not content words, punctuation included; always [MASK]"""
    return _tagged(FUNCTION_UPOS)


def _one_word(candidates: int, *needs: str, **settings) -> Arm:
    return Arm(
        candidates, "one", ALWAYS_MASK, frozenset(needs), unit_start=WORD_START, amounts=("one",), **settings
    )  # fmt: skip


def _content_word(**settings) -> Arm:
    """Bitton's content words: neither stop word nor punctuation."""
    return _one_word(MASKABLE, "function_word", excluded=FUNCTION_WORD, **settings)


@register("object", "Bitton et al. 2021, arXiv 2109.02040")
def object_word() -> Arm:
    """one word a caption that names an object, else one content word; always [MASK]"""
    return _one_word(OBJECT, "object", otherwise=_content_word())


@register("content-high", "Bitton et al. 2021, arXiv 2109.02040")
def content_high() -> Mix:
    """one word a caption: a content word with probability 0.8, else a stop word or punctuation; always [MASK]"""
    function = _one_word(FUNCTION_WORD, "function_word")
    return Mix((_content_word(otherwise=function), replace(function, otherwise=_content_word())), (0.8, 0.2))


@register("concrete", "Bitton et al. 2021, arXiv 2109.02040")
def concrete() -> Arm:
    """one of the caption's three most concrete words, with weights 55/30/15 (75/25 of two); always [MASK]"""
    return _one_word(MASKABLE, weights="top", score="concreteness")


@register("difference", "Wilf et al. 2023, arXiv 2305.14577")
def difference() -> Arm:
    """15 % of the pieces, sooner those near to what sets the corpus apart: linear in their rank; 80/10/10"""
    return Arm(MASKABLE, "budget", BERT_REPLACE, weights="rank", score="difference", amounts=("budget",))


@register("span", "SpanBERT, arXiv 1907.10529")
def span() -> Arm:
    """runs of 1 to 10 whole words up to 15 % of the caption's tokens; one 80/10/10 draw a run"""
    return Arm(
        MASKABLE, "budget", BERT_REPLACE, unit_start=WORD_START, exact=False, span_lengths=SPAN_LENGTHS,
        replace_units=True, amounts=("budget",),
    )  # fmt: skip


@register("entity", "ERNIE, arXiv 1904.09223")
def entity() -> Arm:
    """each phrase (noun chunk, entity, or a word outside of them) with probability 0.15; one 80/10/10 draw a phrase"""
    return Arm(
        MASKABLE, "rate", BERT_REPLACE, unit_start=PHRASE_START, exact=False, replace_units=True,
        amounts=("rate", "budget", "one"),
    )  # fmt: skip


@register("pmi", "Levine et al. 2021, arXiv 2010.01825")
def pmi() -> Arm:
    """collocations of the corpus as wholes up to 15 % of the caption's tokens; one 80/10/10 draw a collocation"""
    return Arm(
        MASKABLE, "budget", BERT_REPLACE, unit_start=COLLOCATION_START, exact=False, replace_units=True,
        amounts=("budget",),
    )  # fmt: skip


@register("weighted", "Yang et al. 2023, arXiv 2208.10806")
def weighted() -> Arm:
    """whole words up to 15 % of the tokens, sooner those of the parts of speech whose loss is high; 80/10/10"""
    return Arm(
        MASKABLE, "budget", BERT_REPLACE, frozenset({"upos"}), unit_start=WORD_START, exact=False, weights="bits",
        policy="loss", amounts=("budget",),
    )  # fmt: skip


@register("bandit", "after Tou and Sun 2024, with a bandit for their agent")
def bandit() -> Arm:
    """whole words, 30 % of the tokens, sooner those of the parts of speech that look at the image; always [MASK]"""
    return Arm(
        MASKABLE, "budget", ALWAYS_MASK, frozenset({"upos"}), unit_start=WORD_START, exact=False, rate=0.3,
        weights="bits", policy="reward", amounts=("budget",),
    )  # fmt: skip


@register("none", "control")
def nothing() -> Arm:
    """nothing, for a run without masked language modelling (--objectives itm)"""
    return Arm(0, "all", ALWAYS_MASK, amounts=("all",))


# A prefix before an arm: what it does to the arm's plan (and its help).
PREFIXES = {
    "matched": "the control: as many pieces a caption as ARM masks, placed at random",
    "shuffled": "the control: ARM after the words of each caption have traded their tags",
    "decay": "ARM at a rate p(1 + cos(πt/T)) + 0.02 that falls during training (Yang et al. 2023); p is --mask-rate",
    "decay-linear": "ARM at a rate 2p(1 - t/T)",
}


def list_masks() -> list[tuple[str, str, str]]:
    """What `--mask` may be: name, source and one line of help, the compound forms last."""
    known = [(name, arm.source, arm.help) for name, arm in ARMS.items()]
    known.append(("A,B", "", "the union of arms that mask all of their words, such as noun,propn"))
    known += [(f"{prefix}:ARM", "", text) for prefix, text in PREFIXES.items()]
    known.append(("A@0.7+B@0.3", "", "one arm a caption, drawn with these shares"))
    known.append(("A->B@0.5", "", "first A, and B from half of the training on"))
    return known


def arm_slug(spec: str) -> str:
    """The arm's name for a run folder: `matched:noun,propn` → `matched-noun-propn`."""
    return re.sub(r"[^A-Za-z0-9]+", "-", spec).strip("-")


def find_arm(spec: str) -> Arm | Mix:
    """The arm that a name or a comma list of names means. Raises ValueError for one that is not known, or no union."""
    names = spec.split(",")
    if "none" in names and len(names) > 1:
        raise ValueError(f"--mask {spec}: none masks nothing, so it adds nothing to a union; leave it out")
    for name in names:
        if name not in ARMS:
            known = ", ".join(name for name, *_ in list_masks())
            raise ValueError(f"--mask {spec}: {name!r} is unknown; choose from {known}")
    arms = [ARMS[name].make() for name in names]
    if len(arms) == 1:
        return arms[0]
    if len(set(names)) < len(names):
        raise ValueError(f"--mask {spec} names an arm twice; leave one out")
    bits = 0
    for name, arm in zip(names, arms, strict=True):
        if isinstance(arm, Mix) or arm.amount != "all" or arm != replace(arms[0], candidates=arm.candidates):
            raise ValueError(f"--mask {spec}: {name!r} does not mask all of its words, so it cannot be in a union")
        bits |= arm.candidates
    return replace(arms[0], candidates=bits)


def random_ranges(vocab_size: int, never: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """The ids of [0, vocab_size) that are not in `never`, as ascending [low, high) ranges."""
    walls = sorted({-1, vocab_size, *never})
    return tuple((a + 1, b) for a, b in pairwise(walls) if b - a > 1)


@dataclass(frozen=True)
class Masking:
    """What `--mask` and the flags beside it mean for given shards."""

    spec: str
    plan_at: Callable[[float], Plan]
    policies: frozenset[str]  # what its arms learn from while they train; at most one

    def at(self, progress: float) -> Plan:
        """The plan for a step; progress: the share of the training that is done, in [0, 1)."""
        return self.plan_at(progress)

    @property
    def policy(self) -> str:
        """"loss", "reward", or "" where the plan depends on nothing but the step."""
        return next(iter(self.policies), "")


def parse_mask(
    spec: str,
    *,
    tokenizer: Mapping[str, Any],
    bits_computed: Iterable[str],
    scores: Sequence[str] = (),
    amount: str | None = None,
    rate: float | None = None,
    unit: str | None = None,
    replace: Sequence[float] | None = None,
    when_empty: str = "skip",
    max_tokens: int = 255,
) -> Masking:
    """What `--mask spec` and its flags mean for given shards.

    amount, rate, unit, replace, when_empty: `--mask-amount`, `--mask-rate`, `--mask-unit`, `--replace`, `--when-empty`;
    None is the arm's own default. They hold for each arm of a mix, a schedule or a prefix. tokenizer: the manifest's
    entry (mask_id, vocab_size, never_drawn: ids that no random replacement may yield). bits_computed, scores: the
    manifest's lists. max_tokens: no caption is longer, [CLS] and [SEP] included.
    Raises ValueError for an unknown arm, flags that contradict it or each other, and bits or scores that the shards
    lack.
    """
    flags = _Flags(amount, rate, unit, replace, when_empty)
    shards = _Shards(tokenizer, frozenset(bits_computed), tuple(scores), max_tokens)
    stages = []
    for i, part in enumerate(spec.split("->")):
        text, share = (part, 0.0) if i == 0 else _split_share(spec, part)
        if stages and not stages[-1][0] < share < 1:
            raise ValueError(f"--mask {spec}: the switch at {share:g} must come after {stages[-1][0]:g} and before 1")
        stages.append((share, *_parse_mix(text, flags, shards)))
    policies = frozenset(policy for _, _, policies in stages for policy in policies)
    if len(policies) > 1:
        raise ValueError(f"--mask {spec}: only one of its arms may learn during training; leave one out")

    def plan_at(progress: float) -> Plan:
        return next(plan for start, plan, _ in reversed(stages) if start <= progress)(progress)

    plan_at(0.0)  # refuses what no plan can be made of
    return Masking(spec, plan_at, policies)


@dataclass(frozen=True)
class _Flags:
    amount: str | None
    rate: float | None
    unit: str | None
    replace: Sequence[float] | None
    when_empty: str

    def __post_init__(self):
        for flag, known in (("amount", AMOUNTS), ("unit", (*UNITS,)), ("when_empty", WHEN_EMPTY)):
            value = getattr(self, flag)
            if value is not None and value not in known:
                name = flag.replace("_", "-") if flag == "when_empty" else f"mask-{flag}"
                raise ValueError(f"--{name} {value} is unknown; choose one of {', '.join(known)}")


@dataclass(frozen=True)
class _Shards:
    tokenizer: Mapping[str, Any]
    bits: frozenset[str]
    scores: tuple[str, ...]
    max_tokens: int


# What makes bits and scores that a build may lack.
REMEDIES = {
    "concreteness": "build them with --concreteness FILE",
    "difference": "build them with --frequencies FILE and --embeddings FILE",
}


def _split_share(spec: str, part: str) -> tuple[str, float]:
    """"noun@0.5" as ("noun", 0.5)."""
    text, at, share = part.rpartition("@")
    try:
        if not at:
            raise ValueError
        return text, float(share)
    except ValueError:
        raise ValueError(f"--mask {spec}: {part!r} needs a share, such as {text or part}@0.5") from None


def _parse_mix(spec: str, flags: _Flags, shards: _Shards) -> tuple[Callable[[float], Plan], set[str]]:
    """The plan of one stage as a function of progress, and the policies of its arms."""
    parts = spec.split("+")
    if len(parts) == 1 and "@" not in spec:
        return _parse_prefix(spec, flags, shards)
    shared = [_split_share(spec, part) for part in parts]
    made = [_parse_prefix(text, flags, shards) for text, _ in shared]
    shares = tuple(share for _, share in shared)
    if any(isinstance(plan(0.0), MaskMix) for plan, _ in made):
        raise ValueError(f"--mask {spec}: an arm that is a mix itself cannot be in another")

    def plan_at(progress: float) -> MaskMix:
        return MaskMix(tuple(plan(progress) for plan, _ in made), shares)

    if len(parts) == 1:
        raise ValueError(f"--mask {spec}: a mix has several arms, such as {shared[0][0]}@0.5+random@0.5")
    return plan_at, set().union(*(policies for _, policies in made))


def _parse_prefix(spec: str, flags: _Flags, shards: _Shards) -> tuple[Callable[[float], Plan], set[str]]:
    """As `_parse_mix`, for an arm with or without a prefix."""
    prefix, colon, name = spec.rpartition(":")
    if colon and prefix not in PREFIXES:
        known = ", ".join(name for name, *_ in list_masks())
        raise ValueError(f"--mask {spec}: {prefix!r} is unknown before a colon; choose from {known}")
    found = find_arm(name)
    arms, shares = (found.arms, found.shares) if isinstance(found, Mix) else ((found,), ())
    plans = [_make_plan(spec, prefix, arm, flags, shards) for arm in arms]

    def plan_at(progress: float) -> Plan:
        now = tuple(_decayed(plan, prefix, progress) for plan in plans)
        return MaskMix(now, shares) if shares else now[0]

    return plan_at, {arm.policy for arm in arms} - {""}


def _decayed(plan: MaskPlan, prefix: str, progress: float) -> MaskPlan:
    if prefix == "decay":
        return replace(plan, rate=min(1.0, plan.rate * (1 + math.cos(math.pi * progress)) + 0.02))
    if prefix == "decay-linear":
        return replace(plan, rate=min(1.0, 2 * plan.rate * (1 - progress)))
    return plan


def _make_plan(spec: str, prefix: str, arm: Arm, flags: _Flags, shards: _Shards) -> MaskPlan:
    """The plan of one arm, at the rate that a decay starts from. Raises ValueError as `parse_mask` says."""
    amount = flags.amount or arm.amount
    if amount not in arm.amounts:
        raise ValueError(f"--mask {spec} contradicts --mask-amount {amount}; it works with {', '.join(arm.amounts)}")
    if prefix.startswith("decay"):
        if amount == "all":
            amount = "rate"  # the share of its words that is masked is what falls
        if amount == "one":
            raise ValueError(f"--mask {spec}: an arm that masks one unit a caption has no rate that could fall")
    if flags.rate is not None and amount not in ("rate", "budget"):
        raise ValueError(
            f"--mask-rate {flags.rate} contradicts --mask {spec} with --mask-amount {amount}, which uses no rate;"
            " leave it out or choose --mask-amount rate or budget"
        )
    unit_start = arm.unit_start if flags.unit is None else UNITS[flags.unit]
    if arm.span_lengths and unit_start != arm.unit_start:
        raise ValueError(f"--mask {spec} contradicts --mask-unit {flags.unit}; spans are made of words")
    by_tag = arm.candidates != MASKABLE or arm.excluded or arm.weights == "bits"
    if prefix == "shuffled" and not by_tag:
        name = spec.rpartition(":")[2]
        raise ValueError(f"--mask {spec}: {name} does not go by tags, so trading them changes nothing")
    otherwise = arm.otherwise or {"skip": None, "random": _ANY_PIECES, "content": _CONTENT_WORD}[flags.when_empty]
    matched = prefix == "matched"
    _check_shards(spec, (arm, otherwise), (unit_start, WORD_START if matched or prefix == "shuffled" else 0), shards)
    common = {
        "maskable": MASKABLE,
        "mask_id": shards.tokenizer["mask_id"],
        "word_start": WORD_START,
        "replace": arm.replace if flags.replace is None else tuple(flags.replace),
        "random_ranges": random_ranges(shards.tokenizer["vocab_size"], shards.tokenizer["never_drawn"]),
        "max_caption_tokens": shards.max_tokens,
    }
    return MaskPlan(
        candidates=arm.candidates,
        amount=amount,
        rate=arm.rate if flags.rate is None else flags.rate,
        excluded=arm.excluded,
        unit_start=unit_start,
        exact=arm.exact,
        span_lengths=arm.span_lengths,
        weights=arm.weights,
        score=shards.scores.index(arm.score) if arm.score else 0,
        shuffled=TRADED_BITS if prefix == "shuffled" else 0,
        matched=matched,
        otherwise=otherwise and MaskPlan(
            candidates=otherwise.candidates, amount=otherwise.amount, rate=otherwise.rate,
            excluded=otherwise.excluded, unit_start=otherwise.unit_start, **common,
        ),
        replace_units=arm.replace_units,
        **common,
    )  # fmt: skip


# What --when-empty masks in captions without a candidate.
_ANY_PIECES = Arm(MASKABLE, "budget", ALWAYS_MASK)
_CONTENT_WORD = _content_word()


def _check_shards(spec: str, arms: tuple[Arm | None, ...], starts: tuple[int, ...], shards: _Shards) -> None:
    """Raises ValueError, with the remedy, where the shards lack bits or scores."""
    present = [arm for arm in arms if arm is not None]
    needs = {"maskable"}.union(*(arm.needs for arm in present))
    needs |= {UNIT_BITS[bit] for bit in (*starts, *(arm.unit_start for arm in present[1:])) if bit}
    if missing := [name for name in BITS if name in needs - shards.bits]:
        have = ", ".join(name for name in BITS if name in shards.bits)
        raise ValueError(
            f"--mask {spec} needs the bits {', '.join(missing)}, which these shards lack (they have {have}); "
            "build them again with this version"
        )
    for arm in present:
        if arm.score and arm.score not in shards.scores:
            raise ValueError(
                f"--mask {spec} needs the score {arm.score}, which these shards lack; {REMEDIES[arm.score]}"
            )
