"""Recall against a loop over a score matrix; the reader; what is refused."""

import json

import numpy as np
import pytest

from posmask.eval import retrieval
from posmask.eval import run as evaluate


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
    found = retrieval.recalls(scores, image_of)
    for depth in (1, 5, 10):
        wanted = slow_recalls(scores, image_of, depth)
        assert (found["image_to_text"][f"r{depth}"], found["text_to_image"][f"r{depth}"]) == pytest.approx(wanted)
    assert 0.2 < found["text_to_image"]["r1"] < 0.9, "neither trivial nor impossible"


def test_truth_constant_and_reverse():
    image_of = np.repeat(np.arange(20), 5)
    truth = (image_of[None] == np.arange(20)[:, None]).astype(float)
    for scores, recall in ((truth, 1), (np.zeros((20, 100)), 0), (-truth, 0)):
        for entry in retrieval.recalls(scores, image_of).values():
            assert entry["r1"] == entry["r5"] == entry["r10"] == recall, "what ties with the truth ranks before it"


def test_reader(tmp_path):
    path = tmp_path / "captions.json"
    annotations = [{"image_id": 7, "caption": "a"}, {"image_id": 3, "caption": "b"}, {"image_id": 7, "caption": "c"}]
    path.write_text(json.dumps({"images": [{"id": 7, "file_name": "seven.jpg"}], "annotations": annotations}))
    found = retrieval.read(str(path))
    assert found.photos == ["seven.jpg", "000000000003.jpg"] and found.texts == ["a", "b", "c"]
    assert found.image_of.tolist() == [0, 1, 0]


def test_refuses_a_checkpoint_without_a_head(untrained_run, photos, tmp_path, capsys):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "a"}]}))
    argv = ["retrieval", "--checkpoint", str(untrained_run), "--annotations", str(path), "--images", str(photos)]
    assert evaluate.main([*argv, "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "trained without: take another checkpoint" in lines[0]
    assert not (tmp_path / "out").exists()
