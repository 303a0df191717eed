"""Batch normalisation with statistics, weight and bias in fp32, which is fast on a CPU for few channels as well.

There torch gives each thread one row of C sums. Where C floats are no whole number of cache lines, the rows of two
threads share a line, which changes hands with every pixel; and 12 channels do not fill the vectors of a CPU. `_Folded`
takes k neighbouring pixels as one pixel of k * C channels, 16 or a multiple of it, and merges what it finds for each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHE_LINE_FLOATS = 16
batch_norm_backward = torch.ops.aten.native_batch_norm_backward


class BatchNorm2d(nn.BatchNorm2d):
    """In the dtype of its running statistics, fp32, whatever x is; DeepSpeed casts the parameters to bf16."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (parameter.to(self.running_mean.dtype) for parameter in (self.weight, self.bias))
        if self.training and _gains_from_folding(x):
            y, mean, var = _Folded.apply(x, weight, bias, self.eps)
            num_pixels = x.numel() // self.num_features
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (num_pixels / (num_pixels - 1)), self.momentum)
            return y
        return F.batch_norm(
            x, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
        )  # fmt: skip


def _fold(num_channels: int) -> int:
    return math.lcm(num_channels, CACHE_LINE_FLOATS) // num_channels


def _gains_from_folding(x: Tensor) -> bool:
    """x (B, C, H, W). What torch.compile makes of a batch norm has sums of its own."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    fold = _fold(x.shape[1])
    num_pixels = x.numel() // x.shape[1]
    return fold > 1 and num_pixels % fold == 0 and x.is_contiguous(memory_format=torch.channels_last)


class _Folded(torch.autograd.Function):
    """x (B, C, H, W) channels last, weight (C,), bias (C,) -> x normalised in its dtype; mean and variance (C,)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        num_channels = x.shape[1]
        fold = _fold(num_channels)
        rows = _as_rows(x, fold)
        # Running statistics, of a momentum of 0, so that those returned have their dtype and not that of x.
        running = weight.new_zeros(rows.shape[1])
        means, variances = torch.batch_norm_update_stats(rows, running, running, 0.0)
        means, variances = means.view(fold, num_channels), variances.view(fold, num_channels)
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        wide = [value.repeat(fold) for value in (weight, bias, mean, var)]
        # Into what is no view: the ReLU that follows works in place, which autograd allows in no view of a function's.
        y, unused = torch.empty_like(x), weight.new_empty(0)
        out = y.permute(0, 2, 3, 1).view(rows.shape), unused, unused
        torch.native_batch_norm(rows, *wide, False, 0.0, eps, out=out)
        ctx.save_for_backward(rows, *wide)
        ctx.eps, ctx.fold = eps, fold
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, weight, _, mean, var = ctx.saved_tensors
        grad_rows = _as_rows(grad, ctx.fold)
        only_sums = [False, True, True]
        _, *sums = batch_norm_backward(grad_rows, rows, weight, mean, var, None, None, False, ctx.eps, only_sums)
        grad_weight, grad_bias = (wide.view(ctx.fold, -1).sum(0) for wide in sums)
        num_pixels = rows.numel() // len(grad_bias)
        # weight / std * (grad - its mean - x normalised * the mean of its product with grad). That mean is taken off
        # before anything is rounded: in bf16 the difference may be small against it.
        grad_mean, product_mean = ((total / num_pixels).repeat(ctx.fold) for total in (grad_bias, grad_weight))
        slope = -weight * (var + ctx.eps).rsqrt() * product_mean
        grad_x = F.batch_norm(rows, mean, var, slope, training=False, eps=ctx.eps)
        grad_x += F.batch_norm(grad_rows, grad_mean, var, weight, training=False, eps=ctx.eps)
        return _as_images(grad_x, grad), grad_weight, grad_bias, None


def _as_rows(x: Tensor, fold: int) -> Tensor:
    """(B, C, H, W) -> (B * H * W / fold, fold * C); a view of what is channels last."""
    return x.permute(0, 2, 3, 1).reshape(-1, fold * x.shape[1])


def _as_images(rows: Tensor, like: Tensor) -> Tensor:
    batch, channels, height, width = like.shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)
