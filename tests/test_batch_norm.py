"""Batch normalisation: as exact as torch's in the same dtype, folded or not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from posmask.train import batch_norm
from posmask.train.batch_norm import BatchNorm2d, _gains_from_folding
from posmask.train.config import PRESETS
from posmask.train.model import ImageEncoder


def make_images(num_channels, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_channels)
    x = torch.randn(4, num_channels, size, size, generator=generator) * 3 + torch.arange(num_channels).view(-1, 1, 1)
    return x.to(dtype, memory_format=torch.channels_last)


def outcome(norm, x, parameters):
    """Result of `norm` and a ReLU that works in place, as in the trunk; gradients in x, weight and bias.

    The gradient that reaches the norm has a mean of 10 and is not channels last.
    """
    x = x.detach().clone().requires_grad_()
    y = torch.relu_(norm(x))
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 10
    return y.detach(), *torch.autograd.grad((y.double() * slope).sum(), (x, *parameters))


def largest_error(values, truth):
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(values, truth, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_channels", [6, 12, 24])
def test_folded_is_as_exact_as_torch(num_channels, dtype):
    settings = {"eps": 1e-3, "momentum": 0.3}
    ours, theirs = BatchNorm2d(num_channels, **settings), nn.BatchNorm2d(num_channels, **settings)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 2), theirs.bias.uniform_(1, 2)
    ours.load_state_dict(theirs.state_dict())
    if dtype == torch.float64:
        ours.double(), theirs.double()
    x = make_images(num_channels, dtype=dtype)
    assert _gains_from_folding(x)
    exact = [p.detach().double().requires_grad_() for p in theirs.parameters()]
    statistics = [torch.zeros(num_channels).double(), torch.ones(num_channels).double()]
    truth = outcome(lambda x: F.batch_norm(x, *statistics, *exact, True, 0.3, 1e-3), x.double(), exact)
    found = largest_error(outcome(ours, x, ours.parameters()), truth)
    reference = largest_error(outcome(theirs, x, theirs.parameters()), truth)
    # In bf16 the gradient in x is the sum of two rounded terms, where torch rounds once; else sums differ in order.
    budget = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 2**-8}[dtype]
    assert all(a <= b + budget for a, b in zip(found, reference, strict=True)), (found, reference)
    torch.testing.assert_close(ours.running_mean.double(), statistics[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.running_var.double(), statistics[1], atol=1e-6, rtol=1e-6)


def test_frozen_parameters_leave_the_gradient_of_the_image():
    norm, x = BatchNorm2d(12), make_images(12)
    expected = outcome(norm, x, ())
    norm.requires_grad_(False)
    for a, b in zip(outcome(norm, x, ()), expected, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_compiled_it_is_one_graph_of_torchs_own():
    norm, x = BatchNorm2d(12), make_images(12)
    compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), norm(x))


def test_the_stem_of_laptop_is_folded(monkeypatch):
    asked = []
    monkeypatch.setattr(batch_norm, "_gains_from_folding", lambda x: asked.append(_gains_from_folding(x)) or asked[-1])
    ImageEncoder(PRESETS["laptop"])(torch.zeros(2, 3, 64, 64).to(memory_format=torch.channels_last))
    assert asked[:5] == [True] * 5 and not any(asked[5:])  # three of the stem, two of 24 channels in the first block


@pytest.mark.parametrize(
    "x", [make_images(12).contiguous(), make_images(12, size=5)[:1], make_images(32)], ids=["NCHW", "odd", "wide"]
)
def test_what_cannot_be_folded_is_left_to_torch(x):
    assert not _gains_from_folding(x)
    ours, theirs = BatchNorm2d(x.shape[1]), nn.BatchNorm2d(x.shape[1])
    for a, b in zip(outcome(ours, x, ours.parameters()), outcome(theirs, x, theirs.parameters()), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_evaluation_uses_the_running_statistics():
    ours, theirs = BatchNorm2d(12), nn.BatchNorm2d(12)
    x = make_images(12)
    ours(x)
    theirs.load_state_dict(ours.state_dict() | {"num_batches_tracked": torch.tensor(0)})
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=0, rtol=0)


def test_parameters_in_bf16_keep_fp32_statistics():
    norm = BatchNorm2d(12)
    norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    x = make_images(12, dtype=torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean, 0.1 * x.float().mean((0, 2, 3)), atol=1e-6, rtol=1e-5)
    norm(x).float().sum().backward()
    assert norm.weight.grad.dtype == torch.bfloat16
