"""What to mask, in integers: the plan that every backend of `mask_tokens` follows.

The kernels see bits, columns and counts; which bit is a noun and which column concreteness is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

AMOUNTS = ("all", "rate", "budget", "one")
WEIGHTS = ("equal", "rank", "top", "bits")
# "top": relative weights of the highest-scored units of a caption that has one, two, or more of them.
TOP_WEIGHTS = ((1,), (75, 25), (55, 30, 15))
IGNORED = -100  # target of a spare row


@dataclass(frozen=True)
class MaskPlan:
    """Which pieces are masked, how many, and what replaces them.

    A *unit* is what is masked as a whole: a piece, or a run of candidate pieces that begins at a start bit.
    amount: "all" candidates; "rate": each unit with probability `rate`; "budget": max(1, round(rate · caption length))
    pieces, [CLS] and [SEP] counted as in BERT; "one" unit a caption.
    weights: how "budget" and "one" draw. "equal"; "bits": by the lowest of a unit's first 17 bits, from the
    `bit_weights` of the call; "rank": a piece weighs as much as there are candidates that do not score higher (linear
    in the rank); "top": the up to three units that score highest, by TOP_WEIGHTS; units that score 0 have no score.
    """

    candidates: int  # a piece with any of these bits may be masked
    maskable: int  # ... if it has this bit too
    mask_id: int
    amount: str = "all"
    rate: float = 0.15
    excluded: int = 0  # ... and none of these
    unit_start: int = 0  # bit that starts a unit; 0: each piece is one
    # Budget over longer units. True: whole units where they fill it exactly, else pieces. False: BERT's loop, which
    # takes units in random order and skips those that overshoot, so it may stay below the budget.
    exact: bool = True
    # Budget over runs of units (SpanBERT): entry n - 1 is 2³² times the probability that a run has at most n units.
    span_lengths: tuple[int, ...] = ()
    weights: str = "equal"
    score: int = 0  # column of the scores that "rank" and "top" read
    # A control: before anything else, whole words trade these bits with one another, inside each caption.
    shuffled: int = 0
    # The control: as many pieces a caption as this plan would mask, placed uniformly over all maskable ones; whole
    # words (they start at `word_start`) where they fill the count exactly, else pieces.
    matched: bool = False
    word_start: int = 0
    otherwise: MaskPlan | None = None  # chooses in captions without a candidate; None leaves them alone
    replace: tuple[float, float, float] = (1.0, 0.0, 0.0)  # [MASK], a random token, the token itself
    replace_units: bool = False  # one draw between the three for all of a unit (of a run, with span_lengths)
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
        assert self.word_start or not (self.matched or self.shuffled), "words move whole: word_start is missing"
        assert self.weights in WEIGHTS and (self.weights == "equal" or self.amount in ("budget", "one"))
        assert not self.span_lengths or (self.amount == "budget" and not self.exact and self.weights == "equal")
        assert self.weights == "equal" or not (self.exact and self.unit_start and self.amount == "budget")
        assert self.otherwise is None or self.otherwise.otherwise is None, "one fallback is enough"

    @property
    def num_random(self) -> int:
        """How many token ids a random replacement may be."""
        return sum(high - low for low, high in self.random_ranges)

    @property
    def thresholds(self) -> tuple[int, int]:
        """A 32-bit draw below the first means [MASK], below the second a random token, else the token itself."""
        return round(self.replace[0] * 2**32), round((self.replace[0] + self.replace[1]) * 2**32)

    @property
    def ratio(self) -> Fraction:
        """The rate as the decimal it was written as (0.15 = 3/20), so that no device's floating point enters."""
        return Fraction(self.rate).limit_denominator(1_000_000)

    def budget(self, lengths):
        """max(1, round(rate · length)) for integer arrays or tensors, ties to even like Python's round."""
        ratio = self.ratio
        scaled = lengths * ratio.numerator
        whole = scaled // ratio.denominator
        twice_rest = 2 * (scaled - whole * ratio.denominator)
        rounded = whole + (twice_rest + whole % 2 > ratio.denominator)
        return rounded + (rounded < 1)


@dataclass(frozen=True)
class MaskMix:
    """Several plans, one of which is drawn for each caption, with the probabilities `shares`."""

    plans: tuple[MaskPlan, ...]
    shares: tuple[float, ...]

    def __post_init__(self):
        if not all(0 < share < 1 for share in self.shares) or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares {self.shares} of a mix must each be between 0 and 1, and sum to 1")
        assert len(self.plans) == len(self.shares) > 1

    @property
    def thresholds(self) -> tuple[int, ...]:
        """2³² times the probability of the first plan, of the first two, ... of all but the last."""
        return tuple(round(sum(self.shares[: i + 1]) * 2**32) for i in range(len(self.plans) - 1))


def plans_of(plan: MaskPlan | MaskMix) -> tuple[MaskPlan, ...]:
    """The plans that a caption may follow, fallbacks left out."""
    return plan.plans if isinstance(plan, MaskMix) else (plan,)
