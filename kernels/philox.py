"""Counter-based random numbers: Philox4x32-10, and the counter that every random decision of the project shares.

A draw is a pure function of (seed, epoch, sample id, caption, masking, position, purpose). Nothing else enters, so
rank, batch, worker and resume cannot change it, and a CPU and a GPU agree bit for bit. 32-bit words live in int64
tensors, which have the shifts and compares that uint32 tensors lack.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

U32 = 0xFFFFFFFF
# What a draw decides: the high half of the counter's first word. Every published mask depends on them, so append only.
SELECT, REPLACE, VALUE, CROP, CAPTION, IMAGE, ARM, NEGATIVE, FOIL = range(9)

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_COLUMN, _LOW, _HALF = np.array(_MULTIPLIERS, np.uint64)[:, None], np.uint64(U32), np.uint64(16)


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    counter: (..., 4) int64 with values in [0, 2³²); key: two integers in that range. Returns (..., 4) int64, uniform in
    that range. It is one call for N counters: four words each, independent of one another.
    """
    return torch.stack(_rounds(*counter.unbind(-1), *key), dim=-1)


def draw_words(
    purpose: int | Tensor, position: Tensor, caption: Tensor, caption_key: Tensor, seed: int, epoch: int
) -> tuple[Tensor, ...]:
    """The four 32-bit words that decide `purpose` at each of N places, as four (N,) int64 tensors.

    purpose: one for all, or (N,) int64. position: (N,) int64 below 2¹⁶, the index inside the stored caption ([CLS] =
    0). caption: (N,) int64, the row of caption_key that each place belongs to. caption_key: (C, 3) int32 bit patterns,
    `caption | masking << 16, id_lo, id_hi`, where caption is the index inside the stored sample. seed, epoch: in
    [0, 2³²).
    """
    if position.device.type == "cpu":
        return _draw_on_cpu(purpose, position, caption, caption_key, seed, epoch)
    words = (caption_key.t().long() & U32).index_select(1, caption)
    return _rounds(position | purpose << 16, *words, seed, epoch)


def _rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for key in _round_keys(k0, k1):
        # A product wraps modulo 2⁶⁴, so its bits are right although its sign is not. Only the words that are multiplied
        # next need their upper half cleared.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(key[0]).bitwise_and_(U32), p1
        c2, c3 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(key[1]).bitwise_and_(U32), p0
    return c0, c1 & U32, c2, c3 & U32


@cache
def _round_keys(k0: int, k1: int) -> list[tuple[int, int]]:
    assert 0 <= k0 <= U32 and 0 <= k1 <= U32, f"a key is two 32-bit words: {k0}, {k1}"
    return [((k0 + i * _WEYL[0]) & U32, (k1 + i * _WEYL[1]) & U32) for i in range(10)]


@cache
def _key_columns(k0: int, k1: int) -> np.ndarray:
    return np.array(_round_keys(k0, k1), np.uint64)[:, :, None]


def _draw_on_cpu(purpose, position, caption, caption_key, seed, epoch) -> tuple[Tensor, ...]:
    """`draw_words` in NumPy, whose small operations cost a third of torch's; both halves of a round at once."""
    words = caption_key.numpy().view(np.uint32).T.astype(np.uint64).take(caption.numpy(), axis=1)
    multiplied, added = np.empty((2, len(position)), np.uint64), words[::2]
    np.bitwise_or(position.numpy().view(np.uint64), np.asarray(purpose, np.uint64) << _HALF, out=multiplied[0])
    multiplied[1] = words[1]
    product = np.empty_like(multiplied)
    crossed = product[::-1]
    for key in _key_columns(seed, epoch):
        np.multiply(multiplied, _COLUMN, out=product)
        np.right_shift(crossed, np.uint64(32), out=multiplied)
        multiplied ^= added
        multiplied ^= key
        np.bitwise_and(crossed, _LOW, out=added)
    return tuple(torch.from_numpy(row.view(np.int64)) for pair in zip(multiplied, added, strict=True) for row in pair)
