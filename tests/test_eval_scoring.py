"""Scores of texts against slow loops and Hugging Face's BERT; what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from posmask.eval import scoring
from posmask.eval.scoring import Encoder, Query, Score
from posmask.train.checkpoint import load_model
from posmask.train.config import PRESETS
from posmask.train.model import Packing, PosMaskModel
from posmask.train.weights import load_text_weights

TEXTS = ("The red ball is under a table.", "a [MASK] dog's ball", "x", "two cats, two dogs on the unbelievable sofa .")


@pytest.fixture(scope="module")
def model(untrained_run):
    return load_model(str(untrained_run), torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def encoder(untrained_run, model):
    return Encoder(untrained_run, model)


@pytest.fixture(scope="module")
def features(model):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.image(images)


def one_log_prob(model, ids, masked, place, image):
    """log P of the piece at `place` of one text alone, the pieces at `masked` hidden."""
    tokens = torch.from_numpy(ids.copy())
    tokens[masked] = 4  # [MASK] in the vocabulary of the run
    packing = Packing.of(torch.tensor([0, len(ids)]), len(ids), len(ids))
    with torch.no_grad():
        hidden = model.fuse(model.encode_text(tokens, packing), packing, image, torch.zeros(1, dtype=torch.int32))
        return float(model.logits(hidden)[place].log_softmax(-1)[int(ids[place])])


def slow_score(model, text, image, l2r):
    """One piece at a time, in a batch of one."""
    total, ids = 0.0, text.ids
    for place in range(1, len(ids) - 1):
        masked = [place]
        while l2r and masked[-1] + 1 < len(ids) - 1 and text.word_of[masked[-1] + 1] == text.word_of[place]:
            masked.append(masked[-1] + 1)
        total += one_log_prob(model, ids, masked, place, image)
    return total


@pytest.mark.parametrize("budget", [40, 8192])  # forwards of one or two copies, and one forward
@pytest.mark.parametrize("name", ["pll", "pll-word-l2r"])
def test_equals_a_slow_loop(model, encoder, features, monkeypatch, name, budget):
    monkeypatch.setattr(scoring, "TOKENS_PER_FORWARD", budget)
    monkeypatch.setattr(scoring, "ROWS_PER_FORWARD", 7)
    texts = encoder(TEXTS)
    queries = [
        query
        for owner, text in enumerate(texts)
        for query in scoring.text_queries(text, owner % 3, owner, name, encoder.mask_id)
    ]
    with torch.no_grad():
        shown = scoring.conditions(model, features, ("blank", "noise", "shuffled"), seed=0)
        found = scoring.log_probs(model, queries, shown, len(texts))
    assert set(found) == {"image", "blank", "noise", "shuffled"}
    for condition, images in shown.items():
        for owner, text in enumerate(texts):
            image = images[owner % len(images)][None]
            truth = slow_score(model, text, image, name == "pll-word-l2r")
            assert found[condition][owner] == pytest.approx(truth, abs=2e-4)
    assert np.abs(found["image"] - found["blank"]).max() > 0.01, "the image matters, or this shows nothing"


def test_the_two_differ_only_in_words_of_several_pieces(model, encoder, features):
    texts = encoder(["the red ball is", "unbelievable"])
    with torch.no_grad():
        by_name = {
            name: scoring.log_probs(
                model, [q for i, t in enumerate(texts) for q in scoring.text_queries(t, 0, i, name, 4)],
                {"image": features}, 2,
            )["image"]
            for name in ("pll", "pll-word-l2r")
        }  # fmt: skip
    assert by_name["pll"][0] == pytest.approx(by_name["pll-word-l2r"][0], abs=1e-4)
    assert abs(by_name["pll"][1] - by_name["pll-word-l2r"][1]) > 0.01


def test_a_literal_mask_is_text(encoder):
    text = encoder([TEXTS[1]])[0]
    assert encoder.mask_id not in text.ids and len(text.ids) > 8


def test_diff_masks_what_differs_together(model, encoder, features):
    caption, foil = encoder(["the red dog is on a ball", "the red cats is on a ball"])
    queries = scoring.pair_queries(caption, foil, 1, 0, "diff", encoder.mask_id)
    with torch.no_grad():
        found = scoring.log_probs(model, queries, {"image": features}, 2)["image"]
    image = features[1:2]
    assert found[0] == pytest.approx(one_log_prob(model, caption.ids, [3], 3, image), abs=1e-4)
    truth = sum(one_log_prob(model, foil.ids, [3, 4], place, image) for place in (3, 4))
    assert found[1] == pytest.approx(truth, abs=1e-4)
    longer = encoder(["the red dog is on a red ball"])[0]
    assert scoring.pair_queries(caption, longer, 0, 0, "diff", 4) is None, "nothing of the caption differs"


def test_equal_copies_are_computed_once(model, encoder, features, monkeypatch):
    caption, foil = encoder(["the dog is red", "the cat is red"])
    queries = scoring.pair_queries(caption, foil, 0, 0, "pll", encoder.mask_id)
    seen = []
    encode_text = PosMaskModel.encode_text

    def count(self, tokens, packing):
        seen.append(int((packing.position == 0).sum()))
        return encode_text(self, tokens, packing)

    monkeypatch.setattr(PosMaskModel, "encode_text", count)
    with torch.no_grad():
        scoring.log_probs(model, queries, {"image": features, "other": features.flip(0)}, 2)
    assert seen == [7], "four holes each, the one over dog or cat in common; one text forward for both conditions"


def test_text_alone_equals_bert(tmp_path, encoder):
    """With cross-attention that adds nothing the model is BERT: sums of HF's log-probabilities, one piece at a time."""
    torch.manual_seed(1)
    vocab_size = encoder.encode.tokenizer.get_vocab_size()
    bert = BertForMaskedLM(BertConfig(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, initializer_range=0.3,
    )).eval()  # fmt: skip
    bert.save_pretrained(tmp_path)
    ours = PosMaskModel(dataclasses.replace(
        PRESETS["laptop"], vocab_size=vocab_size, width=32, num_heads=4, num_text_layers=2, num_fusion_layers=2,
        max_positions=64,
    )).eval()  # fmt: skip
    load_text_weights(ours, str(tmp_path))
    for layer in ours.fusion:  # what then remains, the LayerNorm of a LayerNorm's result, changes nothing
        for param in layer.crossattention.output.dense.parameters():
            torch.nn.init.zeros_(param)
    image = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(2))
    for owner, text in enumerate(encoder(TEXTS)):
        truth = 0.0
        for place in range(1, len(text.ids) - 1):
            ids = torch.from_numpy(text.ids.astype(np.int64))[None]
            ids[0, place] = 4
            with torch.no_grad():
                truth += float(bert(ids).logits[0, place].log_softmax(-1)[int(text.ids[place])])
        queries = list(scoring.text_queries(text, 0, 0, "pll", 4))
        with torch.no_grad():
            found = scoring.log_probs(ours, queries, {"image": image}, 1)["image"][0]
        assert found == pytest.approx(truth, rel=1e-5), TEXTS[owner]


def test_candidates_of_a_slot_share_its_row(model, encoder, features, monkeypatch):
    ids = encoder(["the red dog"])[0].ids
    masked = scoring.hide(ids, [3], encoder.mask_id)
    queries = [Query(masked, 0, [3], [target], target) for target in range(20)]
    rows = []
    logits = PosMaskModel.logits
    monkeypatch.setattr(PosMaskModel, "logits", lambda self, x: rows.append(len(x)) or logits(self, x))
    with torch.no_grad():
        found = scoring.log_probs(model, queries, {"image": features}, 20)["image"]
    assert rows == [1]
    for target in (0, 7, 19):
        changed = ids.copy()
        changed[3] = target
        assert found[target] == pytest.approx(one_log_prob(model, changed, [3], 3, features[:1]), abs=1e-4)


def test_conditions(model, features):
    shown = scoring.conditions(model, features, ("blank", "noise", "shuffled"), seed=3)
    assert torch.equal(shown["image"], features)
    assert torch.equal(shown["blank"], model.image(torch.zeros(1, 3, 32, 32)))
    assert len(shown["noise"]) == 1 and not torch.allclose(shown["noise"], shown["blank"], atol=1e-2)
    partner = [next(j for j in range(3) if torch.equal(row, features[j])) for row in shown["shuffled"]]
    assert sorted(partner) == [0, 1, 2] and all(i != j for i, j in enumerate(partner)), "each another image"
    with pytest.raises(ValueError, match="at least 2 photos"):
        scoring.conditions(model, features[:1], ("shuffled",), seed=3)


def test_score_names(model, untrained_run):
    assert Score.parse(None).name == "pll-word-l2r"
    assert Score.parse(None, has_itm=True).name == "itm"
    assert Score.parse("image-gain").name == "image-gain:pll-word-l2r"
    assert Score.parse("image-gain:diff") == Score("diff", True)
    for name in ("ppl", "image-gain:ppl", "pll:diff"):
        with pytest.raises(ValueError, match="must be one of pll"):
            Score.parse(name)
    for name in ("itm", "itc", "image-gain:itm"):
        with pytest.raises(ValueError, match="trained without: take --score pll-word-l2r"):
            Score.parse(name).check(model, untrained_run)
    gain = Score.parse("image-gain").match(np.array([-1.0, 0, 1]))
    assert gain[1] == 0.5 and gain[0] < 0.5 < gain[2]
    assert Score.parse("pll").match(np.zeros(1)) is None


def test_texts_are_cut_and_counted(untrained_run, model):
    cut, whole = Encoder(untrained_run, model, max_tokens=8)(["unbelievable balls", "red ball"])
    assert cut.is_cut and not whole.is_cut and len(cut.ids) <= 8
    for max_tokens in (7, 65):
        with pytest.raises(ValueError, match=f"--max-tokens {max_tokens}: must be 8 to 64"):
            Encoder(untrained_run, model, max_tokens)
