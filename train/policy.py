"""What an arm learns while it trains: weights by part of speech for the arms that draw by them.

A policy lives on the device, is the same on every rank, and is part of the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posmask.kernels.masked_lm_loss import NUM_BINS, MaskedLMLoss
from posmask.train.engine import World


class Policy:
    """The policy of an arm that learns nothing."""

    bit_weights: Tensor | None = None  # (17,) int32 of at least 1, as `mask_tokens` takes them

    def update(self, losses: list[MaskedLMLoss], world: World) -> None:
        """Takes in the micro-batches of a step, on all ranks; nothing waits."""

    def state(self) -> dict[str, list[float]]:
        return {}

    def restore(self, state: dict[str, list[float]]) -> None:
        assert not state, f"a checkpoint with the policy {sorted(state)}, which this arm lacks"


class LossWeights(Policy):
    """Parts of speech that are hard now are drawn sooner: weight = sigmoid(2 · z-score of the average loss).

    The average is an exponential moving one over steps, corrected for its start, of the mean loss per masked token of a
    part of speech over all ranks; the score is taken among those seen so far, and one not seen yet counts as average.
    Source: "POS-tagging weighted masking" of Yang et al. 2023 (arXiv 2208.10806).
    """

    DECAY = 0.999
    RESOLUTION = 1 << 16  # of the integer weights

    def __init__(self, device: torch.device):
        self.average = torch.zeros(NUM_BINS, dtype=torch.float64, device=device)
        self.steps = torch.zeros_like(self.average)  # in which the part of speech was masked
        self._weigh()

    def update(self, losses: list[MaskedLMLoss], world: World) -> None:
        sums = world.sum(sum(torch.stack([part.bin_loss.double(), part.bin_count.double()]) for part in losses))
        loss, count = sums.unbind()
        seen = count > 0
        moved = self.DECAY * self.average + (1 - self.DECAY) * loss / count.clamp(min=1)
        self.average = torch.where(seen, moved, self.average)
        self.steps += seen
        self._weigh()

    def _weigh(self) -> None:
        seen = self.steps > 0
        level = self.average / (1 - self.DECAY**self.steps).clamp(min=1e-9)
        num_seen = seen.sum().clamp(min=1)
        offset = torch.where(seen, level - torch.where(seen, level, 0).sum() / num_seen, 0)
        deviation = (offset.square().sum() / num_seen).sqrt()
        weight = torch.sigmoid(2 * offset / deviation.clamp(min=1e-9))
        self.bit_weights = (weight * self.RESOLUTION).round().clamp(min=1).int()

    def state(self) -> dict[str, list[float]]:
        return {"average": self.average.tolist(), "steps": self.steps.tolist()}

    def restore(self, state: dict[str, list[float]]) -> None:
        self.average.copy_(torch.tensor(state["average"], dtype=torch.float64))
        self.steps.copy_(torch.tensor(state["steps"], dtype=torch.float64))
        self._weigh()


POLICIES = {"": lambda device: Policy(), "loss": LossWeights}
