"""Counter-based random numbers: Philox4x32-10, and the counter that every random decision of the project shares.

A draw is a pure function of (seed, epoch, sample id, caption, masking, position, purpose). Nothing else enters, so
rank, batch, worker and resume cannot change it, and a CPU and a GPU agree bit for bit. 32-bit words live in int64
tensors, which have the shifts and compares that uint32 tensors lack.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

U32 = 0xFFFFFFFF
# What a draw decides: the high half of the counter's first word. Every published mask depends on them, so append only.
SELECT, REPLACE, VALUE, CROP, CAPTION, IMAGE, ARM, NEGATIVE = range(8)

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


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
    words = (caption_key.t().long() & U32).index_select(1, caption)
    return _rounds(position | purpose << 16, *words, seed, epoch)


def _rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert 0 <= k0 <= U32 and 0 <= k1 <= U32, f"a key is two 32-bit words: {k0}, {k1}"
    if c0.device.type == "cpu":
        return _rounds_on_cpu(c0, c1, c2, c3, k0, k1)
    for _ in range(10):
        # A product wraps modulo 2⁶⁴, so its bits are right although its sign is not. Only the words that are multiplied
        # next need their upper half cleared.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(U32), p1
        c2, c3 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(U32), p0
        k0, k1 = (k0 + _WEYL[0]) & U32, (k1 + _WEYL[1]) & U32
    return c0, c1 & U32, c2, c3 & U32


def _rounds_on_cpu(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int) -> tuple[Tensor, ...]:
    """The same rounds in NumPy, whose small operations cost a third of torch's; both halves of a round at once."""
    multiplied = np.stack([c0.numpy(), c2.numpy()]).view(np.uint64)
    added = np.stack([c1.numpy(), c3.numpy()]).view(np.uint64)
    column = (2,) + (1,) * c0.ndim
    multipliers = np.array(_MULTIPLIERS, np.uint64).reshape(column)
    keys = [[(k + i * weyl) & U32 for k, weyl in zip((k0, k1), _WEYL, strict=True)] for i in range(10)]
    low, half = np.uint64(U32), np.uint64(32)
    for key in np.array(keys, np.uint64).reshape(10, *column):
        crossed = (multiplied * multipliers)[::-1]
        np.right_shift(crossed, half, out=multiplied)
        multiplied ^= added
        multiplied ^= key
        np.bitwise_and(crossed, low, out=added)
    words = torch.from_numpy(np.stack([multiplied, added], 1).view(np.int64))
    return words[0, 0], words[0, 1], words[1, 0], words[1, 1]
