"""The exponential race in integers: frozen, and with the frequencies of drawing one after the other."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from posmask.kernels.race import KEY_BITS, log_table, race_keys


def test_the_table_is_frozen():
    table = log_table(torch.device("cpu"))
    assert table[0] == round(2**20 * (1 - math.log2(1 + 0.5 / 4096))) and table[-1] > 0
    assert hashlib.sha256(",".join(map(str, table.tolist())).encode()).hexdigest()[:16] == "c0eee7b561aecd4e"


def test_keys_are_minus_log2_over_the_weight():
    words = torch.tensor([0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 1, 123456789])
    keys = race_keys(words, torch.ones(8, dtype=torch.int64)).double() / 2**44
    exact = 32 - torch.log2(words.double())
    assert (keys[1:] - exact[1:]).abs().max() < 1 / 4096
    assert keys[0] > keys[1:].max() and race_keys(words, torch.ones(8, dtype=torch.int64)).max() < 1 << KEY_BITS
    assert torch.equal(race_keys(words, torch.full((8,), 1 << 24)), (keys * 2**20).long())


def test_inclusion_frequencies_equal_drawing_one_after_the_other():
    weights, k, num_draws = np.array([1, 2, 3, 5, 8, 40, 200]), 3, 200_000
    rng = np.random.default_rng(0)
    words = torch.from_numpy(rng.integers(0, 2**32, (num_draws, len(weights))))
    keys = race_keys(words.flatten(), torch.from_numpy(weights).repeat(num_draws)).view(num_draws, -1)
    ours = torch.zeros_like(keys).scatter_(1, keys.argsort(stable=True, dim=1)[:, :k], 1).double().mean(0).numpy()
    exact = np.zeros(len(weights))

    def visit(left, probability, depth):
        for i in left:
            p = probability * weights[i] / weights[list(left)].sum()
            exact[i] += p
            if depth > 1:
                visit(left - {i}, p, depth - 1)

    visit(frozenset(range(len(weights))), 1.0, k)
    sigma = np.sqrt(exact * (1 - exact) / num_draws)
    assert (np.abs(ours - exact) < 4 * sigma).all(), (ours, exact)
    drawn = [rng.choice(len(weights), k, replace=False, p=weights / weights.sum()) for _ in range(20_000)]
    numpy_share = np.bincount(np.concatenate(drawn), minlength=len(weights)) / 20_000
    assert (np.abs(numpy_share - exact) < 4.5 * sigma * np.sqrt(10)).all(), "what numpy draws has these frequencies"
