"""The training objective: masked language modelling from an image and the rest of the caption."""

from __future__ import annotations

import torch

from posmask.kernels.mask_plan import MaskMix, MaskPlan
from posmask.kernels.mask_tokens import MaskedTokens, mask_tokens
from posmask.kernels.masked_lm_loss import MaskedLMLoss, lowest_bit
from posmask.train.capacity import capacity
from posmask.train.loader import Batch


def mask_batch(
    batch: Batch, plan: MaskPlan | MaskMix, seed: int, bit_weights: torch.Tensor | None = None
) -> MaskedTokens:
    """Masks the batch's captions on its device; nothing waits for the result. bit_weights as in `mask_tokens`."""
    rows = capacity(plan, batch.host_tags, batch.host_caption_starts)
    return mask_tokens(
        batch.tokens, batch.tags, batch.scores, batch.caption_starts, batch.caption_key, plan, seed, batch.epoch, rows,
        bit_weights=bit_weights,
    )  # fmt: skip


def masked_lm(model: torch.nn.Module, batch: Batch, masked: MaskedTokens) -> MaskedLMLoss:
    """Loss of the masked tokens of `batch`, with loss, hits and counts per part of speech."""
    bins = lowest_bit(batch.tags.index_select(0, masked.index))
    return model(batch, masked, bins)
