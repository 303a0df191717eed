"""The training objective: masked language modelling from an image and the rest of the caption."""

from __future__ import annotations

import torch

from posmask.kernels.mask_tokens import MaskedTokens, MaskPlan, mask_tokens
from posmask.kernels.masked_lm_loss import MaskedLMLoss, lowest_bit
from posmask.train.loader import Batch
from posmask.train.masking import capacity


def mask_batch(batch: Batch, plan: MaskPlan, seed: int) -> MaskedTokens:
    """Masks the batch's captions on its device; nothing waits for the result."""
    rows = capacity(plan, batch.host_tags, batch.host_caption_starts)
    return mask_tokens(
        batch.tokens, batch.tags, batch.scores, batch.caption_starts, batch.caption_key, plan, seed, batch.epoch, rows
    )


def masked_lm(model: torch.nn.Module, batch: Batch, masked: MaskedTokens) -> MaskedLMLoss:
    """Loss of the masked tokens of `batch`, with loss, hits and counts per part of speech."""
    bins = lowest_bit(batch.tags.index_select(0, masked.index))
    return model(batch, masked, bins)
