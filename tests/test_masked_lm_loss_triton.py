"""The GPU path: its Triton kernels in the interpreter (fp32), compiled for a GPU without one, and all of it on one."""

from __future__ import annotations

import pytest
import torch

from posmask.kernels import masked_lm_loss as module
from posmask.kernels.masked_lm_loss import masked_lm_loss, masked_lm_loss_reference

pytest.importorskip("triton")
from posmask.kernels.masked_lm_loss_triton import num_splits

# Rows, width, vocabulary, live rows: off the grid, one row, one word short of and past a row block, none and all live.
CASES = [
    (252, 123, 507, 200), (1, 1, 2, 1), (7, 33, 8191, 3), (3, 5, 8193 + 128, 3), (9, 4, 11, 0), (64, 16, 128, 64),
]  # fmt: skip
INTERPRETED = not torch.cuda.is_available()


def outcome(loss, hidden, weight, bias, *rest, **options):
    """Results and gradients, the latter with a factor that is no power of two."""
    result = loss(hidden, weight, bias, *rest, **options)
    return *(x.detach() for x in result), *torch.autograd.grad(result.loss_sum * 0.37, (hidden, weight, bias))


def on_gpu(arguments):
    return [x.detach().cuda().requires_grad_(x.requires_grad) for x in arguments]


@pytest.mark.skipif(not INTERPRETED, reason="Triton interprets or compiles all kernels of a process")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_bins", [True, False])
def test_kernels_in_the_interpreter(make_rows, poisoned_memory, case, with_bins):
    hidden, weight, bias, targets, num_masked, bins = make_rows(case[:3], case[3])
    with torch.no_grad():
        hidden[case[3] :] = float("nan")
    arguments = (hidden, weight, bias, targets, num_masked, bins if with_bins else None)
    ours = outcome(masked_lm_loss, *arguments, backend="triton")
    true = outcome(masked_lm_loss_reference, *arguments)
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="Triton interprets or compiles all kernels of a process")
def test_chunks_and_splits_in_the_interpreter(make_rows, monkeypatch):
    from posmask.kernels import masked_lm_loss_triton

    arguments = make_rows((61, 33, 507), 50)
    whole = outcome(masked_lm_loss, *arguments, backend="triton")
    monkeypatch.setattr(module, "MAX_LOGITS_BYTES", 7 * 512 * 4)  # 7 rows
    monkeypatch.setattr(masked_lm_loss_triton, "num_splits", lambda *_: 4)
    for a, b in zip(outcome(masked_lm_loss, *arguments, backend="triton"), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_splits_fill_the_gpu_and_divide_the_vocabulary():
    num_processors = 132
    assert [num_splits(rows, 768, 30592, num_processors) for rows in (128, 1024, 2048, 4096, 8192)] == [8, 8, 4, 2, 1]
    for vocabulary in range(128, 60_000, 128):
        splits = num_splits(128, 768, vocabulary, num_processors)
        assert vocabulary % splits == 0 and vocabulary // splits % 8 == 0, "parts start at multiples of 16 bytes"


COMPILE = """
from posmask.kernels import masked_lm_loss_triton as kernels

record(kernels)
targets = torch.zeros(8, dtype=torch.int32)
for dtype in (torch.bfloat16, torch.float32, torch.float64):
    parameters = torch.zeros(30522, 768, dtype=dtype), torch.zeros(30522, dtype=dtype)
    rows, weight, bias = kernels.prepare(torch.zeros(8, 768, dtype=dtype), *parameters)
    logits, row_loss, hit, _ = kernels.loss_and_gradients(rows, targets, weight, bias, with_gradient=False)
    kernels.parameter_gradients(logits, rows, targets, row_loss[:1], 30522, (dtype, dtype))
    kernels.scaled(torch.zeros(8, 768, dtype=row_loss.dtype), targets, row_loss[:1], dtype)
    for bins in (targets, None):
        kernels.sums(row_loss, hit, targets, bins)
"""


def test_kernels_compile_for_hopper(compile_for_gpu):
    assert compile_for_gpu(COMPILE) >= 3 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_fp32_on_a_gpu(make_rows, case):
    arguments = on_gpu(make_rows(case[:3], case[3]))
    exact = [x.detach().double().requires_grad_() if x.requires_grad else x for x in arguments]
    for ours, true in zip(outcome(masked_lm_loss, *arguments), outcome(masked_lm_loss_reference, *exact), strict=True):
        torch.testing.assert_close(ours, true.to(ours.dtype), rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (1152, 768, 30522, 1000), (384, 512, 8192, 300)])
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
def test_bf16_on_a_gpu(make_rows, plain_loss, assert_within_budget, case, parameters):
    num_live = case[3]
    hidden, weight, bias, targets, num_masked, bins = on_gpu(make_rows(case[:3], num_live, torch.bfloat16))
    weight, bias = (x.detach().to(parameters).requires_grad_() for x in (weight, bias))
    leaves = (hidden, weight, bias)
    true_loss, true_gradients, _ = plain_loss(*(x.float() for x in leaves), targets, num_live, 0.37)
    peer_loss, peer_gradients, _ = plain_loss(*(x.bfloat16() for x in leaves), targets, num_live, 0.37)
    with torch.no_grad():
        hidden[num_live:] = float("nan")
    result = masked_lm_loss(*leaves, targets, num_masked, bins)
    # 2⁻⁹ is the error of one logit rounded to bf16, relative to it; over the rows such errors cancel.
    assert_within_budget(result.loss_sum.detach(), peer_loss, true_loss, budget=2**-9 * abs(true_loss.item()))
    gradients = torch.autograd.grad(result.loss_sum * 0.37, leaves)
    for leaf, ours, peer, true in zip(leaves, gradients, peer_gradients, true_gradients, strict=True):
        assert ours.dtype == leaf.dtype
        # Twice half a unit in the last place: the factor rounds the rows of dW, and the bias' sum has it after them.
        assert_within_budget(ours, peer, true, budget=2**-7 * float(true.abs().max()))
        assert true.numel() < 1000 or (ours - true).norm() <= (peer - true).norm()
    assert result.bin_count.sum() == (bins[:num_live] >= 0).sum()


@pytest.mark.gpu
def test_a_step_records_into_a_cuda_graph_and_never_waits(make_rows):
    first, second = (on_gpu(make_rows((384, 768, 30522), live, torch.bfloat16, seed=live)) for live in (300, 17))
    outcome(masked_lm_loss, *first)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = [outcome(masked_lm_loss, *arguments) for arguments in (first, second)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static = [x.detach().clone().requires_grad_(x.requires_grad) for x in first]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outcome(masked_lm_loss, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outcome(masked_lm_loss, *static)
    for arguments, true in zip((first, second), expected, strict=True):
        with torch.no_grad():
            for x, value in zip(static, arguments, strict=True):
                x.copy_(value)
        graph.replay()
        for ours, eager in zip(captured, true, strict=True):
            assert torch.equal(ours, eager), "another count of live rows, the same graph, the same bits"


@pytest.mark.gpu
def test_equal_calls_give_equal_bits_on_a_gpu(make_rows):
    arguments = on_gpu(make_rows((1152, 768, 30522), 1000, torch.bfloat16))
    calls = [outcome(masked_lm_loss, *arguments) for _ in range(5)]
    for call in calls[1:]:
        assert all(torch.equal(a, b) for a, b in zip(calls[0], call, strict=True))
