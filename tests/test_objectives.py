"""Matching and contrast: which wrong images are drawn, and the losses against loops over single pairs."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from posmask.prep.pos import MASKABLE, UPOS_BIT, WORD_START
from posmask.train import objectives, pretrain
from posmask.train.config import PRESETS
from posmask.train.model import Packing, PosMaskModel
from posmask.train.objectives import pair_batch

CONFIG = dataclasses.replace(
    PRESETS["laptop"], vocab_size=60, width=32, num_heads=4, image_width=8, image_layers=(1, 1), image_size=32,
    max_positions=20, objectives=("mlm", "itm", "itc"),
)  # fmt: skip


def make_batch(captions, caption_image, num_images, blank=(), epoch=0):
    """A batch of token lists; images `blank` are zero."""
    starts = torch.tensor([0, *(len(c) for c in captions)]).cumsum(0).int()
    images = torch.randn(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    images[list(blank)] = 0
    rng = np.random.default_rng(7)
    key = torch.from_numpy(rng.integers(-(2**31), 2**31, (len(captions), 3)).astype(np.int32))
    tokens = torch.tensor([t for c in captions for t in c], dtype=torch.int32)
    word = MASKABLE | WORD_START  # 13 continues a word, the tokens below 9 are special
    kinds = [UPOS_BIT[kind] | word for kind in ("NOUN", "NOUN", "VERB", "ADJ", "DET")]
    tags = torch.tensor([0 if t < 9 else kinds[t // 10] & ~(WORD_START * (t == 13)) for t in tokens.tolist()]).int()
    return SimpleNamespace(
        tokens=tokens, tags=tags, caption_starts=starts,
        caption_image=torch.tensor(caption_image, dtype=torch.int32), images=images, caption_key=key, epoch=epoch,
        max_caption_tokens=max(map(len, captions)),
    )  # fmt: skip


CAPTIONS = ([2, 10, 11, 12, 3], [2, 10, 11, 13, 3], [2, 12, 11, 10, 3], [2, 10, 11, 12, 3], [2, 30, 31, 3], [2, 40, 3])
IMAGE_OF = (0, 1, 2, 3, 4, 0)


def test_wrong_images_are_wrong():
    seen = set()
    for epoch in range(300):
        batch = make_batch(CAPTIONS, IMAGE_OF, 5, blank=[1], epoch=epoch)
        pairs = pair_batch(batch, 60, seed=1)
        assert pairs.shown.tolist() == [True, False, True, True, True]
        assert pairs.weight.tolist() == [1, 0, 1, 1, 1, 1], "a blank image belongs to nothing"
        assert float(pairs.num_shown) == 5
        for caption, negative in enumerate(pairs.negative_image.tolist()):
            if pairs.weight[caption]:
                assert negative not in (IMAGE_OF[caption], 1), "its own image, or the blank one"
                seen.add((caption, negative))
    assert (0, 3) not in seen and (3, 0) not in seen, "3 reads as 0 does, so it is true of image 0 too"
    assert {(0, 2), (2, 0), (2, 3)} <= seen, "the same words in another order are a wrong text"


def test_odds_follow_the_words_in_common():
    captions = ([2, 10, 11, 12, 3], [2, 10, 11, 13, 3], [2, 10, 14, 15, 3], [2, 20, 21, 22, 3])
    found = np.zeros(4)
    num_draws = 1500
    for epoch in range(num_draws):
        batch = make_batch(captions, range(4), 4, epoch=epoch)
        found[int(pair_batch(batch, 60, seed=0).negative_image[0])] += 1
    odds = np.array([0, *np.exp(objectives.HARDNESS * np.array([4 / 6, 3 / 7, 2 / 8]))])
    wanted = odds / odds.sum()
    assert found[0] == 0
    sigma = np.sqrt(num_draws * wanted * (1 - wanted))
    assert (np.abs(found - num_draws * wanted)[1:] < 4 * sigma[1:]).all()


def test_a_draw_is_the_captions_own():
    one, other = (pair_batch(make_batch(CAPTIONS, IMAGE_OF, 5, epoch=e), 60, seed=s) for e, s in ((3, 1), (3, 1)))
    assert torch.equal(one.negative_image, other.negative_image)
    changed = [pair_batch(make_batch(CAPTIONS, IMAGE_OF, 5, epoch=3), 60, seed=s).negative_image for s in range(20)]
    assert len({tuple(x.tolist()) for x in changed}) > 1


def test_nothing_to_tell_apart():
    pairs = pair_batch(make_batch([[2, 9, 3], [2, 9, 3]], (0, 1), 2), 60, seed=0)
    assert pairs.weight.tolist() == [0, 0]
    pairs = pair_batch(make_batch([[2, 9, 3]], (0,), 1), 60, seed=0)
    assert pairs.weight.tolist() == [0]


def test_a_foil_has_one_other_word_of_the_same_kind():
    """Of the words in the batch; determiners and words of several pieces (11 13) stay."""
    captions = ([2, 10, 11, 13, 3], [2, 12, 40, 20, 3], [2, 30, 41, 3], [2, 40, 3], [2, 31, 14, 21, 3])
    found, num_foils = set(), 0
    for epoch in range(400):
        batch = make_batch(captions, range(5), 5, blank=[4], epoch=epoch)
        pairs = pair_batch(batch, 60, seed=2)
        changed = pairs.foil != batch.tokens
        per_caption = [int(part.sum()) for part in changed.split([len(c) for c in captions])]
        assert max(per_caption) <= 1 and per_caption[3] == 0
        assert pairs.foil_weight.tolist() == [float(n and i != 4) for i, n in enumerate(per_caption)]
        found |= set(zip(batch.tokens[changed].tolist(), pairs.foil[changed].tolist(), strict=True))
        num_foils += sum(per_caption)
    same_kind = [(10, 12, 14), (20, 21), (30, 31)]  # 11 has a second piece
    assert found == {(a, b) for kind in same_kind for a in kind for b in kind if a != b}
    # A caption of one word draws itself with its share of the kind.
    assert 0 < num_foils < 4 * 400


def test_rare_parts_of_speech_are_foiled_as_well():
    """A word's odds are 1 / (words of its part of speech in the batch)."""
    captions = [[2, 10, 11, 12, 20, 30, 3], *([2, 14 + i % 2, 21 + i, 3] for i in range(8)), [2, 31, 3]]
    num_draws = 400
    found = np.zeros(3)
    for epoch in range(num_draws):
        batch = make_batch(captions, range(10), 10, epoch=epoch)
        changed = (pair_batch(batch, 60, seed=2).foil != batch.tokens)[: len(captions[0])]
        found += [int(changed[1:4].sum()), int(changed[4]), int(changed[5])]
    count = np.array([11, 9, 2])  # nouns, verbs, adjectives
    odds = np.array([3, 1, 1]) / count
    share = odds / odds.sum() * (1 - 1 / count)  # a word may draw itself
    assert (np.abs(found - num_draws * share) < 4 * np.sqrt(num_draws * share * (1 - share))).all(), found


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = PosMaskModel(CONFIG).eval()
    for param in model.parameters():
        if param.dim() == 2:
            param.data.mul_(2)
    return model


def losses(model, batch, pairs):
    return model.match(batch, model.pack(batch), model.image(batch.images), pairs)


@pytest.mark.parametrize("multiple", [1, 32])
def test_matching_equals_a_loop_over_pairs(model, monkeypatch, multiple):
    monkeypatch.setattr(PosMaskModel, "padded_rows", lambda self, n: -(-n // multiple) * multiple)
    batch = make_batch(CAPTIONS, IMAGE_OF, 5, blank=[1])
    pairs = pair_batch(batch, 60, seed=1)
    with torch.no_grad():
        itm, _ = losses(model, batch, pairs)
        total, hits, count = 0.0, 0, 0
        for caption, tokens in enumerate(CAPTIONS):
            if IMAGE_OF[caption] == 1:
                continue
            packing = Packing.of(torch.tensor([0, len(tokens)]), len(tokens), len(tokens))
            text = model.encode_text(torch.tensor(tokens, dtype=torch.int32), packing)
            start = int(batch.caption_starts[caption])
            foil = model.encode_text(pairs.foil[start : start + len(tokens)], packing)
            own, negative = IMAGE_OF[caption], int(pairs.negative_image[caption])
            is_foil = float(pairs.foil_weight[caption])
            shown = ((text, own, 1.0, 1 + is_foil), (text, negative, 0.0, 1.0), (foil, own, 0.0, is_foil))
            for words, image, truth, weight in shown:
                features = model.image(batch.images[image : image + 1])
                fused = model.fuse(words, packing, features, torch.zeros(1, dtype=torch.int32))
                logit = (fused @ model.itm.weight[0] + model.itm.bias).mean()
                total += weight * float(F.binary_cross_entropy_with_logits(logit, torch.tensor(truth)))
                hits += weight * ((float(logit) > 0) == (truth > 0))
                count += weight
    assert float(itm.loss_sum) == pytest.approx(total, rel=1e-4)
    assert (float(itm.hits), float(itm.count)) == (hits, count) and count > 10, "some foils are among them"


@pytest.mark.parametrize("multiple", [1, 32])
def test_contrast_equals_a_loop_over_rows(model, monkeypatch, multiple):
    monkeypatch.setattr(PosMaskModel, "padded_rows", lambda self, n: -(-n // multiple) * multiple)
    batch = make_batch(CAPTIONS, IMAGE_OF, 5, blank=[1])
    with torch.no_grad():
        _, itc = losses(model, batch, pair_batch(batch, 60, seed=1))
        first = batch.caption_starts[:-1].long()
        packing = Packing.of(batch.caption_starts, len(batch.tokens), batch.max_caption_tokens)
        text = model.itc.embed_text(model.encode_text(batch.tokens, packing)[first])
        image = model.itc.embed_image(model.image(batch.images))
        assert torch.allclose(text.norm(dim=1), torch.ones(6)) and torch.allclose(image.norm(dim=1), torch.ones(5))
        total, count = 0.0, 0
        for caption, own in enumerate(IMAGE_OF):
            if own == 1:
                continue
            shown = [i for i in range(5) if i != 1]
            scores = torch.stack([text[caption] @ image[i] for i in shown]) / 0.07
            total += float(F.cross_entropy(scores, torch.tensor(shown.index(own)))) / 2
            others = [c for c in range(6) if IMAGE_OF[c] != 1 and (IMAGE_OF[c] != own or c == caption)]
            scores = torch.stack([text[c] @ image[own] for c in others]) / 0.07
            total += float(F.cross_entropy(scores, torch.tensor(others.index(caption)))) / 2
            count += 1
    assert float(itc.loss_sum) == pytest.approx(total, rel=1e-4) and float(itc.count) == count == 5


def test_gradients_stay_finite_with_blank_images(model):
    batch = make_batch(CAPTIONS, IMAGE_OF, 5, blank=[1, 4])
    itm, itc = losses(model.train(), batch, pair_batch(batch, 60, seed=1))
    (itm.loss_sum + itc.loss_sum).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in grads.values())
    heads = ("itm.weight", "itc.image.weight", "itc.text.weight", "itc.log_scale")
    assert all(grads[name].abs().max() > 0 for name in heads)


def test_a_batch_is_learned(model):
    """A few pairs by heart: the gradient points the right way."""
    batch = make_batch(CAPTIONS[1:], (0, 1, 2, 3, 4), 5)
    pairs = pair_batch(batch, 60, seed=1)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    for _ in range(60):
        itm, itc = losses(model, batch, pairs)
        optimizer.zero_grad()
        ((itm.loss_sum / itm.count) + (itc.loss_sum / itc.count)).backward()
        optimizer.step()
    for found, count in ((itm, 10 + 2 * int(pairs.foil_weight.sum())), (itc, 5)):
        assert float(found.count) == float(found.hits) == count
        assert float(found.loss_sum.detach()) / count < 0.1


def flags(scenes, out, *more, mask="noun", steps=4):
    argv = ["--mask", mask, "--data", f"{scenes}/train", "--out", str(out), "--steps", str(steps), "--batch-size", "16"]
    return [*argv, "--log-every", "1", "--checkpoint-every", "2", "--eval-images", "16", "--snapshots", "0", *more]


def test_a_run_of_all_objectives_resumes_bit_for_bit(scenes, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    more = ["--objectives", "mlm,itm,itc", "--captions-per-image", "2", "--micro-batch-size", "8"]
    assert pretrain.main(flags(scenes, tmp_path / "whole", *more)) == 0
    calls, all_losses = [], pretrain.all_losses

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 6:  # in step 3, after the checkpoint of step 2
            raise KeyboardInterrupt
        return all_losses(*args)

    monkeypatch.setattr(pretrain, "all_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(flags(scenes, tmp_path / "stopped", *more))
    monkeypatch.undo()
    assert pretrain.main(flags(scenes, tmp_path / "stopped", *more)) == 0
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys() >= {"itm.weight", "itc.text.weight", "itc.log_scale"}
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "loss" in line]
    assert len(train) == 4
    for of_one in (line[name] for line in train for name in ("itm", "itc")):
        assert of_one["loss"] > 0 and 0 <= of_one["accuracy"] <= 1


def test_without_masked_language_modelling(scenes, tmp_path, capsys):
    from posmask.eval import run as evaluate

    out = tmp_path / "none"
    assert pretrain.main(flags(scenes, out, "--objectives", "mlm,itm", mask="none", steps=2)) == 0
    assert json.loads((out / "model_config.json").read_text())["objectives"] == ["itm"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["masked_tokens"] == 0 and line["loss"] is None for line in lines if "itm" in line)
    capsys.readouterr()
    pieces = ["--annotations", f"{scenes}/eval/valse", "--images", f"{scenes}/eval/val2017", "--limit", "2"]
    for argv, says in (
        (["probe"], "needs masked language modelling"),
        (["valse", *pieces, "--score", "pll"], "take --score itm"),
    ):
        assert evaluate.main([*argv, "--checkpoint", str(out)]) == 2
        assert says in capsys.readouterr().err
    assert evaluate.main(["valse", *pieces, "--checkpoint", str(out)]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["score"] == "itm" and results["is_default_score"] and results["micro"]["image"]["p_c"] is not None


@pytest.mark.parametrize(
    ("mask", "names", "says"),
    [
        ("none", "mlm", "only objective"),
        ("noun", "itm", "contradicts --mask noun"),
        ("noun", "mlm,itt", "'itt' is unknown"),
        ("noun", "mlm,mlm", "twice"),
        ("none,noun", "mlm,itm", "adds nothing to a union"),
    ],
)
def test_bad_flags(scenes, tmp_path, capsys, mask, names, says):
    assert pretrain.main(flags(scenes, tmp_path / "run", "--objectives", names, mask=mask)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "run").exists()
