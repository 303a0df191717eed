"""Attention between ragged sequences that lie end to end: no padding on a GPU, next to none on a CPU.

Shapes: S sequences; Q query rows and K key rows of all of them; D width, H heads. A query row attends to all key rows
of its sequence, and to no other.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from posmask.kernels.backend import resolve

SEQUENCES_PER_RECTANGLE = 32


class Ragged:
    """Which rows attend to which; made once for a batch and used by every layer.

    On a GPU a Triton kernel has a program for each sequence and head, and nothing waits for the device. Elsewhere, and
    where a sequence is longer than that kernel takes, sequences of equal length are gathered into rectangles, which
    need no mask; their shapes are read by the host, for free on a CPU.
    """

    def __init__(
        self, owner: Tensor, key_starts: Tensor, max_queries: int, max_keys: int, *, is_sorted: bool,
        live: Tensor | None = None,
    ):  # fmt: skip
        """owner (Q,) int64: sequence of each query row; key_starts (S+1,) int32.

        max_queries, max_keys: bounds of the rows of one sequence. is_sorted: the owners of live rows are known to
        ascend. live (Q,) bool, false from some row on: what follows attends to nothing; its result is finite and means
        nothing, its gradient must be zero. None: all rows are live.
        """
        self.owner, self.key_starts, self.live = owner, key_starts, live
        self.max_queries, self.max_keys, self.is_sorted = max_queries, max_keys, is_sorted

    def __call__(
        self, query_QD: Tensor, key_KD: Tensor, value_KD: Tensor, num_heads: int, backend: str = "auto"
    ) -> Tensor:
        """(Q, D) x (K, D) x (K, D) -> (Q, D), in the type of the arguments.

        backend: as in `resolve`, but what the kernel does not take (fp64, more than 256 keys) is never refused.
        """
        if resolve(backend, query_QD, "ragged_attention") == "triton":
            from posmask.kernels import ragged_attention_triton as kernels

            if kernels.fits(query_QD, num_heads, self.max_keys):
                order, query_starts = self._by_sequence
                return kernels.RaggedAttention.apply(
                    query_QD, key_KD, value_KD, num_heads, order, query_starts, self.key_starts,
                    self.max_queries, self.max_keys, self.live is not None,
                )  # fmt: skip
        dtype, plan = query_QD.dtype, self._rectangles
        if query_QD.device.type == "cpu" and dtype.itemsize == 2:
            # torch's attention works out in fp32 what it is given in bf16, but takes two to four times as long.
            query_QD, key_KD, value_KD = query_QD.float(), key_KD.float(), value_KD.float()
        query = _Arrange.apply(query_QD, plan.query_source, plan.query_place)
        key, value = (
            x if plan.key_source is None else _Arrange.apply(x, plan.key_source, plan.key_place)
            for x in (key_KD, value_KD)
        )
        parts = zip(
            plan.num_sequences,
            query.split(plan.num_query_rows), key.split(plan.num_key_rows), value.split(plan.num_key_rows),
            strict=True,
        )  # fmt: skip
        context = [_attend(num_sequences, num_heads, *part) for num_sequences, *part in parts]
        return _Restore.apply(torch.cat(context), plan.query_place).to(dtype)

    @cached_property
    def _by_sequence(self) -> tuple[Tensor | None, Tensor]:
        """The order of query rows by sequence (None where they lie so), and where each begins in it, (S+1,) int32."""
        num_sequences = self.key_starts.numel() - 1
        owner = self.owner if self.live is None else torch.where(self.live, self.owner, num_sequences)
        order = None
        if not self.is_sorted:
            owner, order = owner.sort(stable=True)
        return order, torch.searchsorted(owner, torch.arange(num_sequences + 1, device=owner.device)).int()

    @cached_property
    def _rectangles(self) -> Rectangles:
        key_starts = self.key_starts.cpu().numpy().astype(np.int64)
        return Rectangles.of(self.owner.cpu().numpy(), key_starts, self.owner.device)


class Rectangles(NamedTuple):
    """Rows gathered so that sequences of equal key length lie together, their queries padded to the most among them."""

    query_source: Tensor  # (P,) row of each place; padding repeats any row
    query_place: Tensor  # (Q,) place of each row
    key_source: Tensor | None  # (K,) as above, without padding; None: keys stay where they are
    key_place: Tensor | None
    num_sequences: list[int]  # of each rectangle
    num_query_rows: list[int]
    num_key_rows: list[int]

    @staticmethod
    def of(owner: np.ndarray, key_starts: np.ndarray, device: torch.device) -> Rectangles:
        """owner (Q,) int64 in [0, S); key_starts (S+1,) int64."""
        key_lengths = np.diff(key_starts)
        num_queries = np.bincount(owner, minlength=len(key_lengths))
        rows = np.argsort(owner, kind="stable")
        first = np.cumsum(num_queries) - num_queries
        order = np.argsort(key_lengths, kind="stable")
        queries, valid, keys, shapes = [], [], [], []
        for run in np.split(order, np.flatnonzero(np.diff(key_lengths[order])) + 1):
            for part in np.array_split(run, -(-len(run) // SEQUENCES_PER_RECTANGLE)):
                width = np.arange(max(1, num_queries[part].max()))
                valid.append((width < num_queries[part, None]).ravel())
                queries.append((first[part, None] + width).ravel())
                keys.append((key_starts[part, None] + np.arange(key_lengths[part[0]])).ravel())
                shapes.append((len(part), len(queries[-1]), len(keys[-1])))
        valid = np.concatenate(valid)
        query_source = rows[np.concatenate(queries).clip(max=len(rows) - 1)]
        query_place = _inverse(query_source[valid], np.flatnonzero(valid))
        key_source = np.concatenate(keys)
        in_place = np.array_equal(order, np.arange(len(order)))
        key_place = _inverse(key_source, np.arange(len(key_source)))
        arrays = query_source, query_place, None if in_place else key_source, None if in_place else key_place
        tensors = [None if x is None else torch.from_numpy(x).to(device) for x in arrays]
        return Rectangles(*tensors, *map(list, zip(*shapes, strict=True)))


def _inverse(source: np.ndarray, place: np.ndarray) -> np.ndarray:
    inverse = np.empty(len(source), np.int64)
    inverse[source] = place
    return inverse


def _attend(num_sequences: int, num_heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = (x.unflatten(-1, (num_heads, -1)).unflatten(0, (num_sequences, -1)) for x in (query, key, value))
    context = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads))
    return context.transpose(1, 2).reshape(query.shape)


class _Arrange(torch.autograd.Function):
    """x[source]. Its gradient is a gather too, since each row stands at `place` once and padding has no gradient;
    autograd's own would be a scatter-add, several times slower on a CPU and unordered on a GPU."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, source)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Restore(torch.autograd.Function):
    """x[place]: drops the padding, whose gradient is zero."""

    @staticmethod
    def forward(ctx, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.num_places = len(x)
        return x.index_select(0, place)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_places, grad.shape[1]).index_copy_(0, place, grad), None
