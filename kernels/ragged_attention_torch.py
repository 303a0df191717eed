"""Attention between short ragged sequences in torch: sequences of like length are gathered into rectangles.

Captions have about 13 tokens and images 16 or 49. torch's own attention for a CPU is made for hundreds, and takes twice
as long over rectangles without padding as batched products of small matrices take over padded ones.

Shapes: S sequences; Q query rows, K key rows of all of them; D width, H heads. A head's row is the part of a row, D / H
numbers, that belongs to a head: number r·H + h for row r and head h.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SEQUENCES_PER_RECTANGLE = 64
FEWEST_KEYS = 16  # numbers in a vector of AVX-512: over fewer, torch's softmax takes up to nine times as long


class Rectangles(NamedTuple):
    """Where the rows of sequences go; rectangles lie end to end, each a batch of matrices, one a sequence and head."""

    queries: Places
    keys: Places
    keys_mask: list[Tensor]  # of each rectangle, (matrices, 1, keys) float32: 0, or -inf for padding

    @staticmethod
    def of(owner: Tensor, key_starts: Tensor, num_heads: int) -> Rectangles:
        """owner (Q,) int64: sequence of each query row; key_starts (S+1,) int32. The host reads both."""
        device, owner, starts = key_starts.device, owner.cpu().numpy(), key_starts.cpu().numpy().astype(np.int64)
        num_keys = np.diff(starts)
        num_queries = np.bincount(owner, minlength=len(num_keys))
        most_rows = np.maximum(num_keys, num_queries)
        order = np.lexsort((num_queries, most_rows))
        parts = np.split(order, _cuts(most_rows[order]))
        queries = Places.of(np.argsort(owner, kind="stable"), num_queries, parts, num_heads).to(device)
        keys = Places.of(np.arange(starts[-1]), num_keys, parts, num_heads, min_rows=FEWEST_KEYS).to(device)
        mask = torch.where(keys.is_row, 0.0, float("-inf"))
        return Rectangles(queries, keys, [x.mT for x in keys.matrices(mask)])


def _cuts(num_rows: np.ndarray) -> list[int]:
    """Where to part sequences with ascending numbers of rows (S,): none is padded to more than twice as many and 16."""
    cuts = [0]
    while cuts[-1] < len(num_rows):
        reach = np.searchsorted(num_rows, 2 * num_rows[cuts[-1]] + FEWEST_KEYS, side="right")
        cuts.append(min(cuts[-1] + SEQUENCES_PER_RECTANGLE, int(reach)))
    return cuts[1:-1]


class Places(NamedTuple):
    """P places of heads' rows in rectangles, some of them padding, which holds any row: all have to be finite."""

    source: Tensor  # (P,) int64: the head's row at each place
    place: Tensor  # (N·H,) int64: the place of each head's row
    is_row: Tensor  # (P, 1) bool: not padding
    num_heads: int
    shapes: list[tuple[int, int]]  # of each rectangle: how many matrices, of how many rows

    @staticmethod
    def of(
        rows: np.ndarray, num_rows: np.ndarray, parts: list[np.ndarray], num_heads: int, min_rows: int = 1
    ) -> Places:
        """rows (N,) int64 of all sequences in turn, num_rows (S,) how many of them each has, parts the sequences of
        each rectangle. A matrix has at least `min_rows` rows."""
        first, head = np.cumsum(num_rows) - num_rows, np.arange(num_heads)[:, None]
        sources, valid, shapes = [], [], []
        for part in parts:
            within = np.arange(max(min_rows, num_rows[part].max()))
            row = rows[(first[part, None] + within).clip(max=len(rows) - 1)]
            sources.append((row[:, None] * num_heads + head).ravel())  # sequence, head, row
            valid.append(np.repeat(within < num_rows[part, None], num_heads, axis=0).ravel())
            shapes.append((len(part) * num_heads, len(within)))
        source, is_row = np.concatenate(sources), np.concatenate(valid)
        place = np.empty(len(rows) * num_heads, np.int64)
        place[source[is_row]] = np.flatnonzero(is_row)
        return Places(*map(torch.from_numpy, (source, place, is_row[:, None])), num_heads, shapes)

    def to(self, device: torch.device) -> Places:
        return Places(*(x.to(device) for x in self[:3]), *self[3:])

    def arrange(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (N, D) of H heads -> (P, D / H)."""
        return x.reshape(len(self.place), -1).index_select(0, self.source).to(dtype)

    def restore(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(P, D / H) -> rows (N, D), without padding."""
        return x.index_select(0, self.place).to(dtype).view(-1, self.num_heads * x.shape[1])

    def matrices(self, x: Tensor) -> list[Tensor]:
        """(P, width) -> of each rectangle (matrices, rows, width), views."""
        parts = x.split([matrices * rows for matrices, rows in self.shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, self.shapes, strict=True)]


class RaggedAttention(torch.autograd.Function):
    """query (Q, D), key (K, D), value (K, D) -> (Q, D), each query row over the keys of its sequence.

    In the dtype of the arguments. Half precision is worked out in fp32 and rounded once: scores and weights keep their
    digits. autocast changes nothing: it knows no product into given memory.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, plan: Rectangles) -> Tensor:
        dtype = torch.float32 if query.dtype.itemsize == 2 else query.dtype
        q, k, v = plan.queries.arrange(query, dtype), plan.keys.arrange(key, dtype), plan.keys.arrange(value, dtype)
        ctx.scale = q.shape[1] ** -0.5
        q.mul_(ctx.scale)
        context, weights = torch.empty_like(q), []
        matrices = zip(*map(plan.queries.matrices, (q, context)), *map(plan.keys.matrices, (k, v)), strict=True)
        with torch.autocast(q.device.type, enabled=False):
            for (part_q, out, part_k, part_v), mask in zip(matrices, plan.keys_mask, strict=True):
                scores = torch.bmm(part_q, part_k.mT).add_(mask)
                weights.append(scores.softmax(-1))
                torch.bmm(weights[-1], part_v, out=out)
        ctx.plan, ctx.dtype = plan, query.dtype
        ctx.save_for_backward(q, k, v, *weights)
        return plan.queries.restore(context, query.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *weights = ctx.saved_tensors
        queries, keys, _ = ctx.plan
        g = queries.arrange(grad, q.dtype).mul_(queries.is_row)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        matrices = *map(queries.matrices, (q, g, grad_q)), *map(keys.matrices, (k, v, grad_k, grad_v))
        with torch.autocast(q.device.type, enabled=False):
            for p, part_q, part_g, out_q, part_k, part_v, out_k, out_v in zip(weights, *matrices, strict=True):
                torch.bmm(p.mT, part_g, out=out_v)
                of_weights = torch.bmm(part_g, part_v.mT)
                of_scores = torch.ops.aten._softmax_backward_data(of_weights, p, -1, p.dtype)
                torch.bmm(of_scores, part_k, out=out_q)
                torch.bmm(of_scores.mT, part_q, out=out_k)
        grad_q.mul_(ctx.scale)
        grad_key, grad_value = (keys.restore(x, ctx.dtype) for x in (grad_k, grad_v))
        return queries.restore(grad_q, ctx.dtype), grad_key, grad_value, None
