"""Recall against a loop over a score matrix; the reader; what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from posmask.eval import retrieval, scoring
from posmask.eval import run as evaluate
from posmask.eval.photos import PhotoEncoder, PhotoFolders
from posmask.eval.scoring import Encoder
from posmask.train.checkpoint import load_model
from posmask.train.config import ModelConfig
from posmask.train.model import Packing, PosMaskModel


def slow_recalls(scores, image_of, depth):
    """Both recalls at `depth` by sorting each row and column."""
    num_images, num_captions = scores.shape
    to_text = np.mean([
        any(image_of[c] == i for c in sorted(range(num_captions), key=lambda c: -scores[i, c])[:depth])
        for i in range(num_images)
    ])  # fmt: skip
    to_image = np.mean([
        image_of[c] in sorted(range(num_images), key=lambda i: -scores[i, c])[:depth] for c in range(num_captions)
    ])  # fmt: skip
    return to_text, to_image


def test_recall_equals_sorting():
    rng = np.random.default_rng(0)
    image_of = rng.permutation(np.concatenate([np.arange(30), rng.integers(0, 30, 70)]))
    scores = rng.normal(size=(30, 100))
    scores[image_of, np.arange(100)] += 1.5
    found = [retrieval.recalls(of_one) for of_one in retrieval.ranks(scores, image_of)]
    for depth in (1, 5, 10):
        wanted = slow_recalls(scores, image_of, depth)
        assert [entry[f"r{depth}"]["accuracy"] for entry in found] == pytest.approx(wanted)
    assert 0.2 < found[1]["r1"]["accuracy"] < 0.9, "neither trivial nor impossible"


def test_truth_constant_and_reverse():
    image_of = np.repeat(np.arange(20), 5)
    truth = (image_of[None] == np.arange(20)[:, None]).astype(float)
    for scores, recall in ((truth, 1), (np.zeros((20, 100)), 0), (-truth, 0)):
        for entry in map(retrieval.recalls, retrieval.ranks(scores, image_of)):
            found = [entry[key]["accuracy"] for key in ("r1", "r5", "r10")]
            assert found == [recall] * 3, "what ties with the truth ranks before it"


def test_chance():
    assert retrieval.chance_of(np.arange(20), 5) == pytest.approx(0.25)
    image_of = np.repeat(np.arange(4), 5)
    rng = np.random.default_rng(0)
    drawn = np.mean([0 in image_of[rng.permutation(20)[:5]] for _ in range(20000)])
    assert retrieval.chance_of(image_of, 5) == pytest.approx(drawn, abs=0.01)


def test_reader(tmp_path):
    path = tmp_path / "captions.json"
    annotations = [{"image_id": 7, "caption": "a"}, {"image_id": 3, "caption": "b"}, {"image_id": 7, "caption": "c"}]
    path.write_text(json.dumps({"images": [{"id": 7, "file_name": "seven.jpg"}], "annotations": annotations}))
    found = retrieval.read(str(path))
    assert found.photos == ["seven.jpg", "000000000003.jpg"] and found.texts == ["a", "b", "c"]
    assert found.image_of.tolist() == [0, 1, 0]


@pytest.fixture(scope="module")
def matching_run(untrained_run, tmp_path_factory):
    """A copy of the untrained run with both heads."""
    run = tmp_path_factory.mktemp("runs") / "matching"
    shutil.copytree(untrained_run, run)
    config = dataclasses.replace(ModelConfig.load(run / "model_config.json"), objectives=("mlm", "itm", "itc"))
    config.save(run / "model_config.json")
    torch.manual_seed(1)
    weights = PosMaskModel(config).state_dict() | load_file(run / "model.safetensors")
    save_file({name: value.contiguous() for name, value in weights.items()}, run / "model.safetensors")
    return run


@pytest.fixture
def captions_file(tmp_path):
    """14 captions of the photos 1 to 6, of different lengths."""
    words = ("a", "red", "dog", "is", "on", "the", "unbelievable", "ball", "under", "two", "cats", ".")
    annotations = [{"image_id": 1 + i % 6, "caption": " ".join(words[: 1 + (5 * i) % 12])} for i in range(14)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": annotations}))
    return tmp_path / "captions.json"


def slow_scores(run, path, photos):
    """itm and itc (6, 14), one pair at a time."""
    model, _ = load_model(str(run), torch.device("cpu"))
    captions, encoder = retrieval.read(str(path)), Encoder(run, model)
    pictures = PhotoEncoder(model, PhotoFolders([str(photos)]), "cpu")
    itm, itc = np.zeros((6, 14)), np.zeros((6, 14))
    with torch.no_grad():
        for i, name in enumerate(captions.photos):
            features = model.image(pictures.pixels([name]))
            for c, text in enumerate(encoder(captions.texts)):
                packing = Packing.of(torch.tensor([0, len(text.ids)]), len(text.ids), len(text.ids))
                hidden = model.encode_text(torch.from_numpy(text.ids), packing)
                fused = model.fuse(hidden, packing, features, torch.zeros(1, dtype=torch.int32))
                itm[i, c] = torch.sigmoid((fused @ model.itm.weight[0] + model.itm.bias).mean())
                itc[i, c] = model.itc.embed_text(hidden[:1])[0] @ model.itc.embed_image(features)[0]
    return itm, itc, captions.image_of


@pytest.mark.parametrize("budget", [40, 8192])
def test_scores_equal_a_loop_over_pairs(matching_run, captions_file, photos, monkeypatch, budget):
    monkeypatch.setattr(scoring, "TOKENS_PER_FORWARD", budget)
    itm, itc, _ = slow_scores(matching_run, captions_file, photos)
    model, _ = load_model(str(matching_run), torch.device("cpu"))
    captions = retrieval.read(str(captions_file))
    texts = Encoder(matching_run, model)(captions.texts)
    with torch.no_grad():
        features = model.image(PhotoEncoder(model, PhotoFolders([str(photos)]), "cpu").pixels(captions.photos))
        for heads, wanted in ((["itm"], itm), (["itc"], itc)):
            for found in retrieval.score_matrices(model, texts, features, heads, 3):
                np.testing.assert_allclose(found, wanted, atol=2e-5)
            one = scoring.head_scores(model, texts, [2] * 14, {"image": features}, heads[0])["image"]
            np.testing.assert_allclose(one, wanted[2], atol=2e-5)
        to_text, to_image = retrieval.score_matrices(model, texts, features, ["itm", "itc"], 3)
    for row, cosine, match in [*zip(to_text, itc, itm, strict=True), *zip(to_image.T, itc.T, itm.T, strict=True)]:
        first = np.argsort(-cosine)[:3]
        assert np.ptp(itc) > 0.01 and set(np.argsort(-row)[:3]) == set(first)
        np.testing.assert_allclose(row[first], 2 + match[first], atol=2e-5)
        rest = np.setdiff1d(np.arange(len(row)), first)
        np.testing.assert_allclose(row[rest], cosine[rest], atol=2e-5)


@pytest.mark.parametrize("score", [None, "itm", "itc"])
def test_command(matching_run, captions_file, photos, tmp_path, capsys, score):
    argv = ["retrieval", "--checkpoint", str(matching_run), "--annotations", str(captions_file)]
    argv += ["--images", str(photos), "--out", str(tmp_path / "out"), *(["--score", score] if score else [])]
    assert evaluate.main(argv) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (results["num_photos"], results["num_captions"], results["num_items"]) == (6, 14, 20)
    assert results["score"] == (score or "itm+itc") and results["text_to_image"]["r10"]["accuracy"] == 1
    itm, itc, image_of = slow_scores(matching_run, captions_file, photos)
    scores = itc if score == "itc" else itm  # a shortlist of everything leaves nothing to itc
    for group, wanted in zip(retrieval.DIRECTIONS, retrieval.ranks(scores, image_of), strict=True):
        assert results[group]["r1"]["accuracy"] == np.mean(wanted < 1)
        assert results[group]["median_rank"] == np.median(wanted) + 1
    assert (tmp_path / "out" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert evaluate.main([*argv, "--limit", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_photos"] == 2


def test_pairs_by_the_matching_head(matching_run, photos, tmp_path, capsys):
    entries = {str(i): {"filename": f"{i:012d}.jpg", "caption": "a red dog", "negative_caption": "two cats on a ball"}
               for i in range(1, 6)}  # fmt: skip
    (tmp_path / "swap.json").write_text(json.dumps(entries))
    argv = ["sugarcrepe", "--checkpoint", str(matching_run), "--annotations", str(tmp_path / "swap.json")]
    argv += ["--images", str(photos), "--out", str(tmp_path / "out"), "--controls", "noise"]
    found = {}
    for score in (None, "itc", "image-gain"):
        assert evaluate.main([*argv, *(["--score", score] if score else [])]) == 0
        results = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert results["has_threshold"]
        assert results["score"] == {None: "itm", "image-gain": "image-gain:itm"}.get(score, score)
        lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
        found[score] = np.array([json.loads(line)["scores"]["image"] for line in lines])
        found[score, "blank"] = np.array([json.loads(line)["scores"]["blank"] for line in lines])
    assert ((found[None] > 0) & (found[None] < 1)).all() and (np.abs(found["itc"]) <= 1).all()
    np.testing.assert_allclose(found["image-gain"], found[None] - found[None, "blank"], atol=2e-5)


def test_refuses_a_checkpoint_without_a_head(untrained_run, photos, tmp_path, capsys):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "a"}]}))
    argv = ["retrieval", "--checkpoint", str(untrained_run), "--annotations", str(path), "--images", str(photos)]
    assert evaluate.main([*argv, "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "trained without: take another checkpoint" in lines[0]
    assert not (tmp_path / "out").exists()
