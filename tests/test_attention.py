"""Ragged attention against one sequence at a time, on both of its paths, and the rows that attend to nothing."""

import importlib.util
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from posmask.kernels.ragged_attention_torch import FEWEST_KEYS, Rectangles
from posmask.train.attention import Ragged

HEADS = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's kernels run, interpreted on a CPU
assert_equal = {
    torch.float64: partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12),
    torch.float32: partial(torch.testing.assert_close, atol=2e-5, rtol=2e-5),
}


def one_by_one(owner, key_starts, query, key, value):
    """(Q, D) by a loop over query rows."""
    rows = []
    for row, sequence in zip(query.split(1), owner.tolist(), strict=True):
        span = slice(int(key_starts[sequence]), int(key_starts[sequence + 1]))
        heads = (x.unflatten(1, (HEADS, -1)).transpose(0, 1) for x in (row, key[span], value[span]))
        rows.append(F.scaled_dot_product_attention(*heads).flatten())
    return torch.stack(rows)


def gradients(context, inputs, live=None):
    weight = torch.linspace(-1, 1, context.numel(), dtype=context.dtype, device=context.device).view_as(context)
    weight = weight if live is None else torch.where(live[:, None], weight, 0)
    return torch.autograd.grad((context * weight).sum(), inputs)


def assert_same(context, truth, leaves, live=None):
    """Rows that are live and, of these, the gradients in the leaves."""
    check = assert_equal[context.dtype]
    check(*(x if live is None else x[live] for x in (context, truth)))
    for ours, theirs in zip(gradients(context, leaves, live), gradients(truth, leaves, live), strict=True):
        check(ours, theirs)


@pytest.fixture(params=["torch", "triton"])
def backend(request, poisoned_memory):
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    return request.param


def tensors(backend, num_queries, num_keys, width):
    """Leaves in fp64, or fp32 for Triton, and views of them whose rows do not lie end to end."""
    generator = torch.Generator().manual_seed(0)
    kind = {"dtype": torch.float64} if backend == "torch" else {"dtype": torch.float32, "device": DEVICE}
    leaves = [torch.randn(n, 2 * width, generator=generator).to(**kind).requires_grad_()
              for n in (num_queries, num_keys, num_keys)]  # fmt: skip
    return leaves, [leaf[:, :width] for leaf in leaves]


CASES = {
    # Key lengths, owner of each query row. Lengths that come back, one key alone.
    "itself": ([3, 1, 5, 3], [0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3]),
    "some rows": ([3, 1, 5, 3], [0, 2, 2, 3]),  # none of sequence 1
    "equal keys, unsorted": ([4, 4, 4], [2, 2, 0, 1, 1, 1, 0, 2]),
    "one sequence for all": ([6], [0] * 7),
    "more than a rectangle": ([2] * 70, sorted([*range(70), 5, 5, 41])),
    "tiles off the grid": ([49, 1, 65], [0] * 70 + [2] * 33),
    "whole tiles": ([64, 16], [0] * 32 + [1] * 64),
}


@pytest.mark.parametrize("width", [3 * 4, 3 * 16, 3 * 20])
@pytest.mark.parametrize("case", CASES)
def test_equals_attention_one_by_one(backend, case, width):
    lengths, owner = CASES[case]
    leaves, inputs = tensors(backend, len(owner), sum(lengths), width)
    owner = torch.tensor(owner, device=inputs[0].device)
    starts = torch.tensor([0, *lengths], device=owner.device).cumsum(0).int()
    is_sorted = bool((owner.diff() >= 0).all())
    most = int(owner.bincount().max())
    context = Ragged(owner, starts, most, max(lengths), is_sorted=is_sorted)(*inputs, HEADS, backend)
    assert_same(context, one_by_one(owner, starts, *inputs), leaves)


@pytest.mark.parametrize("owner", [[0, 2, 2, 3, 0, 0], [2, 0, 3, 2, 0, 0], [0] * 6], ids=["sorted", "unsorted", "one"])
@pytest.mark.parametrize("num_live", [4, 0])
def test_rows_that_are_not_live_stay_finite_and_add_nothing(backend, owner, num_live):
    leaves, inputs = tensors(backend, 6, 12, 12)
    owner = torch.tensor(owner, device=inputs[0].device)
    live = torch.arange(6, device=owner.device) < num_live
    starts = torch.tensor([0, 3, 4, 9, 12], dtype=torch.int32, device=owner.device)
    is_sorted = bool((owner[:num_live].diff() >= 0).all())
    context = Ragged(owner, starts, 6, 5, is_sorted=is_sorted, live=live)(*inputs, HEADS, backend)
    assert context.isfinite().all()
    assert_same(context, one_by_one(owner, starts, *inputs), leaves, live)


def test_few_sequences_with_many_queries_are_shared_by_programs(backend):
    """One image against many texts, as in retrieval."""
    leaves, inputs = tensors(backend, 500, 9, 12)
    owner = torch.zeros(500, dtype=torch.int64, device=inputs[0].device)
    starts = torch.tensor([0, 9], dtype=torch.int32, device=owner.device)
    context = Ragged(owner, starts, 500, 9, is_sorted=True)(*inputs, HEADS, backend)
    heads = (x.unflatten(1, (HEADS, -1)).transpose(0, 1) for x in inputs)
    assert_same(context, F.scaled_dot_product_attention(*heads).transpose(0, 1).flatten(1), leaves)


def test_sequences_longer_than_a_tile_take_the_other_path(backend):
    _, inputs = tensors(backend, 3, 300, 12)
    owner = torch.zeros(3, dtype=torch.int64, device=inputs[0].device)
    starts = torch.tensor([0, 300], dtype=torch.int32, device=owner.device)
    context = Ragged(owner, starts, 3, 300, is_sorted=True)(*inputs, HEADS, backend)
    assert_equal[context.dtype](context, one_by_one(owner, starts, *inputs))


def test_one_long_sequence_pads_no_other():
    lengths = [3] * 10 + [200] + [4] * 10
    owner = torch.repeat_interleave(torch.arange(21), torch.tensor(lengths))
    plan = Rectangles.of(owner, torch.tensor([0, *lengths]).cumsum(0), HEADS)
    assert plan.queries.shapes == [(20 * HEADS, 4), (HEADS, 200)]
    assert plan.keys.shapes == [(20 * HEADS, FEWEST_KEYS), (HEADS, 200)]
    assert [mask.exp().sum() for mask in plan.keys_mask] == [70 * HEADS, 200 * HEADS]


def test_bf16_is_worked_out_in_fp32_and_rounded_once():
    lengths, owner = CASES["itself"]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 48, generator=generator).bfloat16().requires_grad_() for n in (12, 12, 12)]
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    owner, starts = torch.tensor(owner), torch.tensor([0, *lengths]).cumsum(0).int()
    context = Ragged(owner, starts, 5, 5, is_sorted=True)(*leaves, HEADS)
    truth = one_by_one(owner, starts, *exact)
    weight = torch.randn(context.shape, generator=generator).bfloat16()
    pairs = [(context, truth)]
    pairs += zip(
        torch.autograd.grad((context * weight).sum(), leaves),
        torch.autograd.grad((truth * weight.float()).sum(), exact), strict=True,
    )  # fmt: skip
    for ours, theirs in pairs:
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-8, atol=2e-5)  # twice bf16's rounding


def test_autocast_changes_nothing():
    owner, starts = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 3], dtype=torch.int32)
    leaves = [torch.randn(3, 12, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            context = Ragged(owner, starts, 2, 2, is_sorted=True)(*leaves, HEADS)
            found.append((context, *torch.autograd.grad(context, leaves, torch.ones_like(context))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


COMPILE = """
from posmask.kernels import ragged_attention_triton as kernels

record(kernels)
starts = torch.tensor([0, 5], dtype=torch.int32)
order = torch.arange(5)
for dtype in (torch.bfloat16, torch.float32):
    for num_heads, width, some_order, max_queries, max_keys in ((12, 768, None, 30, 30), (4, 128, order, 100, 49)):
        inputs = [torch.zeros(5, width, dtype=dtype, requires_grad=True) for _ in range(3)]
        assert kernels.fits(inputs[0], num_heads, max_keys)
        shape = (some_order, starts, starts, max_queries, max_keys, False)
        kernels.RaggedAttention.apply(*inputs, num_heads, *shape).sum().backward()
"""


def test_kernels_compile_for_hopper(compile_for_gpu):
    pytest.importorskip("triton")
    assert compile_for_gpu(COMPILE) == 2 * 2 * 2
