"""The masked-LM loss over the masked rows alone: cross entropy of hidden · weightᵀ + bias, summed, never averaged.

M = `capacity` rows, of which the first `num_masked` are live and the others spare; D width, V vocabulary.

The logits of the masked rows are small enough to be kept (M · V numbers), so nothing is computed twice: they are
overwritten with their gradient at once, and three matrix products remain. The steps of the two backends are in
masked_lm_loss_torch.py (CPU) and masked_lm_loss_triton.py (CUDA).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from posmask.kernels.backend import resolve

NUM_BINS = 17
MAX_LOGITS_BYTES = 1 << 30  # rows whose logits take more are worked off in chunks: 17,550 in bf16 at V = 30592


class MaskedLMLoss(NamedTuple):
    """Sums over the live rows, so that micro-batches and ranks add up; divide by a global count."""

    loss_sum: Tensor  # () float32 (float64 for float64 rows), nats; the only entry with a gradient
    num_masked: Tensor  # () int32, as given
    bin_loss: Tensor  # (17,), dtype of loss_sum: loss per bin; rows without a bin are in no bin
    bin_hits: Tensor  # (17,) int64, rows where no logit is above the target's
    bin_count: Tensor  # (17,) int64


def lowest_bit(bits: Tensor) -> Tensor:
    """(N,) int32 bit sets → (N,) int32 index of the lowest bit among the first 17, -1 where none of them is set."""
    low = bits & ((1 << NUM_BINS) - 1)
    # A float holds a power of two exactly: 2ⁱ has the exponent i + 1, and 0 has the exponent 0.
    return torch.frexp((low & -low).float()).exponent.int() - 1


def bin_sums(row_loss: Tensor, hit: Tensor, targets: Tensor, bins: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """bin_loss, bin_hits and bin_count of rows with these losses (M,), hits (M,) bool and targets; no gradients."""
    if bins is None:
        none = torch.zeros(NUM_BINS, dtype=torch.int64, device=targets.device)
        return none.to(row_loss.dtype), none, none.clone()
    # (17, M): a sum over columns adds in a fixed order, where a scatter on a GPU would not.
    member = (bins == torch.arange(NUM_BINS, device=bins.device)[:, None]) & (targets >= 0)
    bin_loss = torch.where(member, row_loss.detach(), 0).sum(dim=1)
    return bin_loss, (member & hit).sum(dim=1), member.sum(dim=1)


def masked_lm_loss_reference(
    hidden_rows: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, num_masked: Tensor, bins: Tensor | None = None
) -> MaskedLMLoss:
    """The readable form of `masked_lm_loss`, whose arguments it shares. Logits in the rows' dtype, the rest in fp32."""
    live = targets >= 0
    # A spare row may hold NaN, and 0 · NaN would reach the weight's gradient: cut it off before the product.
    logits = F.linear(torch.where(live[:, None], hidden_rows, 0), weight, bias)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    row_loss = F.cross_entropy(exact, targets.long(), reduction="none", ignore_index=-100)
    hit = logits.detach().gather(1, targets.clamp(min=0).long()[:, None]).squeeze(1) == logits.detach().amax(dim=1)
    return MaskedLMLoss(row_loss.sum(), num_masked, *bin_sums(row_loss, hit, targets, bins))


def _join(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Loss(torch.autograd.Function):
    """Keeps the gradient of the logits, which is linear in the factor that the backward brings.

    The factor goes into the (M, D) rows instead of the large (V, D) gradient, which is thus written and rounded once.
    The gradient of the rows is made in the forward: the backward uses no parameter, whose values ZeRO-3 has released.
    Above MAX_LOGITS_BYTES a chunk's logits cannot wait for the factor: its share of the parameters' gradients is added
    up at once, in fp32, and takes the factor at the end.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, bins, ops, with_gradient):
        rows, table, table_bias = ops.prepare(hidden, weight, bias)
        num_rows = max(1, MAX_LOGITS_BYTES // (len(table) * rows.element_size()))
        ctx.one_chunk = len(rows) <= num_rows
        per_row, sums = [], None
        for chunk in zip(rows.split(num_rows), targets.split(num_rows), strict=True):
            gradient, *found = ops.loss_and_gradients(*chunk, table, table_bias, with_gradient)
            per_row.append(found)
            if with_gradient and not ctx.one_chunk:
                one = torch.ones_like(found[0][0])
                parts = ops.parameter_gradients(gradient, *chunk, one, len(weight), (one.dtype, one.dtype))
                sums = parts if sums is None else [a.add_(b) for a, b in zip(sums, parts, strict=True)]
        row_loss, hit, rows_gradient = map(_join, zip(*per_row, strict=True))
        if with_gradient:
            ctx.save_for_backward(targets, rows_gradient, *((gradient, rows) if ctx.one_chunk else sums))
        ctx.ops, ctx.vocabulary, ctx.dtypes = ops, len(weight), (hidden.dtype, weight.dtype, bias.dtype)
        results = ops.sums(row_loss, hit, targets, bins)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)  # no zeros for the results without a gradient
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, factor, *_):
        if factor is None:
            return (None,) * 7
        targets, rows_gradient, *kept = ctx.saved_tensors
        hidden = ctx.ops.scaled(rows_gradient, targets, factor, ctx.dtypes[0])
        if not any(ctx.needs_input_grad[1:3]):
            return hidden, *[None] * 6
        if ctx.one_chunk:
            gradient, rows = kept
            parts = ctx.ops.parameter_gradients(gradient, rows, targets, factor, ctx.vocabulary, ctx.dtypes[1:])
        else:
            parts = [(x * factor).to(dtype) for x, dtype in zip(kept, ctx.dtypes[1:], strict=True)]
        return hidden, *parts, *[None] * 4


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

    hidden_rows: (M, D), gathered and transformed. weight: (V, D) and bias: (V,), in the rows' dtype or float32.
    targets: (M,) int32, -100 in spare rows, which come last and add nothing to any result or gradient, whatever the
    rows hold. num_masked: () int32. bins: (M,) integers 0..16 or -1 (`lowest_bit` of the rows' tags), or None for
    empty bins. backend: see `posmask.kernels.backend.resolve`.

    Gradients of loss_sum come in the dtype of each argument, rounded once; that in fp32 weights of bf16 rows has bf16's
    precision on a CPU that multiplies bf16. Equal calls give equal bits. On CUDA the
    host never waits and the call can be captured in a CUDA graph. Memory held until the backward: the logits' gradient,
    M · V numbers in the rows' dtype (fp32 on a CPU without bf16 arithmetic), or, where that exceeds MAX_LOGITS_BYTES,
    the parameters' gradients in fp32.

    DeepSpeed: ZeRO 0, 1 and 2 need nothing. Under ZeRO-3 `weight` and `bias` must be gathered during this call, as
    they are where a module's forward reads them; the backward needs their gradients' shapes alone.
    """
    chosen = resolve(backend, hidden_rows, "masked_lm_loss")
    if chosen == "triton":
        from posmask.kernels import masked_lm_loss_triton as ops
    elif hidden_rows.device.type == "cpu":
        from posmask.kernels import masked_lm_loss_torch as ops

        # Counting is free here, and the spare rows then cost nothing.
        num_live = int((targets >= 0).sum())
        hidden_rows, targets = hidden_rows[:num_live], targets[:num_live]
        bins = None if bins is None else bins[:num_live]
    else:
        return masked_lm_loss_reference(hidden_rows, weight, bias, targets, num_masked, bins)
    # Triton launches on the current device. The dtypes are chosen here, whatever autocast is on.
    with torch.cuda.device_of(hidden_rows), torch.autocast(hidden_rows.device.type, enabled=False):
        loss_sum, *of_bins = _Loss.apply(hidden_rows, weight, bias, targets, bins, ops, torch.is_grad_enabled())
    return MaskedLMLoss(loss_sum, num_masked, *of_bins)
