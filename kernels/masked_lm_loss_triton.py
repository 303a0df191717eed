"""The steps of `masked_lm_loss` on a GPU: cuBLAS for the three products, Triton for what lies between them.

M rows (static capacity), D width, V vocabulary, P: V rounded up to a multiple of 128, without which the rows of the
logits are not aligned (30522) and cuBLAS takes slow kernels. The padding's bias is -inf, so it gets no probability.
Nothing waits for the device, nothing is added up by atomics: the results are equal bit for bit, call after call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from posmask.kernels.masked_lm_loss import NUM_BINS

ALIGNMENT = 128
TILE = 128  # rows and columns of an output tile of cuBLAS, about
ROW_BLOCK = 8192  # logits a program has in its registers: 16 a thread
MAX_SPLITS = 8


@triton.jit
def _row_kernel(
    logits, bias, targets, row_loss, hit, row_stride, num_columns, wide: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: loss and hit, and its logits overwritten with the gradient of the loss (zeros in a spare row)."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    if target < 0:
        for start in range(0, num_columns, BLOCK):
            at = start + columns
            tl.store(logits + at, tl.zeros([BLOCK], logits.dtype.element_ty), mask=at < num_columns)
        tl.store(row_loss + row, tl.zeros([], wide))
        tl.store(hit + row, 0)
    else:
        of_target = tl.load(logits + target).to(wide) + tl.load(bias + target).to(wide)
        top = tl.full([], float("-inf"), wide)
        total = tl.zeros([], wide)
        for start in range(0, num_columns, BLOCK):
            at = start + columns
            mask = at < num_columns
            z = tl.load(logits + at, mask=mask, other=float("-inf")).to(wide)
            z += tl.load(bias + at, mask=mask, other=0.0).to(wide)
            new_top = tl.maximum(top, tl.max(z, axis=0))
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), axis=0)
            top = new_top
        # The row was just read: it comes from L2, or L1, this time.
        inverse = 1.0 / total
        for start in range(0, num_columns, BLOCK):
            at = start + columns
            mask = at < num_columns
            z = tl.load(logits + at, mask=mask, other=float("-inf")).to(wide)
            z += tl.load(bias + at, mask=mask, other=0.0).to(wide)
            gradient = tl.exp(z - top) * inverse - tl.where(at == target, 1.0, 0.0)
            tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=mask)
        tl.store(row_loss + row, top - of_target + tl.log(total))
        tl.store(hit + row, (of_target >= top).to(tl.int8))


@triton.jit
def _column_sum_kernel(
    gradient, factor, out, num_rows, row_stride, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out[column] = factor · Σ gradient[:, column], rows in a fixed order. The rows are padded to full tiles."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(factor)
    sums = tl.zeros([ROWS, COLUMNS], scale.dtype)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = gradient + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
        sums += tl.load(at, mask=(rows < num_rows)[:, None], other=0.0).to(scale.dtype)
    total = tl.sum(sums, axis=0) * scale
    tl.store(out + columns, total.to(out.dtype.element_ty), mask=columns < num_columns)


@triton.jit
def _scale_kernel(x, targets, factor, out, width, BLOCK: tl.constexpr):
    """out[row] = x[row] · factor; zeros in a spare row, whatever it holds."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    scale = tl.load(factor)
    live = tl.load(targets + row) >= 0
    value = tl.load(x + row * width + columns, mask=mask & live, other=0.0).to(scale.dtype) * scale
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sums_kernel(
    row_loss, hit, targets, bins, loss_sum, bin_loss, bin_hits, bin_count, num_rows, NUM_BINS: tl.constexpr,
    HAS_BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program b sums bin b; program NUM_BINS sums all rows."""
    own = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    losses = tl.zeros([BLOCK], row_loss.dtype.element_ty)
    hits = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_rows, BLOCK):
        rows = start + offsets
        mask = rows < num_rows
        member = mask & (tl.load(targets + rows, mask=mask, other=-1) >= 0)
        if HAS_BINS:
            member &= (own == NUM_BINS) | (tl.load(bins + rows, mask=mask, other=-1) == own)
        else:
            member &= own == NUM_BINS
        losses += tl.load(row_loss + rows, mask=member, other=0.0)
        hits += tl.load(hit + rows, mask=member, other=0).to(tl.int32)
        count += member.to(tl.int32)
    if own == NUM_BINS:
        tl.store(loss_sum, tl.sum(losses, axis=0))
    else:
        tl.store(bin_loss + own, tl.sum(losses, axis=0))
        tl.store(bin_hits + own, tl.sum(hits, axis=0).to(tl.int64))
        tl.store(bin_count + own, tl.sum(count, axis=0).to(tl.int64))


def prepare(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows (M, D); weight (P, D) in their dtype and bias (P,), padded. float32 parameters of bf16 rows are cast."""
    padding = -len(weight) % ALIGNMENT
    weight = weight.to(hidden.dtype)
    if padding:
        weight, bias = F.pad(weight, (0, 0, 0, padding)), F.pad(bias, (0, padding), value=float("-inf"))
    return hidden.contiguous(), weight, bias


def loss_and_gradients(
    rows: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of the loss in the logits (M, P), dtype of the rows; row_loss (M,), hit (M,) int8, and the gradient in
    the rows (M, D) in fp32 (empty without `with_gradient`)."""
    logits = rows @ weight.T
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    row_loss = torch.empty(len(rows), dtype=wide, device=rows.device)
    hit = torch.empty(len(rows), dtype=torch.int8, device=rows.device)
    block = min(ROW_BLOCK, triton.next_power_of_2(logits.shape[1]))
    _row_kernel[(len(rows),)](
        logits, bias, targets, row_loss, hit, logits.stride(0), logits.shape[1],
        wide=tl.float64 if wide == torch.float64 else tl.float32, BLOCK=block, num_warps=max(4, block // 512),
    )  # fmt: skip
    gradient = _rows_gradient(logits, weight) if with_gradient else row_loss.new_empty(0)
    return logits, row_loss, hit, gradient


def num_splits(num_rows: int, width: int, vocabulary: int, num_processors: int) -> int:
    """Parts of the vocabulary that are summed apart, so that the few tiles of an (M, D) product fill the GPU twice."""
    tiles, splits = triton.cdiv(num_rows, TILE) * triton.cdiv(width, TILE), 1
    while splits < MAX_SPLITS and tiles * splits < 2 * num_processors and vocabulary % (16 * splits) == 0:
        splits *= 2
    return splits


def _rows_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """(M, P) x (P, D) → (M, D), in fp32 from bf16: the sum over the vocabulary is never rounded to less."""
    processors = torch.cuda.get_device_properties(weight.device).multi_processor_count if weight.is_cuda else 1
    splits = num_splits(len(gradient), weight.shape[1], len(weight), processors)
    a, b = gradient.unflatten(1, (splits, -1)).transpose(0, 1), weight.unflatten(0, (splits, -1))
    parts = torch.bmm(a, b, out_dtype=torch.float32) if weight.element_size() == 2 else torch.bmm(a, b)
    return parts[0] if splits == 1 else parts.sum(dim=0)


def scaled(x: Tensor, targets: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x (M, D) times factor (), rounded once to `dtype`; zeros in spare rows."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if len(x):
        _scale_kernel[(len(x),)](x, targets, factor, out, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out


def parameter_gradients(
    gradient: Tensor, rows: Tensor, targets: Tensor, factor: Tensor, vocabulary: int, dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients in weight (V, D) and bias (V,), times factor (), rounded once to `dtypes`."""
    rows = scaled(rows, targets, factor, rows.dtype)
    widens = rows.element_size() == 2 and dtypes[0] == torch.float32
    weight = torch.mm(gradient.T, rows, out_dtype=dtypes[0]) if widens else (gradient.T @ rows).to(dtypes[0])
    bias = torch.empty(vocabulary, dtype=dtypes[1], device=rows.device)
    _column_sum_kernel[(gradient.shape[1] // ALIGNMENT,)](
        gradient, factor, bias, len(gradient), gradient.stride(0), vocabulary, ROWS=32, COLUMNS=ALIGNMENT, num_warps=8
    )  # fmt: skip
    return weight[:vocabulary], bias


def sums(row_loss: Tensor, hit: Tensor, targets: Tensor, bins: Tensor | None) -> tuple[Tensor, ...]:
    """loss_sum, bin_loss, bin_hits and bin_count."""
    loss_sum, bin_loss = row_loss.new_empty(()), row_loss.new_zeros(NUM_BINS)
    bin_hits, bin_count = torch.zeros(2, NUM_BINS, dtype=torch.int64, device=row_loss.device)
    _sums_kernel[(NUM_BINS + 1,)](
        row_loss, hit, targets, targets if bins is None else bins, loss_sum, bin_loss, bin_hits, bin_count,
        len(row_loss), NUM_BINS=NUM_BINS, HAS_BINS=bins is not None, BLOCK=1024,
    )  # fmt: skip
    return loss_sum, bin_loss, bin_hits, bin_count
