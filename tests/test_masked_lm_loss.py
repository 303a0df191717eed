"""The loss against autograd in higher precision, and spare rows that must never show: reference and CPU path."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from posmask.kernels import masked_lm_loss as module
from posmask.kernels import masked_lm_loss_torch
from posmask.kernels.masked_lm_loss import NUM_BINS, lowest_bit, masked_lm_loss, masked_lm_loss_reference

# Rows, width, vocabulary: none a multiple of 8, and the smallest of each.
SHAPES = [(252, 123, 507), (1, 1, 2), (7, 33, 1001)]


@pytest.fixture(params=["reference", "torch"])
def loss(request):
    return masked_lm_loss_reference if request.param == "reference" else masked_lm_loss


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_equals_autograd_in_double(make_rows, plain_loss, loss, shape, share):
    num_live = math.ceil(shape[0] * share)
    hidden, weight, bias, targets, num_masked, bins = make_rows(shape, num_live, torch.float64)
    result = loss(hidden, weight, bias, targets, num_masked, bins)
    true_loss, gradients, logits = plain_loss(hidden, weight, bias, targets, num_live)
    torch.testing.assert_close(result.loss_sum.detach(), true_loss, rtol=1e-12, atol=0)
    for ours, true in zip(torch.autograd.grad(result.loss_sum, (hidden, weight, bias)), gradients, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)
    row_loss = F.cross_entropy(logits, targets[:num_live].long(), reduction="none")
    hits = logits.argmax(1) == targets[:num_live]
    for b in range(NUM_BINS):
        rows = bins[:num_live] == b
        torch.testing.assert_close(result.bin_loss[b], row_loss[rows].sum())
        assert result.bin_hits[b] == hits[rows].sum()
        assert result.bin_count[b] == rows.sum()


def test_gradcheck(make_rows):
    *leaves, targets, num_masked, bins = make_rows((5, 3, 7), 4, torch.float64)

    def scaled(*leaves):
        return masked_lm_loss(*leaves, targets, num_masked, bins).loss_sum * 0.3

    assert torch.autograd.gradcheck(scaled, leaves)


# bf16 parameters, and fp32 parameters of bf16 rows. With and without bf16 instructions, which change the products.
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("block", [128, 2048])
def test_bf16_is_as_near_as_plain_torch(
    make_rows, plain_loss, assert_within_budget, monkeypatch, parameters, native, block
):
    monkeypatch.setattr(masked_lm_loss_torch, "has_bf16_instructions", lambda: native)
    monkeypatch.setattr(masked_lm_loss_torch, "WEIGHT_BLOCK", block)
    hidden, weight, bias, targets, num_masked, _ = make_rows((252, 123, 507), 200, torch.bfloat16)
    weight, bias = (x.detach().to(parameters).requires_grad_() for x in (weight, bias))
    leaves = (hidden, weight, bias)
    factor = 0.37  # no power of two, so that it rounds
    true_loss, true_gradients, _ = plain_loss(*(x.float() for x in leaves), targets, 200, factor)
    peer_loss, peer_gradients, _ = plain_loss(*(x.bfloat16() for x in leaves), targets, 200, factor)
    result = masked_lm_loss(*leaves, targets, num_masked)
    assert result.loss_sum.dtype == torch.float32
    assert_within_budget(result.loss_sum.detach(), peer_loss, true_loss, budget=1e-5 * true_loss.item())
    gradients = torch.autograd.grad(result.loss_sum * factor, leaves)
    for leaf, ours, peer, true in zip(leaves, gradients, peer_gradients, true_gradients, strict=True):
        assert ours.dtype == leaf.dtype
        # Native products round twice what torch rounds once (the factor goes into the rows), half a unit in the last
        # place at most each time; widened ones round less than torch does.
        budget = 2**-7 if native else 1e-6
        assert_within_budget(ours, peer, true, budget=budget * true.abs().max().item())
        assert (ours - true).norm() < (peer - true).norm()
    # Rounding the sum to bf16, as a plain bf16 cross entropy does, would be off by up to 0.4 %.
    assert abs(result.loss_sum.item() / true_loss.item() - 1) < 1e-3


def test_widened_products_round_once(make_rows, plain_loss, monkeypatch):
    """On a CPU without bf16 instructions every gradient is the fp32 one, rounded."""
    monkeypatch.setattr(masked_lm_loss_torch, "has_bf16_instructions", lambda: False)
    hidden, weight, bias, targets, num_masked, _ = make_rows((61, 33, 507), 61, torch.bfloat16)
    leaves = (hidden, weight, bias)
    _, true_gradients, _ = plain_loss(*(x.float() for x in leaves), targets, 61, 0.37)
    loss_sum = masked_lm_loss(*leaves, targets, num_masked).loss_sum
    for ours, true in zip(torch.autograd.grad(loss_sum * 0.37, leaves), true_gradients, strict=True):
        # Half a unit in the last place is at most 2⁻⁸ of the value; sums in another order add the error of fp32.
        assert ((ours.float() - true).abs() <= 2**-8 * true.abs() + 1e-6).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_spare_rows_never_show(make_rows, poisoned_memory, loss, poison):
    hidden, weight, bias, targets, num_masked, bins = make_rows((13, 8, 31), 5)
    clean = loss(hidden[:5], weight, bias, targets[:5], num_masked, bins[:5])
    clean_gradients = torch.autograd.grad(clean.loss_sum, (hidden, weight, bias))
    with torch.no_grad():
        hidden[5:] = poison
    bins[5:] = 3
    spare = loss(hidden, weight, bias, targets, num_masked, bins)
    for ours, true in zip(spare, clean, strict=True):
        torch.testing.assert_close(ours, true)
    for ours, true in zip(torch.autograd.grad(spare.loss_sum, (hidden, weight, bias)), clean_gradients, strict=True):
        torch.testing.assert_close(ours, true)


def test_no_masked_row(make_rows, poisoned_memory, loss):
    hidden, weight, bias, targets, num_masked, bins = make_rows((9, 4, 11), 0)
    result = loss(hidden, weight, bias, targets, num_masked, bins)
    assert result.loss_sum.item() == 0 and result.num_masked.item() == 0
    assert not result.bin_loss.any() and not result.bin_hits.any() and not result.bin_count.any()
    for gradient in torch.autograd.grad(result.loss_sum, (hidden, weight, bias)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_logits_far_apart(loss):
    """An early best, a late best, and a target whose probability is 0 in fp32: its loss is the gap, not infinite."""
    hidden = torch.eye(3, requires_grad=True)
    weight = torch.tensor([[500.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 500.0, 300.0]], requires_grad=True)
    bias, targets = torch.zeros(3, requires_grad=True), torch.tensor([0, 0, 1], dtype=torch.int32)
    result = loss(hidden, weight, bias, targets, torch.tensor(3), bins=targets)
    assert result.loss_sum.item() == 0 + 500 + 300
    assert result.bin_hits[:3].tolist() == [1, 0, 0]
    gradients = torch.autograd.grad(result.loss_sum, (hidden, weight, bias))
    assert torch.equal(gradients[2], torch.tensor([-1.0, -1.0, 2.0]))
    assert torch.equal(gradients[1], torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 1.0]]))
    assert torch.equal(gradients[0], torch.tensor([[0.0, 0.0, 0.0], [-500.0, 500.0, 300.0], [0.0, 500.0, 300.0]]))


def test_equal_calls_give_equal_bits(make_rows):
    arguments = make_rows((252, 123, 507), 200, torch.bfloat16)
    calls = []
    for _ in range(2):
        result = masked_lm_loss(*arguments)
        calls.append((*result, *torch.autograd.grad(result.loss_sum, arguments[:3])))
    assert all(torch.equal(a, b) for a, b in zip(*calls, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_equal_one(make_rows, plain_loss, assert_within_budget, monkeypatch, dtype):
    *leaves, targets, num_masked, bins = make_rows((61, 33, 507), 50, dtype)
    whole = masked_lm_loss(*leaves, targets, num_masked, bins)
    monkeypatch.setattr(module, "MAX_LOGITS_BYTES", 7 * 507 * 4)  # 7 rows
    chunked = masked_lm_loss(*leaves, targets, num_masked, bins)
    for ours, true in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours, true)
    _, truth, _ = plain_loss(*(x.float() for x in leaves), targets, 50, 0.37)
    for ours, peer, true in zip(
        torch.autograd.grad(chunked.loss_sum * 0.37, leaves),
        torch.autograd.grad(whole.loss_sum * 0.37, leaves),
        truth,
        strict=True,
    ):
        # Where a CPU multiplies bf16, one chunk rounds the scaled rows first, and several scale their sum: neither may
        # be further from the truth than the other by more than these two roundings.
        budget = 2**-7 * float(true.abs().max()) if dtype == torch.bfloat16 else 1e-6 + 1e-5 * float(true.abs().max())
        assert_within_budget(ours, peer, true, budget)
        assert_within_budget(peer, ours, true, budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(make_rows, dtype):
    *leaves, targets, num_masked, _ = make_rows((61, 33, 507), 50, dtype)
    expected = masked_lm_loss(*leaves, targets, num_masked).loss_sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = masked_lm_loss(*leaves, targets, num_masked).loss_sum
    assert torch.equal(found, expected)
    for ours, true in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert torch.equal(ours, true)


def test_only_what_needs_a_gradient(make_rows):
    hidden, weight, bias, targets, num_masked, _ = make_rows((20, 4, 11), 17)
    expected = torch.autograd.grad(masked_lm_loss_reference(hidden, weight, bias, targets, num_masked).loss_sum, hidden)
    frozen = masked_lm_loss(hidden, weight.detach(), bias.detach(), targets, num_masked)
    torch.testing.assert_close(torch.autograd.grad(frozen.loss_sum, hidden), expected)
    with torch.no_grad():
        plain = masked_lm_loss(hidden, weight, bias, targets, num_masked)
    assert not plain.loss_sum.requires_grad and torch.equal(plain.loss_sum, frozen.loss_sum)


def test_without_bins_only_the_bins_are_empty(make_rows, loss):
    hidden, weight, bias, targets, num_masked, bins = make_rows((20, 4, 11), 17)
    with_bins = loss(hidden, weight, bias, targets, num_masked, bins)
    without = loss(hidden, weight, bias, targets, num_masked)
    assert torch.equal(with_bins.loss_sum, without.loss_sum)
    assert without.bin_count.sum() == 0 and with_bins.bin_count.sum() == (bins[:17] >= 0).sum()
    assert [x.dtype for x in with_bins] == [x.dtype for x in without]


def test_micro_batches_add_up(make_rows):
    hidden, weight, bias, targets, _, bins = make_rows((24, 6, 19), 24, torch.float64)
    whole = masked_lm_loss(hidden, weight, bias, targets, torch.tensor(24), bins)
    parts = [
        masked_lm_loss(hidden[s], weight, bias, targets[s], torch.tensor(0), bins[s]) for s in (slice(5), slice(5, 24))
    ]
    summed = [sum(getattr(part, name) for part in parts) for name in ("loss_sum", "bin_loss", "bin_hits", "bin_count")]
    for ours, true in zip(summed, (whole.loss_sum, *whole[2:]), strict=True):
        torch.testing.assert_close(ours, true)
    ours, true = (torch.autograd.grad(loss, weight)[0] for loss in (summed[0], whole.loss_sum))
    torch.testing.assert_close(ours, true)


def test_lowest_bit():
    sets = [0, 1, 1 << 7, 1 << 16, 1 << 7 | 1 << 11 | 1 << 25, 1 << 17 | 1 << 25, 0b110 | 1 << 18]
    assert lowest_bit(torch.tensor(sets, dtype=torch.int32)).tolist() == [-1, 0, 7, 16, 7, -1, 1]
    single = torch.tensor([1 << i for i in range(31)], dtype=torch.int32)
    assert lowest_bit(single).tolist() == [*range(NUM_BINS), *[-1] * 14]


def test_unknown_backend(make_rows):
    arguments = make_rows((2, 2, 3), 1)
    with pytest.raises(ValueError, match=r"masked_lm_loss has no backend 'cuda'; choose one of auto, triton, torch"):
        masked_lm_loss(*arguments, backend="cuda")


def test_the_reference_never_waits_for_the_device(make_rows):
    # Meta tensors have no values: what would need one raises.
    hidden, weight, bias, targets, num_masked, bins = (x.to("meta") for x in make_rows((9, 4, 11), 5))
    result = masked_lm_loss(hidden, weight, bias, targets, num_masked, lowest_bit(bins))
    assert [x.shape for x in result] == [(), (), (NUM_BINS,), (NUM_BINS,), (NUM_BINS,)]
