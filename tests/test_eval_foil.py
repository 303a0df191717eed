"""FOIL-it: finding the slot, T1 to T3 against slow loops, the reader."""

import json

import numpy as np
import pytest
import torch

from posmask.eval import foil, scoring
from posmask.eval import run as evaluate
from posmask.eval.photos import PhotoEncoder, PhotoFolders
from posmask.eval.scoring import Encoder
from posmask.train.checkpoint import load_model
from posmask.train.model import Packing

PAIRS = (  # photo, right caption, foiled caption, right word, foil word
    (1, "A red dog is on the table.", "A red cat is on the table.", "dog", "cat"),
    (2, "the dog sees a ball", "the dog sees a table", "ball", "table"),
    (2, "A skateboard under the tree", "A surfboard under the tree", "skateboard", "surfboard"),
    (4, "two balls, two trees", "two cats, two trees", "balls", "cats"),
)


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    entries = []
    for i, (photo, right, foiled, target, wrong) in enumerate(PAIRS):
        common = {"id": 50 + i, "image_id": photo}
        words = {"target_word": "ORIG", "foil_word": "ORIG"}
        entries.append({**common, **words, "caption": right, "foil": False, "foil_id": 0})
        words = {"target_word": target, "foil_word": wrong}
        entries.append({**common, **words, "caption": foiled, "foil": True, "foil_id": 10 + i})
    path = tmp_path_factory.mktemp("foil") / "foilv1.0_test_2017.json"
    images = [{"id": 4, "file_name": "COCO_val2014_000000000004.jpg"}]
    path.write_text(json.dumps({"images": images, "annotations": entries}))
    return path


@pytest.fixture(scope="module")
def model(untrained_run):
    return load_model(str(untrained_run), torch.device("cpu"))[0]


def run_foil(untrained_run, annotations, photos, out, capsys, *more):
    argv = ["foil", "--checkpoint", str(untrained_run), "--annotations", str(annotations), "--images", str(photos)]
    assert evaluate.main([*argv, "--out", str(out), *more]) == 0
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return json.loads(capsys.readouterr().out.splitlines()[-1]), lines


def word_log_prob(model, ids, places, image):
    """Sum of log-probabilities of the pieces at `places`, from left to right, the later ones hidden: one at a time."""
    total = 0.0
    for i, place in enumerate(places):
        tokens = torch.from_numpy(ids.copy())
        tokens[list(places[i:])] = 4
        packing = Packing.of(torch.tensor([0, len(ids)]), len(ids), len(ids))
        with torch.no_grad():
            hidden = model.fuse(model.encode_text(tokens, packing), packing, image, torch.zeros(1, dtype=torch.int32))
            total += float(model.logits(hidden)[place].log_softmax(-1)[int(ids[place])])
    return total


def test_against_slow_loops(untrained_run, model, annotations, photos, tmp_path, capsys):
    results, lines = run_foil(untrained_run, annotations, photos, tmp_path / "out", capsys)
    assert results["num_items"] == 4 and results["num_not_located"] == 0 and results["num_targets"] == 4
    encoder, vocabulary = Encoder(untrained_run, model), sorted(pair[3] for pair in PAIRS)
    pictures = PhotoEncoder(model, PhotoFolders([str(photos)]), "cpu")
    hits = {"t2_all": [], "t3": []}
    for (photo, _, foiled, target, wrong), line in zip(PAIRS, lines, strict=True):
        with torch.no_grad():
            image = model.image(pictures.pixels([f"{photo:012d}.jpg"]))
        text = encoder([foiled])[0]
        words = foiled.replace(",", " , ").replace(".", " . ").split()
        places = {word: np.flatnonzero(text.word_of == word) for word in range(len(words))}
        scores = {w: word_log_prob(model, text.ids, places[w], image) for w in places if words[w] not in ",."}
        least = words[min(scores, key=scores.get)]
        assert line["found"]["image"]["t2_all"] == least
        hits["t2_all"].append(least == wrong)
        slot = places[words.index(wrong)]
        filled = []
        for candidate in vocabulary:
            pieces = encoder([candidate])[0].ids[1:-1]
            ids = np.concatenate([text.ids[: slot[0]], pieces, text.ids[slot[-1] + 1 :]])
            filled.append(word_log_prob(model, ids, range(slot[0], slot[0] + len(pieces)), image))
        best = vocabulary[int(np.argmax(filled))]
        assert line["found"]["image"]["t3"] == best
        hits["t3"].append(best == target)
    for task, wanted in hits.items():
        assert results["tasks"][task]["image"]["accuracy"] == np.mean(wanted)
    rights = [line["scores"]["image"][0] > line["scores"]["image"][1] for line in lines]
    assert results["tasks"]["t1_pairwise"]["image"]["accuracy"] == np.mean(rights)
    assert results["tasks"]["t1_classify"] == {}, "a likelihood has no threshold"
    assert results["chance"]["t3"] == 0.25
    assert results["chance"]["t2_all"] == pytest.approx(np.mean([1 / 7, 1 / 5, 1 / 5, 1 / 4]))


def test_nouns_come_from_the_tagger(untrained_run, annotations, photos, tmp_path, capsys):
    results, lines = run_foil(untrained_run, annotations, photos, tmp_path / "out", capsys, "--score", "image-gain")
    nouns = [{"cat", "table"}, {"dog", "table"}, {"surfboard", "tree"}, {"cats", "trees"}]
    for line, of_caption in zip(lines, nouns, strict=True):
        assert line["found"]["image"]["t2_nouns"] in of_caption
    assert results["num_slots_tagged_noun"] == 4 and results["chance"]["t2_nouns"] == 0.5
    classified = results["tasks"]["t1_classify"]["image"]
    gains = np.array([line["scores"]["image"] for line in lines])
    assert classified["right"]["accuracy"] == np.mean(gains[:, 0] > 0)
    assert classified["foiled"]["accuracy"] == np.mean(gains[:, 1] <= 0)
    assert classified["overall"]["accuracy"] == pytest.approx(np.mean([gains[:, 0] > 0, gains[:, 1] <= 0]))
    assert (tmp_path / "out" / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("right", "foiled", "wrong", "slot"),
    [
        ("a dog", "a cat", "cat", {1}),
        ("a dog", "a hot dog", "hot", {1}),
        ("the dog and the dog", "the dog and the cat", "cat", {4}),
        ("a skateboard here", "a hot dog here", "hot dog", {1, 2}),
        ("a dog on a dog", "the cat on a dog", "cat", {1}),  # two changes: where the foil word stands
        ("a dog on the dog", "a cat on a cat", "cat", None),  # which of the two?
        ("a cat", "a cat", "dog", None),
    ],
)
def test_slot(untrained_run, model, right, foiled, wrong, slot):
    encoder = Encoder(untrained_run, model)
    assert foil.find_slot(*encoder([right, foiled, wrong])) == slot


def test_a_right_caption_with_two_foils_counts_once():
    one, two = foil.Pair("1", "foil", "a.jpg", "x", "y"), foil.Pair("2", "foil", "a.jpg", "x", "z")
    scores = np.array([[0.9, 0.1], [0.9, 0.8]])
    scored = foil.Scored([one, two], {"image": scores}, [], 0, 0, 0)
    tasks = foil.classify(scored, scoring.Score("itm", False))
    assert tasks["t1_classify"]["image"]["right"]["num_items"] == 1
    assert tasks["t1_classify"]["image"]["overall"] | {"interval": None} == {
        "accuracy": pytest.approx(2 / 3), "interval": None, "num_items": 3
    }  # fmt: skip
    assert tasks["t1_pairwise"]["image"]["accuracy"] == 1


def test_reader(annotations, tmp_path):
    found = foil.read(str(annotations))
    assert [(item.right, item.wrong) for item in found] == [pair[3:] for pair in PAIRS]
    assert [item.pair.photo for item in found][-1] == "COCO_val2014_000000000004.jpg"
    content = json.loads(annotations.read_text())
    content["annotations"] = content["annotations"][1:]
    (tmp_path / "orphan.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="foil 10 has no right caption of id 50"):
        foil.read(str(tmp_path / "orphan.json"))


def test_missing_photos(untrained_run, annotations, photos, tmp_path, capsys):
    import shutil

    some = tmp_path / "some"
    some.mkdir()
    for number in (1, 4):
        shutil.copy(photos / f"{number:012d}.jpg", some)
    argv = ["foil", "--checkpoint", str(untrained_run), "--annotations", str(annotations), "--images", str(some)]
    assert evaluate.main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "1 of 3 photos" in capsys.readouterr().err
    results, lines = run_foil(untrained_run, annotations, some, tmp_path / "out", capsys, "--allow-missing")
    assert (results["num_items"], results["num_missing"], results["missing_photos"]) == (2, 2, ["000000000002.jpg"])
    assert [line["target_word"] for line in lines] == ["dog", "balls"]
