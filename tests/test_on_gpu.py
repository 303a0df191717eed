"""What only a GPU can show of training: decoding beside it, a step that never waits, and the numbers of that step."""

import dataclasses
import importlib.util
import io

import numpy as np
import pytest
import torch
from PIL import Image

from posmask.kernels.mask_plan import MaskPlan
from posmask.prep.pos import MASKABLE
from posmask.train.attention import Ragged
from posmask.train.config import IMAGE_MEAN, IMAGE_STD, PRESETS
from posmask.train.decode import CpuDecoder, DaliDecoder, UndecodableImage
from posmask.train.loader import Collator, Loader, View
from posmask.train.model import PosMaskModel
from posmask.train.objectives import mask_batch, masked_lm

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = dataclasses.replace(PRESETS["laptop"], vocab_size=1000)
PLAN = MaskPlan(candidates=MASKABLE, maskable=MASKABLE, mask_id=4, amount="rate", rate=0.3, max_caption_tokens=64)
HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class Samples:
    """The part of `Shards` that a Loader uses, in memory."""

    def __init__(self, text, num_images):
        lengths = text.caption_starts.diff().numpy().astype(np.uint8)
        per_image = len(lengths) // num_images
        self.samples = []
        rng = np.random.default_rng(0)
        for i in range(num_images):
            start, end = text.caption_starts[[i * per_image, (i + 1) * per_image]].tolist()
            pixels = np.kron(rng.integers(0, 256, (6, 8, 3), np.uint8), np.ones((10, 10, 1), np.uint8))
            jpeg = io.BytesIO()
            Image.fromarray(pixels).save(jpeg, "JPEG", quality=90)
            self.samples.append({
                "key": f"image {i}", "id": i + 1, "image": jpeg.getvalue(),
                "tokens": text.tokens[start:end].numpy().astype(np.uint16),
                "tags": text.tags[start:end].numpy().view(np.uint32),
                "caption_lengths": lengths[i * per_image : (i + 1) * per_image],
            })  # fmt: skip

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]

    def read(self, indices):
        return [self.samples[i] for i in indices]

    def prefetch(self, indices):
        pass

    def cancel_prefetch(self):
        pass

    def order(self, seed, epoch):
        return np.random.default_rng([seed, epoch]).permutation(len(self))


@pytest.fixture
def samples(make_text):
    return Samples(make_text(96, seed=3), 48)


def collator(device, decode="cpu"):
    return Collator(View(0, 64, IMAGE_MEAN, IMAGE_STD, crop_scale=(0.7, 1.0), blank_rate=0.1), 0, 16, decode, device)


def in_bf16(model):
    """Parameters alone, as DeepSpeed casts them: BatchNorm's statistics stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def loss_and_gradients(model, batch, dtype):
    batch = batch.to(batch.images.device, dtype)
    masked = mask_batch(batch, PLAN, 0)
    loss = masked_lm(model, batch, masked).loss_sum / masked.num_masked
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.double().cpu() for name, p in model.named_parameters()}


def relative_errors(found, truth):
    # The key's bias has no gradient but rounding: softmax does not see it.
    return {name: float((found[name] - g).norm() / g.norm()) for name, g in truth.items() if "key.bias" not in name}


def assert_fp32_errors(errors):
    """A ReLU whose input is within rounding of 0 lets a gradient through on one side alone: images that differ by 2e-7
    change gradients of these tests by 4e-4 in the image encoder, on a CPU, and by 2e-6 elsewhere."""
    assert all(error < (1e-2 if name.startswith("image.") else 1e-4) for name, error in errors.items()), errors


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.01), (torch.float16, 0.002), (torch.float32, 1e-5)])
def test_ragged_attention(dtype, error):
    """The kernel against the rectangles in fp32 on the CPU, with rows that are not live, sorted and unsorted."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (50,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    for is_sorted in (True, False):
        owner = torch.randint(50, (300,), generator=generator)
        owner = owner.sort().values if is_sorted else owner
        live = torch.arange(300) < 260
        most = int(owner.bincount().max())
        inputs = [torch.randn(n, 128, generator=generator) for n in (300, int(starts[-1]), int(starts[-1]))]
        inputs = [x.bfloat16().float().requires_grad_() for x in inputs]
        weight = torch.where(live[:, None], torch.randn(300, 128, generator=generator), 0)
        truth = Ragged(owner, starts, most, 30, is_sorted=is_sorted, live=live)(*inputs, 2)
        found = [x.detach().to(GPU, dtype).requires_grad_() for x in inputs]
        ragged = Ragged(owner.to(GPU), starts.to(GPU), most, 30, is_sorted=is_sorted, live=live.to(GPU))
        context = ragged(*found, 2)
        assert context.isfinite().all()
        pairs = [(context[:260].cpu(), truth[:260])]
        gradients = (torch.autograd.grad((x * weight.to(x)).sum(), leaves) for x, leaves in
                     ((context, found), (truth, inputs)))  # fmt: skip
        pairs += [(ours.cpu(), true) for ours, true in zip(*gradients, strict=True)]
        for ours, true in pairs:
            assert (ours.float() - true).norm() <= error * true.norm(), "each rounds to its precision at a few places"


def test_a_step_in_fp32_equals_the_cpu(samples, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # by default convolutions multiply with ten bits
    torch.manual_seed(0)
    model = PosMaskModel(CONFIG)
    truth, true_gradients = loss_and_gradients(model, collator(CPU)(samples, 0), torch.float32)
    loss, gradients = loss_and_gradients(model.to(GPU), collator(GPU)(samples, 0), torch.float32)
    assert loss == pytest.approx(truth, rel=1e-4)
    assert_fp32_errors(relative_errors(gradients, true_gradients))


def test_a_step_in_bf16_is_no_worse_than_on_a_cpu(samples):
    torch.manual_seed(0)
    model = PosMaskModel(CONFIG)
    truth, true_gradients = loss_and_gradients(model, collator(CPU)(samples, 0), torch.float32)
    in_bf16(model)
    errors = {}
    for device in (CPU, GPU):
        loss, gradients = loss_and_gradients(model.to(device), collator(device)(samples, 0), torch.bfloat16)
        assert loss == pytest.approx(truth, rel=0.01)
        errors[device] = relative_errors(gradients, true_gradients)
    worst = {name: (error, errors[CPU][name]) for name, error in errors[GPU].items() if error > 1.5 * errors[CPU][name]}
    assert not {name: pair for name, pair in worst.items() if pair[0] - pair[1] > 0.05}


def test_a_step_never_waits(samples):
    torch.manual_seed(0)
    model = in_bf16(PosMaskModel(CONFIG)).to(GPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = collator(GPU)(samples, 0).to(GPU, torch.bfloat16)

    def step():
        masked = mask_batch(batch, PLAN, 0)
        losses = masked_lm(model, batch, masked)
        (losses.loss_sum / masked.num_masked).backward()
        optimizer.step()
        optimizer.zero_grad()
        return losses

    step(), step()  # compiles, and makes the optimizer's state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.loss_sum.isfinite()


def test_batches_of_the_loader_are_those_of_the_collator(samples):
    """Made on a stream beside the training step, while that one is busy and memory comes and goes."""
    truth = collator(CPU)
    loader = Loader(
        samples, collator(GPU), seed=0, batch_size=16, micro_batch_size=8, rank=0, world_size=1, num_steps=12
    )  # fmt: skip
    busy, order, number = torch.randn(4096, 4096, device=GPU), None, 0
    for batch in loader:
        for _ in range(20):
            busy = torch.nn.functional.normalize(busy @ busy)
        images = batch.images.cpu()
        epoch, place = divmod(number, 6)
        order = samples.order(0, epoch)
        expected = truth([samples[i] for i in order[8 * place : 8 * place + 8]], epoch)
        assert batch.tokens.is_cuda and torch.equal(batch.tokens.cpu(), expected.tokens)
        assert torch.equal(batch.caption_key.cpu(), expected.caption_key)
        torch.testing.assert_close(images, expected.images, atol=1e-5, rtol=1e-5)
        del batch
        number += 1
    assert number == 24


@pytest.mark.skipif(not HAS_DALI, reason="no nvidia-dali")
def test_dali_decodes_on_a_gpu_as_the_cpu_does(samples):
    encoded = [np.frombuffer(samples[i]["image"], np.uint8) for i in range(16)]
    anchors, shapes = np.full((16, 2), 0.1, np.float32), np.full((16, 2), 0.8, np.float32)
    keys = [str(i) for i in range(16)]
    decoder = DaliDecoder(32, 16, GPU, num_threads=4)
    dali = decoder(encoded, anchors, shapes, keys)
    assert dali.is_cuda and dali.shape == (16, 32, 32, 3)
    cpu = CpuDecoder(32, CPU)(encoded, anchors, shapes, keys).float()
    assert (dali.cpu().float() - cpu).abs().mean() < 6
    assert (dali.cpu().float() - cpu.roll(1, 0)).abs().mean() > 15, "and other images differ"
    encoded[5] = np.frombuffer(b"not a JPEG at all", np.uint8)
    with pytest.raises(UndecodableImage, match="'5'"):
        decoder(encoded, anchors, shapes, keys)
    assert torch.equal(decoder(encoded[:3], anchors[:3], shapes[:3], keys[:3]), dali[:3]), "and it goes on afterwards"


def test_a_compiled_trunk_computes_the_same(samples, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = PosMaskModel(CONFIG).to(GPU)
    batch = collator(GPU)(samples, 0)
    plain = loss_and_gradients(model, batch, torch.float32)
    model.image.compile()
    compiled = loss_and_gradients(model, batch, torch.float32)
    assert compiled[0] == pytest.approx(plain[0], rel=1e-4)
    assert_fp32_errors(relative_errors(compiled[1], plain[1]))
