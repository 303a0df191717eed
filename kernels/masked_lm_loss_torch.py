"""The steps of `masked_lm_loss` in torch, for the CPU. M live rows, D width, V vocabulary.

bf16 is multiplied as bf16 only where the CPU has instructions for it. Elsewhere oneDNN emulates them, at a quarter of
the speed of fp32 (AVX-512 without bf16); rows and logits are then fp32, and the weight is widened block by block, in
cache, on its way into a product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from posmask.kernels.backend import has_bf16_instructions, padded_rows
from posmask.kernels.masked_lm_loss import bin_sums

WEIGHT_BLOCK = 2048  # vocabulary entries widened at a time: 6 MB at D = 768
ROW_BLOCK = 64  # rows whose bf16 logits are widened at a time


def prepare(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows in the dtype of the products; weight and bias as they are, but fp32 weights of bf16 rows are cast where
    bf16 is multiplied."""
    if torch.float64 in (hidden.dtype, weight.dtype):
        return hidden.double(), weight, bias
    if hidden.dtype == torch.bfloat16 and has_bf16_instructions():
        return hidden, weight.to(hidden.dtype), bias
    return hidden.float(), weight, bias


def _weight_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(places in the vocabulary, the weight there in `dtype`); a block holds until the next one is asked for."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    scratch = weight.new_empty(WEIGHT_BLOCK, weight.shape[1], dtype=dtype)
    for start in range(0, len(weight), WEIGHT_BLOCK):
        part = weight[start : start + WEIGHT_BLOCK]
        yield slice(start, start + len(part)), scratch[: len(part)].copy_(part)


def _padded(rows: Tensor) -> Tensor:
    """(M, D) with rows of zeros behind it, as many as products of its dtype like."""
    padding = padded_rows(len(rows), rows) - len(rows)
    return F.pad(rows, (0, 0, 0, padding)) if padding else rows


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def loss_and_gradients(
    rows: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of the loss in the logits, (M, V) and rows of zeros behind it, in the dtype of the rows; row_loss (M,),
    hit (M,) bool, and the gradient in the rows (M, D) in fp32 (empty without `with_gradient`)."""
    num_rows, rows = len(rows), _padded(rows)  # the logits of zeros are zeros, which no loss touches
    logits = rows.new_empty(len(rows), len(weight))
    for words, part in _weight_blocks(weight, rows.dtype):
        torch.mm(rows, part.T, out=logits[:, words])
    bias = _widen(bias)  # added after the product: addmm would first copy it into every row
    row_loss, hit = [], []
    blocks = ROW_BLOCK if rows.dtype == torch.bfloat16 else max(1, num_rows)
    for narrow, target in zip(logits[:num_rows].split(blocks), targets.long()[:, None].split(blocks), strict=True):
        wide = _widen(narrow).add_(bias)
        of_target, top = wide.gather(1, target), wide.amax(dim=1, keepdim=True)
        torch.softmax(wide, dim=1, out=wide)
        total = 1 / wide.amax(dim=1, keepdim=True)  # of the exponentials, of which the largest is 1
        wide.scatter_add_(1, target, wide.new_full((), -1).expand_as(target))
        if wide is not narrow:
            narrow.copy_(wide)
        row_loss.append(top - of_target + total.log())
        hit.append(of_target == top)
    gradient = rows.new_empty(rows.shape if with_gradient else 0)
    if with_gradient:
        for words, part in _weight_blocks(weight, rows.dtype):
            gradient.addmm_(logits[:, words], part, beta=int(words.start > 0))
    return logits, torch.cat(row_loss)[:, 0], torch.cat(hit)[:, 0], _widen(gradient[:num_rows])


def scaled(x: Tensor, targets: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x (M, D) times factor (), rounded once to `dtype`."""
    return (_widen(x) * factor).to(dtype)


def parameter_gradients(
    gradient: Tensor, rows: Tensor, targets: Tensor, factor: Tensor, vocabulary: int, dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients in weight (V, D) and bias (V,), times factor (), rounded once to `dtypes`."""
    rows = _padded(scaled(rows, targets, factor, rows.dtype))
    weight = rows.new_empty(vocabulary, rows.shape[1], dtype=dtypes[0])
    if dtypes[0] == rows.dtype:
        torch.mm(gradient.T, rows, out=weight)
    else:
        scratch = rows.new_empty(min(WEIGHT_BLOCK, vocabulary), rows.shape[1])
        for narrow, columns in zip(weight.split(WEIGHT_BLOCK), gradient.split(WEIGHT_BLOCK, dim=1), strict=True):
            narrow.copy_(torch.mm(columns.T, rows, out=scratch[: len(narrow)]))
    # In parts: torch makes an fp32 copy of what it is to sum in fp32.
    bias = sum(part.sum(dim=0, dtype=factor.dtype) for part in gradient.split(ROW_BLOCK))
    return weight, (bias * factor).to(dtypes[1])


def sums(row_loss: Tensor, hit: Tensor, targets: Tensor, bins: Tensor | None) -> tuple[Tensor, ...]:
    """loss_sum, bin_loss, bin_hits and bin_count."""
    return row_loss.sum(), *bin_sums(row_loss, hit, targets, bins)
