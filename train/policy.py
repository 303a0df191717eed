"""What an arm learns while it trains: weights by part of speech for the arms that draw by them.

A policy lives on the device, is the same on every rank, and is part of the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posmask.kernels.masked_lm_loss import NUM_BINS
from posmask.train.engine import World
from posmask.train.objectives import Losses

RESOLUTION = 1 << 16  # of the integer weights


class Policy:
    """The policy of an arm that learns nothing. Others name their state, (17,) float64 tensors, in `kept`."""

    kept: tuple[str, ...] = ()
    wants_reward = False
    bit_weights: Tensor | None = None  # (17,) int32 of at least 1, as `mask_tokens` takes them

    def __init__(self, device: torch.device):
        for name in self.kept:
            setattr(self, name, torch.zeros(NUM_BINS, dtype=torch.float64, device=device))
        self.weigh()

    def weigh(self) -> None:
        """Makes bit_weights of the state."""

    def update(self, of_step: list[Losses], world: World) -> None:
        """Takes in the micro-batches of a step, on all ranks; nothing waits."""

    def state(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in self.kept}

    def restore(self, state: dict[str, list[float]]) -> None:
        for name in self.kept:
            getattr(self, name).copy_(torch.tensor(state[name], dtype=torch.float64))
        self.weigh()


def _step_sums(values: list[Tensor], counts: list[Tensor], world: World) -> tuple[Tensor, Tensor]:
    """(17,) float64 sums of both over the micro-batches of a step on all ranks."""
    pairs = zip(values, counts, strict=True)
    return world.sum(sum(torch.stack([value.double(), count.double()]) for value, count in pairs)).unbind()


class LossWeights(Policy):
    """Parts of speech that are hard now are drawn sooner: weight = sigmoid(2 · z-score of the average loss).

    The average is an exponential moving one over steps, corrected for its start, of the mean loss per masked token of a
    part of speech over all ranks; the score is taken among those seen so far, and one not seen yet counts as average.
    Source: "POS-tagging weighted masking" of Yang et al. 2023 (arXiv 2208.10806).
    """

    DECAY = 0.999
    kept = ("average", "steps")  # steps: in which the part of speech was masked

    def update(self, of_step: list[Losses], world: World) -> None:
        losses = [part.mlm for part in of_step]
        loss, count = _step_sums([part.bin_loss for part in losses], [part.bin_count for part in losses], world)
        seen = count > 0
        moved = self.DECAY * self.average + (1 - self.DECAY) * loss / count.clamp(min=1)
        self.average = torch.where(seen, moved, self.average)
        self.steps += seen
        self.weigh()

    def weigh(self) -> None:
        seen = self.steps > 0
        level = self.average / (1 - self.DECAY**self.steps).clamp(min=1e-9)
        num_seen = seen.sum().clamp(min=1)
        offset = torch.where(seen, level - torch.where(seen, level, 0).sum() / num_seen, 0)
        deviation = (offset.square().sum() / num_seen).sqrt()
        weight = torch.sigmoid(2 * offset / deviation.clamp(min=1e-9))
        self.bit_weights = (weight * RESOLUTION).round().clamp(min=1).int()


class Bandit(Policy):
    """Parts of speech whose masked tokens look at the image are drawn sooner: a gradient bandit over the 17.

    Reward of a masked token: what it takes from the image, relative to the most in its caption (the reward of Tou and
    Sun 2024, whose agent scores tokens instead). Rule: gradient bandit with a running baseline, Sutton and Barto,
    "Reinforcement Learning", section 2.8, a step's draws at once.
    """

    LEARNING_RATE = 0.5
    DECAY = 0.99  # of the baseline
    wants_reward = True
    kept = ("preference", "baseline")

    def update(self, of_step: list[Losses], world: World) -> None:
        rewards, counts = [part.reward for part in of_step], [part.mlm.bin_count for part in of_step]
        reward, count = _step_sums(rewards, counts, world)
        total = count.sum().clamp(min=1)
        # The first step sets the baseline.
        mean = reward.sum() / total
        self.baseline = torch.where(self.baseline > 0, self.DECAY * self.baseline + (1 - self.DECAY) * mean, mean)
        advantage = (reward - count * self.baseline) / total
        self.preference = self.preference + self.LEARNING_RATE * (
            advantage - self.preference.softmax(0) * advantage.sum()
        )
        self.weigh()

    def weigh(self) -> None:
        self.bit_weights = (self.preference.softmax(0) * RESOLUTION).round().clamp(min=1).int()


POLICIES: dict[str, type[Policy]] = {"": Policy, "loss": LossWeights, "reward": Bandit}
