"""Ragged attention against one sequence at a time, on both of its paths, and the rows that attend to nothing."""

import pytest
import torch
import torch.nn.functional as F

from posmask.train import attention
from posmask.train.attention import Ragged

WIDTH, HEADS = 12, 3


def one_by_one(owner, key_starts, query, key, value):
    """(Q, D) by a loop over query rows."""
    rows = []
    for row, sequence in zip(query, owner.tolist(), strict=True):
        span = slice(int(key_starts[sequence]), int(key_starts[sequence + 1]))
        heads = (x.view(-1, HEADS, WIDTH // HEADS).transpose(0, 1) for x in (row, key[span], value[span]))
        rows.append(F.scaled_dot_product_attention(*heads).reshape(WIDTH))
    return torch.stack(rows)


def gradients(context, inputs, live=None):
    weight = torch.linspace(-1, 1, context.numel(), dtype=context.dtype).view_as(context)
    weight = weight if live is None else torch.where(live[:, None], weight, 0)
    return torch.autograd.grad((context * weight).sum(), inputs)


class VarlenAttention(torch.autograd.Function):
    """varlen_attn as documented, in the plain: rows of no sequence are left unwritten (NaN), forward and backward."""

    @staticmethod
    def forward(ctx, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k)
        assert cu_seq_q.diff().max() <= max_q and cu_seq_k.diff().max() <= max_k
        ctx.save_for_backward(query, key, value, cu_seq_q, cu_seq_k)
        context = torch.full_like(query, torch.nan)
        for q, k in spans(cu_seq_q, cu_seq_k):
            heads = (x.transpose(0, 1) for x in (query[q], key[k], value[k]))
            context[q] = F.scaled_dot_product_attention(*heads).transpose(0, 1)
        return context

    @staticmethod
    def backward(ctx, grad):
        query, key, value, cu_seq_q, cu_seq_k = ctx.saved_tensors
        grads = [torch.full_like(query, torch.nan), torch.zeros_like(key), torch.zeros_like(value)]
        for q, k in spans(cu_seq_q, cu_seq_k):
            with torch.enable_grad():
                parts = [x.detach().requires_grad_() for x in (query[q], key[k], value[k])]
                out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in parts)).transpose(0, 1)
                found = torch.autograd.grad(out, parts, grad[q])
            for whole, span, part in zip(grads, (q, k, k), found, strict=True):
                whole[span] = part
        return *grads, None, None, None, None


def spans(*starts):
    lists = [s.tolist() for s in starts]
    for i in range(len(lists[0]) - 1):
        yield tuple(slice(s[i], s[i + 1]) for s in lists)


@pytest.fixture(params=["rectangles", "varlen"])
def attend(request, monkeypatch):
    """Calls a Ragged by one of its two paths; the GPU's runs on a stand-in for the kernel."""
    monkeypatch.setattr(attention, "varlen_attn", VarlenAttention.apply)
    if request.param == "varlen":
        return lambda ragged, *tensors: ragged._varlen(*tensors, HEADS)
    return lambda ragged, *tensors: ragged(*tensors, HEADS)


def tensors(num_queries, num_keys):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
            for n in (num_queries, num_keys, num_keys)]  # fmt: skip


CASES = {
    # Key lengths, owner of each query row. Lengths that come back, one key alone.
    "itself": ([3, 1, 5, 3], [0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3]),
    "some rows": ([3, 1, 5, 3], [0, 2, 2, 3]),  # none of sequence 1
    "equal keys, unsorted": ([4, 4, 4], [2, 2, 0, 1, 1, 1, 0, 2]),
    "one sequence for all": ([6], [0] * 7),
    "more than a rectangle": ([2] * 70, sorted([*range(70), 5, 5, 41])),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_attention_one_by_one(attend, case):
    lengths, owner = CASES[case]
    owner = torch.tensor(owner)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs = tensors(len(owner), sum(lengths))
    is_sorted = bool((owner.diff() >= 0).all())
    most = int(owner.bincount().max())
    context = attend(Ragged(owner, starts, most, max(lengths), is_sorted=is_sorted), *inputs)
    truth = one_by_one(owner, starts, *inputs)
    torch.testing.assert_close(context, truth, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(gradients(context, inputs), gradients(truth, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("owner", [[0, 2, 2, 3, 0, 0], [2, 0, 3, 2, 0, 0], [0] * 6], ids=["sorted", "unsorted", "one"])
@pytest.mark.parametrize("num_live", [4, 0])
def test_rows_that_are_not_live_stay_finite_and_add_nothing(attend, owner, num_live):
    owner = torch.tensor(owner)
    live = torch.arange(6) < num_live
    starts = torch.tensor([0, 3, 4, 9, 12], dtype=torch.int32)
    inputs = tensors(6, 12)
    is_sorted = bool((owner[:num_live].diff() >= 0).all())
    context = attend(Ragged(owner, starts, 6, 5, is_sorted=is_sorted, live=live), *inputs)
    truth = one_by_one(owner, starts, *inputs)
    assert context.isfinite().all()
    torch.testing.assert_close(context[live], truth[live], atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(gradients(context, inputs, live), gradients(truth, inputs, live), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
