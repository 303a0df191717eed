"""The masked-LM loss over the masked rows alone: cross entropy of hidden · weightᵀ + bias, summed, never averaged.

M = `capacity` rows, of which the first `num_masked` are live and the others spare; D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BINS = 17


class MaskedLMLoss(NamedTuple):
    """Sums over the live rows, so that micro-batches and ranks add up; divide by a global count."""

    loss_sum: Tensor  # () float32 (float64 for float64 rows), nats; the only entry with a gradient
    num_masked: Tensor  # () int32, as given
    bin_loss: Tensor  # (17,), dtype of loss_sum: loss per bin; rows without a bin are in no bin
    bin_hits: Tensor  # (17,) int64, rows whose highest logit is the target's
    bin_count: Tensor  # (17,) int64


def lowest_bit(bits: Tensor) -> Tensor:
    """(N,) int32 bit sets → (N,) int32 index of the lowest bit among the first 17, -1 where none of them is set."""
    low = bits & ((1 << NUM_BINS) - 1)
    # A float holds a power of two exactly: 2ⁱ has the exponent i + 1, and 0 has the exponent 0.
    return torch.frexp((low & -low).float()).exponent.int() - 1


def masked_lm_loss_reference(
    hidden_rows: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, num_masked: Tensor, bins: Tensor | None = None
) -> MaskedLMLoss:
    """The readable form of `masked_lm_loss`, whose arguments it shares. Logits in the rows' dtype, the rest in fp32."""
    live = targets >= 0
    # A spare row may hold NaN, and 0 · NaN would reach the weight's gradient: cut it off before the product.
    logits = F.linear(torch.where(live[:, None], hidden_rows, 0), weight, bias)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    row_loss = F.cross_entropy(exact, targets.long(), reduction="none", ignore_index=-100)
    loss_sum = row_loss.sum()
    with torch.no_grad():
        if bins is None:
            none = torch.zeros(NUM_BINS, dtype=torch.int64, device=targets.device)
            return MaskedLMLoss(loss_sum, num_masked, none.to(row_loss.dtype), none, none)
        # (17, M): a sum over columns adds in a fixed order, where a scatter on a GPU would not.
        member = (bins == torch.arange(NUM_BINS, device=bins.device)[:, None]) & live
        hit = logits.argmax(dim=1) == targets
        bin_loss = torch.where(member, row_loss, 0).sum(dim=1)
        return MaskedLMLoss(loss_sum, num_masked, bin_loss, (member & hit).sum(dim=1), member.sum(dim=1))


def masked_lm_loss(
    hidden_rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    num_masked: Tensor,
    bins: Tensor | None = None,
    backend: str = "auto",
) -> MaskedLMLoss:
    """Loss of the masked rows, with loss, top-1 hits and counts per bin.

    hidden_rows: (M, D), gathered and transformed; weight: (V, D) and bias: (V,), all of one floating dtype.
    targets: (M,) int32, -100 in spare rows, which add nothing to any result or gradient whatever they hold.
    num_masked: () int32. bins: (M,) integers 0..16 or -1 (`lowest_bit` of the rows' tags), or None for empty bins.
    Gradients of loss_sum come in the dtype of each argument, rounded once.
    """
    if backend not in ("auto", "torch"):
        raise ValueError(f"masked_lm_loss has no backend {backend!r}; 'torch' is the only one built (or 'auto')")
    return masked_lm_loss_reference(hidden_rows, weight, bias, targets, num_masked, bins)
