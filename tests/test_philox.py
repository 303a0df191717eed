"""The random numbers: published vectors, a second implementation in Python integers, and the pinned counter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posmask.kernels import philox

WORD = st.integers(0, 2**32 - 1)

# Known answers of Random123, the authors' library (kat_vectors, philox4x32 10).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def in_python(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert philox.philox4x32(torch.tensor(counter), key).tolist() == list(answer)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=7), st.tuples(WORD, WORD))
def test_equals_python_integers(counters, key):
    assert philox.philox4x32(torch.tensor(counters), key).tolist() == [in_python(c, key) for c in counters]


def test_draws_use_the_pinned_counter():
    # Words above 2³¹ are negative int32: their bit patterns count, not their signs.
    words = torch.tensor([[3 | 2 << 16, 0xDEADBEEF, 0xFFFFFFFF], [0, 1, 0x80000000]])
    key = words.to(torch.int32)
    assert key[0, 1] < 0
    position, caption = torch.tensor([0, 7, 65535]), torch.tensor([1, 0, 1])
    drawn = philox.draw_words(philox.VALUE, position, caption, key, seed=5, epoch=2**32 - 1)
    for i in range(3):
        counter = (int(position[i]) | 2 << 16, *words[caption[i]].tolist())
        assert [int(word[i]) for word in drawn] == in_python(counter, (5, 2**32 - 1))


def test_purposes_are_the_published_ones():
    names = ("SELECT", "REPLACE", "VALUE", "CROP", "CAPTION", "IMAGE", "ARM", "NEGATIVE", "FOIL")
    assert [getattr(philox, name) for name in names] == list(range(9))


@pytest.mark.parametrize("key", [(-1, 0), (0, 2**32)])
def test_a_key_is_two_words(key):
    with pytest.raises(AssertionError, match="32-bit"):
        philox.philox4x32(torch.zeros(4, dtype=torch.int64), key)
