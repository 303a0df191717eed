"""What arms learn while they train: the published rule in numbers, the reward by hand, and a resume bit for bit."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from posmask.train.policy import POLICIES, RESOLUTION, Bandit, LossWeights

CPU = torch.device("cpu")
ALONE = SimpleNamespace(sum=lambda values: values)


def losses(bin_loss, bin_count, reward=None):
    values = [torch.tensor(x, dtype=torch.float32) for x in (bin_loss, bin_count)]
    mlm = SimpleNamespace(bin_loss=values[0], bin_count=values[1].long())
    return SimpleNamespace(mlm=mlm, reward=None if reward is None else torch.tensor(reward, dtype=torch.float32))


def spread(**values):
    return [float(values.get(f"b{i}", 0)) for i in range(17)]


def test_weights_follow_the_z_score_of_the_average_loss():
    policy = LossWeights(CPU)
    assert (policy.bit_weights == RESOLUTION // 2).all(), "nothing is known yet"
    rng = np.random.default_rng(0)
    average, steps = np.zeros(17), np.zeros(17)
    for _ in range(30):
        count = rng.integers(0, 3, 17) * (np.arange(17) < 5)
        loss = count * np.array([5.0, 4.0, 1.0, 1.5, 0.2, *[0] * 12])
        half = losses(loss / 2, count), losses(loss / 2, np.zeros(17))  # two micro-batches
        policy.update(list(half), ALONE)
        for k in np.flatnonzero(count):
            average[k], steps[k] = 0.999 * average[k] + 0.001 * loss[k] / count[k], steps[k] + 1
    level = average[:5] / (1 - 0.999 ** steps[:5])
    z = (level - level.mean()) / level.std()
    expected = np.full(17, 0.5)
    expected[:5] = 1 / (1 + np.exp(-2 * z))
    assert np.abs(policy.bit_weights.numpy() / RESOLUTION - expected).max() < 1e-4
    assert policy.bit_weights[0] > policy.bit_weights[2] > policy.bit_weights[4]


def test_the_bandit_moves_to_what_looks():
    policy, rng = Bandit(CPU), np.random.default_rng(0)
    assert (policy.bit_weights == RESOLUTION // 17).all()
    looks = np.array([0.9, 0.5, 0.1] + [0.5] * 14)
    for _ in range(400):
        share = policy.bit_weights.numpy() / policy.bit_weights.sum().item()
        count = rng.multinomial(100, share)
        policy.update([losses(count * 0.0, count, count * looks)], ALONE)
    weights = policy.bit_weights.numpy() / RESOLUTION
    assert weights.argmax() == 0 and weights[0] > 0.3
    assert weights[2] < 1 / 17 and weights[1] == pytest.approx(weights[3:].mean(), rel=0.5)
    assert policy.preference.sum().abs() < 1e-9, "a softmax's gradient moves no mass"


@pytest.mark.parametrize("name", ["", "loss", "reward"])
def test_a_restored_policy_goes_on_bit_for_bit(name):
    steps = [losses(spread(b0=i, b3=2), spread(b0=1, b3=i % 3), spread(b0=0.3 * i, b3=0.1)) for i in range(12)]
    whole, first, second = (POLICIES[name](CPU) for _ in range(3))
    for step in steps:
        whole.update([step], ALONE)
    for step in steps[:6]:
        first.update([step], ALONE)
    second.restore(json.loads(json.dumps(first.state())))
    for step in steps[6:]:
        second.update([step], ALONE)
    assert whole.state() == second.state()
    assert whole.bit_weights is None or torch.equal(whole.bit_weights, second.bit_weights)
