"""The model against Hugging Face's BERT and open_clip's ResNet, and what may not leak between captions."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from posmask.kernels import masked_lm_loss_torch
from posmask.kernels.mask_tokens import MaskedTokens
from posmask.train.attention import Ragged
from posmask.train.config import PRESETS
from posmask.train.model import Packing, PosMaskModel, _reward
from posmask.train.weights import load_image_weights, load_text_weights

CONFIG = dataclasses.replace(
    PRESETS["laptop"], vocab_size=101, width=32, num_heads=4, image_width=8, image_layers=(1, 2, 1, 1), max_positions=20
)
LENGTHS = (5, 1, 9, 3)  # one token alone, and the longest in the middle


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PosMaskModel(CONFIG).eval()


def packed(lengths=LENGTHS, seed=1):
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens = torch.randint(5, 101, (sum(lengths),), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return tokens, starts, Packing.of(starts, len(tokens), max(lengths))


def test_packed_text_equals_bert_on_padded_text(model, tmp_path):
    torch.manual_seed(1)
    bert = BertForMaskedLM(BertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=20, initializer_range=0.2,
    )).eval()  # fmt: skip
    bert.save_pretrained(tmp_path)
    load_text_weights(model, str(tmp_path))
    tokens, starts, packing = packed()
    padded = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    valid = torch.zeros_like(padded)
    for i, length in enumerate(LENGTHS):
        padded[i, :length] = tokens[starts[i] : starts[i + 1]]
        valid[i, :length] = 1
    with torch.no_grad():
        hidden = bert.bert(padded, attention_mask=valid, output_hidden_states=True).hidden_states
        ours = model.encode_text(tokens, packing)
        theirs = torch.cat([hidden[2][i, :length] for i, length in enumerate(LENGTHS)])
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
        # Layers 2 and 3 are the fusion encoder's; without an image they are BERT's own.
        for layer in model.fusion:
            ours = layer(ours, packing.within_captions)
        theirs = torch.cat([hidden[4][i, :length] for i, length in enumerate(LENGTHS)])
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(model.logits(ours), bert.cls(theirs), atol=2e-4, rtol=1e-4)
    # In float64, where nothing but the algebra is left: the gradients too.
    model.double(), bert.double()
    theirs = bert.bert.embeddings
    positions = theirs.position_embeddings.weight + theirs.token_type_embeddings.weight[0]  # loading rounded the sum
    model.embeddings.position_embeddings.weight.data.copy_(positions.detach())
    hidden = bert.bert(padded, attention_mask=valid, output_hidden_states=True).hidden_states[2]
    weight = torch.randn(len(tokens), 32, dtype=torch.float64)
    (torch.cat([hidden[i, :length] for i, length in enumerate(LENGTHS)]) * weight).sum().backward()
    (model.encode_text(tokens, packing) * weight).sum().backward()
    theirs = dict(bert.bert.encoder.named_parameters())
    for name, param in model.text.named_parameters():
        torch.testing.assert_close(param.grad, theirs[f"layer.{name}"].grad, atol=1e-10, rtol=1e-8)
    words = bert.bert.embeddings.word_embeddings.weight.grad
    torch.testing.assert_close(model.embeddings.word_embeddings.weight.grad, words, atol=1e-10, rtol=1e-8)


def test_image_trunk_equals_open_clip(model, tmp_path):
    torch.manual_seed(2)
    trunk = ModifiedResNet([1, 2, 1, 1], 16, 4, 64, 8).eval()
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1)
    state = {f"visual.{key}": value for key, value in trunk.state_dict().items()} | {"logit_scale": torch.ones(())}
    torch.save({"state_dict": state}, tmp_path / "clip.pt")
    load_image_weights(model, str(tmp_path / "clip.pt"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        theirs = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(trunk.stem(images)))))
        ours = model.image.stages(model.image.stem(images))
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_weights_of_another_shape_are_refused(model, tmp_path):
    config = BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=20,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(90, 32\) there, \(101, 32\) here"):
        load_text_weights(model, str(tmp_path))


def test_a_caption_sees_itself_and_its_image_alone(model):
    tokens, starts, packing = packed()
    images = torch.randn(3, CONFIG.num_image_tokens, 32)
    caption_image = torch.tensor([0, 1, 2, 1], dtype=torch.int32)

    def hidden(tokens, images):
        with torch.no_grad():
            fused = model.fuse(model.encode_text(tokens, packing), packing, images, caption_image)
        return fused.split(LENGTHS)

    base = hidden(tokens, images)
    changed = tokens.clone()
    changed[starts[2]] += 1
    for i, (a, b) in enumerate(zip(base, hidden(changed, images), strict=True)):
        assert torch.equal(a, b) == (i != 2)
    other = images.clone()
    other[1] += 1
    for i, (a, b) in enumerate(zip(base, hidden(tokens, other), strict=True)):
        assert torch.equal(a, b) == (i not in (1, 3))
    # Alone in its batch, a caption gets what it got among others.
    one = Packing.of(torch.tensor([0, 9]), 9, 9)
    with torch.no_grad():
        alone = model.fuse(model.encode_text(tokens[6:15], one), one, images[2:], torch.zeros(1, dtype=torch.int32))
    torch.testing.assert_close(alone, base[2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [[0, 2, 3, 6, 14, 17], [7], list(range(18))], ids=["some", "one", "all"])
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_layer_on_masked_rows_equals_the_dense_one(model, rows, spare, dtype):
    """Values and every gradient; captions share images, and some have no masked row."""
    model.to(dtype)
    tokens, _, packing = packed()
    images = torch.randn(3, CONFIG.num_image_tokens, 32, dtype=dtype, requires_grad=True)
    caption_image = torch.tensor([0, 1, 2, 1], dtype=torch.int32)
    index = torch.tensor(rows + [0] * spare, dtype=torch.int32)
    live = torch.arange(len(index)) < len(rows)
    weight = torch.randn(len(rows), 32, dtype=dtype)

    def run(make):
        model.zero_grad()
        images.grad = None
        hidden = make(model.encode_text(tokens, packing))[: len(rows)]
        (hidden * weight).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return hidden.detach(), grads | {"images": images.grad}

    dense, dense_grads = run(lambda text: model.fuse(text, packing, images, caption_image)[index])
    sparse, sparse_grads = run(lambda text: model.fuse(text, packing, images, caption_image, index, live))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(sparse, dense, atol=100 * eps, rtol=100 * eps)
    assert dense_grads.keys() == sparse_grads.keys() and len(dense_grads) > 60
    for name, grad in dense_grads.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(sparse_grads[name], grad, atol=200 * eps * (1 + scale), rtol=0, msg=name)


@pytest.mark.parametrize("multiple", [1, 7, 32])
def test_a_step_equals_the_dense_computation(model, monkeypatch, multiple):
    """The loss and its gradients, when the model takes the masked rows alone, against all rows and plain torch."""
    monkeypatch.setattr(PosMaskModel, "padded_rows", lambda self, n: -(-n // multiple) * multiple)
    model.image = nn.Identity()
    model.double()
    tokens, starts, packing = packed()
    batch = SimpleNamespace(
        tokens=tokens, caption_starts=starts, caption_image=torch.tensor([0, 1, 2, 1], dtype=torch.int32),
        images=torch.randn(3, CONFIG.num_image_tokens, 32, dtype=torch.float64),
        max_caption_tokens=9, max_image_tokens=9,
    )  # fmt: skip
    rows = torch.tensor([1, 4, 9, 11])
    for num_masked in (4, 0):
        targets = torch.full((128,), -100, dtype=torch.int32)
        index = torch.zeros(128, dtype=torch.int32)
        targets[:num_masked], index[:num_masked] = tokens[rows][:num_masked], rows[:num_masked].int()
        masked = MaskedTokens(tokens, index, targets, torch.tensor(num_masked, dtype=torch.int32), torch.zeros(()))
        model.zero_grad()
        loss = model(batch, masked, None).loss_sum
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        hidden = model.fuse(model.encode_text(tokens, packing), packing, batch.images, batch.caption_image)
        truth = F.cross_entropy(model.logits(hidden)[index], targets.long(), ignore_index=-100, reduction="sum")
        truth.backward()
        torch.testing.assert_close(loss, truth, atol=1e-10, rtol=1e-10)
        for name, param in model.named_parameters():
            if name in grads:
                torch.testing.assert_close(grads[name], param.grad, atol=1e-10, rtol=1e-8, msg=name)
            else:
                assert param.grad is None or not param.grad.any()


def test_rows_of_products_are_few_numbers_in_bf16_on_a_cpu(model, monkeypatch):
    """Layers and products of the loss: of tokens and of masked rows, whose numbers differ from batch to batch."""
    seen = set()

    def record(place, name, rows_of):
        inner = getattr(place, name)

        def call(*args, **kwargs):
            seen.add(rows_of(*args))
            return inner(*args, **kwargs)

        monkeypatch.setattr(place, name, call)

    record(F, "linear", lambda x, *_: len(x))
    record(torch, "mm", lambda a, b: min(len(a), len(b)))  # (M, D) x (D, V), and (V, M) x (M, D)
    record(torch.Tensor, "addmm_", lambda x, *_: len(x))
    monkeypatch.setattr(masked_lm_loss_torch, "has_bf16_instructions", lambda: True)
    model.image = nn.Identity()
    model.bfloat16()
    for lengths in (LENGTHS, (5, 1, 9, 8), (20, 14)):
        tokens, starts, _ = packed(lengths)
        num_masked = len(lengths)
        batch = SimpleNamespace(
            tokens=tokens, caption_starts=starts, caption_image=torch.zeros(len(lengths), dtype=torch.int32),
            images=torch.randn(1, 4, 32, dtype=torch.bfloat16), max_caption_tokens=max(lengths), max_image_tokens=99,
        )  # fmt: skip
        index, targets = torch.zeros(2, 128, dtype=torch.int32)
        index[:num_masked], targets[num_masked:] = starts[:-1], -100
        masked = MaskedTokens(tokens, index, targets, torch.tensor(num_masked), torch.zeros(()))
        model(batch, masked, None).loss_sum.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert seen == {4, 8, 24, 40}, "4 rows are the image's"


@pytest.mark.parametrize("caption_image", [[0, 1, 2, 1], [0, 0, 1, 2]], ids=["unsorted", "sorted"])
def test_attention_as_on_a_gpu_gives_the_same_gradients(model, monkeypatch, poisoned_memory, caption_image):
    """All ways in which the model calls the kernel, in Triton's interpreter, against the path of a CPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernel is compiled here; test_on_gpu.py runs it")
    tokens, starts, _ = packed()
    images = torch.randn(3, CONFIG.num_image_tokens, 32, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([1, 4, 9, 11, 0, 0])
    live = torch.arange(6) < 4
    in_order = caption_image == sorted(caption_image)
    weight = torch.randn(len(tokens), 32, generator=torch.Generator().manual_seed(1))

    def gradients():
        packing = Packing.of(starts, len(tokens), max(LENGTHS))
        args = model.encode_text(tokens, packing), packing, images, torch.tensor(caption_image, dtype=torch.int32)
        rows, fused = model.fuse(*args, index, live, in_order=in_order), model.fuse(*args, in_order=in_order)
        model.zero_grad()
        ((weight[:6] * torch.where(live[:, None], rows, 0)).sum() + (weight * fused).sum()).backward()
        assert rows.isfinite().all()
        return rows[live], fused, *(p.grad.clone() for p in model.parameters() if p.grad is not None)

    truth = gradients()
    monkeypatch.setattr("posmask.train.attention.resolve", lambda *_: "triton")
    for ours, true in zip(gradients(), truth, strict=True):
        # Of the bias of keys, which softmax does not see, the gradient is rounding alone.
        torch.testing.assert_close(ours, true, atol=1e-6 + 2e-5 * float(true.abs().max()), rtol=1e-5)


def test_reward_equals_a_slow_loop(model):
    """Attention weights times norms of values, by hand; then relative to the most in the caption, summed per bin."""
    tokens, _, packing = packed()
    index, bins = torch.tensor([0, 3, 6, 8, 14, 15]), torch.tensor([7, 0, 7, -1, 0, 0])
    live = torch.tensor([True] * 5 + [False])
    images = torch.randn(2, CONFIG.num_image_tokens, 32)
    caption_image = torch.tensor([1, 0, 0, 1])
    looks = []
    with torch.no_grad():
        text = model.encode_text(tokens, packing)
        model.fuse(text, packing, images, caption_image, index, live, looks=looks)
        ours = _reward(looks[0], packing.caption[index], len(LENGTHS), live, bins)
        dense = text
        for layer in model.fusion[:-1]:
            owner = caption_image[packing.caption]
            starts = torch.tensor([0, 1, 2]).int() * images.shape[1]
            at_image = Ragged(owner, starts, 99, images.shape[1], is_sorted=False)
            dense = layer(dense, packing.within_captions, images.flatten(0, 1), at_image)
        last = model.fusion[-1]
        rows = last.attention(dense, dense, packing.within_captions)
        cross, expected, taken = last.crossattention.self, torch.zeros(17), {}
        for i in index[live].tolist():
            image = images[caption_image[packing.caption[i]]]
            query, key, value = cross.query(rows[i]), cross.key(image), cross.value(image)
            per_head = []
            for h in range(4):
                part = slice(8 * h, 8 * h + 8)
                weight = (key[:, part] @ query[part] / 8**0.5).softmax(0)
                per_head.append(weight * value[:, part].norm(dim=1))
            taken[i] = torch.stack(per_head).mean(0).sort(descending=True).values[:8].mean().item()
        for i, b in zip(index[live].tolist(), bins.tolist(), strict=False):
            most = max(v for j, v in taken.items() if packing.caption[j] == packing.caption[i])
            if b >= 0:
                expected[b] += taken[i] / most
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert expected[0] > 0 and expected[7] > 1
