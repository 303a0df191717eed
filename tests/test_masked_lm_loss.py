"""The loss against autograd in higher precision, and spare rows that must never show."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from posmask.kernels.masked_lm_loss import NUM_BINS, lowest_bit, masked_lm_loss

# Rows, width, vocabulary: none a multiple of 8, and the smallest of each.
SHAPES = [(252, 123, 507), (1, 1, 2), (7, 33, 1001)]


def make_rows(shape, num_live, dtype=torch.float32, seed=0):
    rows, width, vocabulary = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul(width**-0.5).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator, dtype=torch.int32)
    targets[num_live:] = -100
    bins = torch.randint(-1, NUM_BINS, (rows,), generator=generator, dtype=torch.int32)
    return hidden, weight, bias, targets, torch.tensor(num_live, dtype=torch.int32), bins


def plain(hidden, weight, bias, targets, num_live):
    """Loss and gradients of the live rows alone, by autograd in the dtype of the arguments."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(leaves[0][:num_live], *leaves[1:])
    loss = F.cross_entropy(logits, targets[:num_live].long(), reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, leaves), logits.detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_equals_autograd_in_double(shape, share):
    num_live = math.ceil(shape[0] * share)
    hidden, weight, bias, targets, num_masked, bins = make_rows(shape, num_live, torch.float64)
    result = masked_lm_loss(hidden, weight, bias, targets, num_masked, bins)
    loss, gradients, logits = plain(hidden, weight, bias, targets, num_live)
    torch.testing.assert_close(result.loss_sum.detach(), loss, rtol=1e-12, atol=0)
    for ours, true in zip(torch.autograd.grad(result.loss_sum, (hidden, weight, bias)), gradients, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)
    row_loss = F.cross_entropy(logits, targets[:num_live].long(), reduction="none")
    hits = logits.argmax(1) == targets[:num_live]
    for b in range(NUM_BINS):
        rows = bins[:num_live] == b
        torch.testing.assert_close(result.bin_loss[b], row_loss[rows].sum())
        assert result.bin_hits[b] == hits[rows].sum()
        assert result.bin_count[b] == rows.sum()


def test_accumulates_in_fp32_from_bf16(assert_within_budget):
    shape = (252, 123, 507)
    hidden, weight, bias, targets, num_masked, _ = make_rows(shape, 200, torch.bfloat16)
    loss, gradients, _ = plain(hidden.float(), weight.float(), bias.float(), targets, 200)
    peer_loss, peer_gradients, _ = plain(hidden, weight, bias, targets, 200)
    result = masked_lm_loss(hidden, weight, bias, targets, num_masked)
    assert result.loss_sum.dtype == torch.float32
    assert_within_budget(result.loss_sum.detach(), peer_loss, loss, budget=1e-5 * loss.item())
    # Half a unit in the last place of the largest entry: what rounding once to bf16 may cost.
    for parameter, peer, true in zip((hidden, weight, bias), peer_gradients, gradients, strict=True):
        ours = torch.autograd.grad(result.loss_sum, parameter, retain_graph=True)[0]
        assert ours.dtype == torch.bfloat16
        assert_within_budget(ours, peer, true, budget=2**-9 * true.abs().max().item())
    # Rounding the sum to bf16, as a plain bf16 cross entropy does, would be off by up to 0.4 %.
    assert abs(result.loss_sum.item() / loss.item() - 1) < 1e-3


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_spare_rows_never_show(poison, poisoned_memory):
    hidden, weight, bias, targets, num_masked, bins = make_rows((13, 8, 31), 5)
    clean = masked_lm_loss(hidden[:5], weight, bias, targets[:5], num_masked, bins[:5])
    clean_gradients = torch.autograd.grad(clean.loss_sum, (hidden, weight, bias))
    with torch.no_grad():
        hidden[5:] = poison
    bins[5:] = 3
    spare = masked_lm_loss(hidden, weight, bias, targets, num_masked, bins)
    for ours, true in zip(spare, clean, strict=True):
        torch.testing.assert_close(ours, true)
    for ours, true in zip(torch.autograd.grad(spare.loss_sum, (hidden, weight, bias)), clean_gradients, strict=True):
        torch.testing.assert_close(ours, true)


def test_no_masked_row(poisoned_memory):
    hidden, weight, bias, targets, num_masked, bins = make_rows((9, 4, 11), 0)
    result = masked_lm_loss(hidden, weight, bias, targets, num_masked, bins)
    assert result.loss_sum.item() == 0 and result.num_masked.item() == 0
    assert not result.bin_loss.any() and not result.bin_hits.any() and not result.bin_count.any()
    for gradient in torch.autograd.grad(result.loss_sum, (hidden, weight, bias)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_without_bins_only_the_bins_are_empty():
    hidden, weight, bias, targets, num_masked, bins = make_rows((20, 4, 11), 17)
    with_bins = masked_lm_loss(hidden, weight, bias, targets, num_masked, bins)
    without = masked_lm_loss(hidden, weight, bias, targets, num_masked)
    assert torch.equal(with_bins.loss_sum, without.loss_sum)
    assert without.bin_count.sum() == 0 and with_bins.bin_count.sum() == (bins[:17] >= 0).sum()
    assert [x.dtype for x in with_bins] == [x.dtype for x in without]


def test_micro_batches_add_up():
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


def test_unknown_backend():
    hidden, weight, bias, targets, num_masked, _ = make_rows((2, 2, 3), 1)
    with pytest.raises(ValueError, match=r"'triton'.*'torch' is the only one built"):
        masked_lm_loss(hidden, weight, bias, targets, num_masked, backend="triton")


def test_nothing_waits_for_the_device():
    # Meta tensors have no values: what would need one raises.
    hidden, weight, bias, targets, num_masked, bins = (x.to("meta") for x in make_rows((9, 4, 11), 5))
    result = masked_lm_loss(hidden, weight, bias, targets, num_masked, lowest_bit(bins))
    assert [x.shape for x in result] == [(), (), (NUM_BINS,), (NUM_BINS,), (NUM_BINS,)]
