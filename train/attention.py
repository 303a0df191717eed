"""Attention between ragged sequences that lie end to end: no padding on a GPU, little on a CPU.

Shapes: S sequences; Q query rows and K key rows of all of them; D width, H heads. A query row attends to all key rows
of its sequence, and to no other.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from posmask.kernels.backend import resolve
from posmask.kernels.ragged_attention_torch import RaggedAttention, Rectangles


class Ragged:
    """Which rows attend to which; made once for a batch and used by every layer.

    On a GPU a Triton kernel has a program for each sequence and head, and nothing waits for the device. Elsewhere, and
    where a sequence is longer than that kernel takes, sequences of like length are gathered into rectangles, whose
    shapes are read by the host, for free on a CPU.
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
        self._plans: dict[int, Rectangles] = {}

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
        return RaggedAttention.apply(query_QD, key_KD, value_KD, self._rectangles(num_heads))

    @cached_property
    def _by_sequence(self) -> tuple[Tensor | None, Tensor]:
        """The order of query rows by sequence (None where they lie so), and where each begins in it, (S+1,) int32."""
        num_sequences = self.key_starts.numel() - 1
        owner = self.owner if self.live is None else torch.where(self.live, self.owner, num_sequences)
        order = None
        if not self.is_sorted:
            owner, order = owner.sort(stable=True)
        return order, torch.searchsorted(owner, torch.arange(num_sequences + 1, device=owner.device)).int()

    def _rectangles(self, num_heads: int) -> Rectangles:
        if num_heads not in self._plans:
            self._plans[num_heads] = Rectangles.of(self.owner, self.key_starts, num_heads)
        return self._plans[num_heads]
