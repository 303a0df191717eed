"""Weighted draws without replacement, in integers: the k smallest keys of an exponential race are the sample.

Key i is Exponential(1) / w_i, so that key i is the smallest with probability w_i / Σ w, and the order of all keys is
that of drawing one after the other without replacement (Efraimidis and Spirakis 2006; "Gumbel top-k" is its negative
logarithm). The logarithm comes from a table that the host builds: fp32 log differs between libraries.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

TABLE_BITS = 12
FRACTION_BITS = 20  # of -log2
WEIGHT_BITS = 24  # weights are integers in [1, 2²⁴]
KEY_BITS = 50  # keys are below 2⁵⁰: -log2 of a 32-bit word is below 2⁵ · 2²⁰ + 2²⁰


@cache
def log_table(device: torch.device) -> Tensor:
    """(4096,) int32: -log2 of the middle of [1 + i/4096, 1 + (i+1)/4096) plus one, in Q20."""
    steps = 1 << TABLE_BITS
    entries = [round((1 << FRACTION_BITS) * (1 - math.log2(1 + (i + 0.5) / steps))) for i in range(steps)]
    return torch.tensor(entries, dtype=torch.int32, device=device)


def race_keys(words: Tensor, weights: Tensor) -> Tensor:
    """(N,) int64 keys below 2⁵⁰ for 32-bit words (N,) int64 and integer weights (N,) of at least 1.

    Ties are for the caller to break, by position.
    """
    # A float64 holds 32 bits exactly: frexp gives the leading zeros and, after the leading one, the table's index.
    mantissa, exponent = torch.frexp(words.double())
    entry = (mantissa * (2 << TABLE_BITS)).long() - (1 << TABLE_BITS)
    log = (32 - exponent.long() << FRACTION_BITS) + log_table(words.device)[entry.clamp_(min=0)]
    return log * ((1 << WEIGHT_BITS) // weights)
