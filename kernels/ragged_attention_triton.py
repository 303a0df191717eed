"""Attention between short ragged sequences on a GPU: one program for a sequence and head, without padding.

Captions have about 13 tokens and images 49, where the tiles of flash attention hold 128 rows. Here all keys of a
sequence are one tile, so softmax is not worked out in parts, the backward pass needs nothing but the inputs, and each
gradient is written by one program: no atomics, equal bit for bit call after call.

Shapes: S sequences; Q query rows, K key rows of all of them; D width, H heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_KEYS = 256  # of one sequence: a tile of keys, one of values and their gradients live in registers
MAX_HEAD_WIDTH = 128
ENOUGH_PROGRAMS = 2048  # beyond this the queries of a sequence are not split: each split loads the keys again


@triton.jit
def _weights(query, key, num_keys, scale, PRECISION: tl.constexpr):
    """Softmax over the keys of a tile, fp32."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    is_key = tl.arange(0, key.shape[0]) < num_keys
    scores = tl.where(is_key[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _tiles_of_keys(
    key, value, key_starts, sequence, columns, has_column, key_stride, value_stride, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Keys and values of a sequence, (BLOCK_K, BLOCK_D) each, its first row and its number of rows."""
    first_key = tl.load(key_starts + sequence)
    num_keys = tl.load(key_starts + sequence + 1) - first_key
    at_key = tl.arange(0, BLOCK_K)[:, None]
    is_key = (at_key < num_keys) & has_column
    first_key = first_key.to(tl.int64)
    k = tl.load(key + first_key * key_stride + at_key * key_stride + columns, mask=is_key, other=0.0)
    v = tl.load(value + first_key * value_stride + at_key * value_stride + columns, mask=is_key, other=0.0)
    return k, v, first_key, num_keys


@triton.jit
def _block_of_queries(order, start, last, HAS_ORDER: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Rows (BLOCK_Q, 1) int64 of the queries from place `start` on, and which of these there are."""
    place = start + tl.arange(0, BLOCK_Q)[:, None]
    rows = tl.load(order + place, mask=place < last, other=0) if HAS_ORDER else place
    return rows.to(tl.int64), place < last


@triton.jit
def _forward_kernel(
    query, key, value, out, order, query_starts, key_starts, scale, query_stride, key_stride, value_stride, out_stride,
    NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, HAS_ORDER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (S·H, splits): a head of a sequence, whose blocks of queries its splits share."""
    sequence, head = tl.program_id(0) // NUM_HEADS, tl.program_id(0) % NUM_HEADS
    columns = tl.arange(0, BLOCK_D)[None, :]
    has_column = columns < WIDTH
    query, out = query + head * WIDTH, out + head * WIDTH
    k, v, _, num_keys = _tiles_of_keys(
        key + head * WIDTH, value + head * WIDTH, key_starts, sequence, columns, has_column, key_stride, value_stride,
        BLOCK_K,
    )  # fmt: skip
    first, last = tl.load(query_starts + sequence), tl.load(query_starts + sequence + 1)
    for start in range(first + tl.program_id(1) * BLOCK_Q, last, tl.num_programs(1) * BLOCK_Q):
        rows, is_query = _block_of_queries(order, start, last, HAS_ORDER, BLOCK_Q)
        q = tl.load(query + rows * query_stride + columns, mask=is_query & has_column, other=0.0)
        p = _weights(q, k, num_keys, scale, PRECISION)
        context = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        tl.store(out + rows * out_stride + columns, context.to(out.dtype.element_ty), mask=is_query & has_column)


@triton.jit
def _backward_kernel(
    query, key, value, grad, grad_query, grad_key, grad_value, order, query_starts, key_starts, scale,
    query_stride, key_stride, value_stride, grad_stride, out_stride,
    NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, HAS_ORDER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (S·H,): the three gradients of a head of a sequence, with its softmax worked out again."""
    sequence, head = tl.program_id(0) // NUM_HEADS, tl.program_id(0) % NUM_HEADS
    columns = tl.arange(0, BLOCK_D)[None, :]
    has_column = columns < WIDTH
    query, grad, grad_query = query + head * WIDTH, grad + head * WIDTH, grad_query + head * WIDTH
    k, v, first_key, num_keys = _tiles_of_keys(
        key + head * WIDTH, value + head * WIDTH, key_starts, sequence, columns, has_column, key_stride, value_stride,
        BLOCK_K,
    )  # fmt: skip
    sum_key, sum_value = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    first, last = tl.load(query_starts + sequence), tl.load(query_starts + sequence + 1)
    for start in range(first, last, BLOCK_Q):
        rows, is_query = _block_of_queries(order, start, last, HAS_ORDER, BLOCK_Q)
        q = tl.load(query + rows * query_stride + columns, mask=is_query & has_column, other=0.0)
        g = tl.load(grad + rows * grad_stride + columns, mask=is_query & has_column, other=0.0)
        p = _weights(q, k, num_keys, scale, PRECISION)
        sum_value += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
        of_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        of_scores = p * (of_weights - tl.sum(p * of_weights, axis=1)[:, None]) * scale
        of_scores = of_scores.to(k.dtype)
        sum_key += tl.dot(tl.trans(of_scores), q, input_precision=PRECISION)
        of_query = tl.dot(of_scores, k, input_precision=PRECISION)
        at = grad_query + rows * out_stride + columns
        tl.store(at, of_query.to(grad_query.dtype.element_ty), mask=is_query & has_column)
    at_key = tl.arange(0, BLOCK_K)[:, None]
    is_key = (at_key < num_keys) & has_column
    offset = first_key * out_stride + head * WIDTH
    at = at_key * out_stride + columns
    tl.store(grad_key + offset + at, sum_key.to(grad_key.dtype.element_ty), mask=is_key)
    tl.store(grad_value + offset + at, sum_value.to(grad_value.dtype.element_ty), mask=is_key)


def fits(query: Tensor, num_heads: int, max_keys: int) -> bool:
    """Whether the kernels take queries (Q, D) of this type and width, and so many keys in a sequence."""
    dtypes = torch.bfloat16, torch.float16, torch.float32
    return query.dtype in dtypes and query.shape[1] <= num_heads * MAX_HEAD_WIDTH and max_keys <= MAX_KEYS


class RaggedAttention(torch.autograd.Function):
    """query (Q, D), key (K, D), value (K, D) → (Q, D), each query row over the keys of its sequence.

    Keys of sequence s are the rows key_starts[s] to key_starts[s+1], its queries the rows order[i] (or i, without
    `order`) for i from query_starts[s] to query_starts[s+1]. Every row is the key of some sequence; a query of none
    gets zeros and passes no gradient on, which `has_spare_rows` announces. query, key, value: one type that `fits`, the
    result and the gradients have it too, sums are fp32; order (Q,) int64; query_starts, key_starts (S+1,) int32;
    max_queries, max_keys: bounds of the rows of one sequence, known to the host.
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, num_heads: int, order: Tensor | None, query_starts: Tensor,
        key_starts: Tensor, max_queries: int, max_keys: int, has_spare_rows: bool,
    ) -> Tensor:  # fmt: skip
        query, key, value = (x if x.stride(1) == 1 else x.contiguous() for x in (query, key, value))
        ctx.save_for_backward(query, key, value, order, query_starts, key_starts)
        width = query.shape[1] // num_heads
        block_k, block_d = (max(16, triton.next_power_of_2(n)) for n in (max_keys, width))
        ctx.constants = {
            "NUM_HEADS": num_heads, "WIDTH": width, "HAS_ORDER": order is not None,
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",  # of no meaning in half precision
            "BLOCK_Q": 16 if max_queries <= 32 else 32, "BLOCK_K": block_k, "BLOCK_D": block_d,
            # With half as many, the backward pass needs all registers or spills (ptxas, sm_90).
            "num_warps": min(8, max(1, block_k * block_d * query.element_size() // 2048)), "num_stages": 1,
        }  # fmt: skip
        ctx.has_spare_rows = has_spare_rows
        programs = (len(key_starts) - 1) * num_heads
        splits = min(triton.cdiv(max_queries, ctx.constants["BLOCK_Q"]), max(1, ENOUGH_PROGRAMS // max(1, programs)))
        out = _rows_like(query, has_spare_rows)
        if programs:
            _forward_kernel[(programs, splits)](
                query, key, value, out, query_starts if order is None else order, query_starts, key_starts,
                width**-0.5, query.stride(0), key.stride(0), value.stride(0), out.stride(0), **ctx.constants,
            )  # fmt: skip
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, order, query_starts, key_starts = ctx.saved_tensors
        grad = grad if grad.stride(1) == 1 else grad.contiguous()
        grads = _rows_like(query, ctx.has_spare_rows), _rows_like(key, False), _rows_like(value, False)
        programs = (len(key_starts) - 1) * ctx.constants["NUM_HEADS"]
        if programs:
            _backward_kernel[(programs,)](
                query, key, value, grad, *grads, query_starts if order is None else order, query_starts, key_starts,
                ctx.constants["WIDTH"] ** -0.5, query.stride(0), key.stride(0), value.stride(0), grad.stride(0),
                query.shape[1], **ctx.constants,
            )  # fmt: skip
        return *grads, *[None] * 7


def _rows_like(x: Tensor, are_zero: bool) -> Tensor:
    return (torch.zeros if are_zero else torch.empty)(x.shape, dtype=x.dtype, device=x.device)
