"""Pairs of caption and foil: the metrics against their definitions, the readers, the commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from posmask.eval import pairs, sugarcrepe, valse
from posmask.eval import run as evaluate
from posmask.eval.pairs import Pair, Scored
from posmask.eval.scoring import Score

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "annotations"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")
ITM = Score("itm", False)
VALSE_COUNTS = {
    "existence": 505, "plurals": 851, "counting-hard": 868, "counting-small-quant": 900, "counting-adversarial": 691,
    "relations": 535, "action-replacement": 648, "actant-swap": 949, "coreference-standard": 708,
    "coreference-hard": 104, "foil-it": 943,
}  # fmt: skip
SUGARCREPE_COUNTS = {
    "replace_obj": 1652, "replace_att": 788, "replace_rel": 1406, "swap_obj": 245, "swap_att": 666, "add_obj": 2062,
    "add_att": 692,
}  # fmt: skip


def scored(found, scores):
    return Scored(found, {"image": np.asarray(scores, float)}, [], 0, 0, 0)


def summary_of(found, truth):
    """Summary where a caption scores `truth` and a foil 1 - truth."""
    return pairs.summarise(scored(found, np.tile([truth, 1 - truth], (len(found), 1))), ITM)


def check_extremes(found):
    """A scorer that tells the truth, one that tells the reverse, and one that always says the same."""
    parts = [*(entry["image"] for entry in summary_of(found, 1)["groups"].values())]
    summary = summary_of(found, 1)
    for metrics in (*parts, summary["macro"]["image"], summary["micro"]["image"]):
        assert all(metrics[key] == 1 for key in pairs.METRICS)
    summary = summary_of(found, 0)
    for metrics in (*(e["image"] for e in summary["groups"].values()), summary["macro"]["image"]):
        assert all(metrics[key] == 0 for key in pairs.METRICS)
    for constant, p_c in ((0.7, 1), (0.5, 0), (0.2, 0)):
        summary = pairs.summarise(scored(found, np.full((len(found), 2), constant)), ITM)
        for metrics in (*(e["image"] for e in summary["groups"].values()), summary["macro"]["image"]):
            wanted = {"acc_r": 0, "p_c": p_c, "p_f": 1 - p_c, "acc": 0.5, "min_p": 0, "auroc": 0.5}
            assert {key: metrics[key] for key in wanted} == wanted


@pytest.mark.real_data
@real_data
def test_every_valse_item():
    found, num_invalid = valse.read(str(DATA / "valse" / "data"))
    counts = {piece: sum(pair.group == piece for pair in found) for piece in VALSE_COUNTS}
    assert counts == VALSE_COUNTS and len(found) == 7702 and num_invalid == 8782 - 7702
    assert all(pair.photo and pair.caption and pair.foil and pair.caption != pair.foil for pair in found)
    assert len({(pair.group, pair.id) for pair in found}) == len(found)
    check_extremes(found)
    check_against_numpy(found)


@pytest.mark.real_data
@real_data
def test_every_sugarcrepe_item():
    found = sugarcrepe.read(str(DATA / "sugarcrepe" / "data"))
    assert {g: sum(pair.group == g for pair in found) for g in SUGARCREPE_COUNTS} == SUGARCREPE_COUNTS
    assert len(found) == sum(SUGARCREPE_COUNTS.values()) == 7511
    assert all(pair.photo.endswith(".jpg") and pair.caption and pair.foil for pair in found)
    check_extremes(found)
    check_against_numpy(found)


def check_against_numpy(found):
    """Random scores, some of them equal, against the definitions written out."""
    rng = np.random.default_rng(5)
    scores = rng.integers(0, 21, (len(found), 2)) / 20
    summary = pairs.summarise(scored(found, scores), ITM)
    group_of = np.array([pair.group for pair in found])
    macro = []
    for group, entry in [*summary["groups"].items(), (None, summary["micro"])]:
        c, f = scores[group_of == group if group else slice(None)].T
        p_c, p_f = np.mean(c > 0.5), np.mean(f <= 0.5)
        couples = np.mean(c[:, None] > f[None]) + np.mean(c[:, None] == f[None]) / 2
        wanted = [np.mean(c > f), p_c, p_f, (p_c + p_f) / 2, min(p_c, p_f), couples]
        assert [entry["image"][key] for key in pairs.METRICS] == pytest.approx(wanted)
        assert entry["num_items"] == len(c) and entry["image"]["num_undefined"] == 0
        low, high = entry["image"]["acc_r_interval"]
        error = np.sqrt(wanted[0] * (1 - wanted[0]) / len(c))
        assert low < wanted[0] < high and high - low == pytest.approx(3.92 * error, rel=0.15)
        macro.append(wanted)
    wanted = np.mean(macro[:-1], axis=0)
    assert [summary["macro"]["image"][key] for key in pairs.METRICS] == pytest.approx(wanted)


def random_pairs(num_pairs):
    return [Pair(str(i), f"piece{i % 3}", "1.jpg", "a", "b") for i in range(num_pairs)]


def test_metrics_on_made_up_pairs():
    check_extremes(random_pairs(60))
    check_against_numpy(random_pairs(900))


def test_undefined_pairs_are_left_out():
    scores = np.array([[0.9, 0.1], [np.nan, np.nan], [0.2, 0.3], [0.6, 0.6]])
    metrics = pairs.summarise(scored(random_pairs(4)[:1] * 4, scores), ITM)["micro"]["image"]
    assert metrics["acc_r"] == pytest.approx(1 / 3) and metrics["num_undefined"] == 1
    assert metrics["p_c"] == pytest.approx(2 / 3) and metrics["p_f"] == pytest.approx(2 / 3)
    nothing = pairs.summarise(scored(random_pairs(1), [[np.nan, np.nan]]), ITM)
    assert all(nothing["macro"]["image"][key] is None for key in pairs.METRICS)


def test_a_likelihood_has_no_threshold():
    scores = -np.random.default_rng(0).random((12, 2)) * 40
    metrics = pairs.summarise(scored(random_pairs(12), scores), Score("pll", False))["micro"]["image"]
    assert metrics["acc"] is metrics["p_c"] is metrics["p_f"] is metrics["min_p"] is None
    assert metrics["acc_r"] == np.mean(scores[:, 0] > scores[:, 1])


ITEM = {"mturk": {"caption": 3, "foil": 0, "other": 0}, "dataset": "made up", "original_split": "test"}


@pytest.fixture
def files(tmp_path):
    """Annotation files of both benchmarks, the names of photos as in COCO 2014, COCO 2017 and Visual7W."""
    names = ["COCO_val2014_000000000001.jpg", "000000000002.jpg", "COCO_train2014_000000000003.jpg", "v7w_99.jpg"]
    captions = [
        ("a red ball", "a red dog"), ("two dogs", "two cats"), ("a dog is on the ball", "a ball is on the dog"),
        ("no cat .", "the cat ."),
    ]  # fmt: skip
    existence, plurals, crepe = {}, {}, {}
    for i, (name, (caption, foil)) in enumerate(zip(names, captions, strict=True)):
        item = ITEM | {"image_file": name, "caption": caption, "foil": foil, "classes": i, "classes_foil": ["x", True]}
        (existence if i % 2 else plurals)[f"item{i}"] = item
        crepe[str(i)] = {"filename": name, "caption": caption, "negative_caption": foil}
    plurals["doubtful"] = ITEM | {
        "image_file": "absent.jpg", "caption": "a", "foil": "b", "mturk": {"caption": 1, "foil": 1, "other": 1}
    }  # fmt: skip
    for path, content in (("valse/existence", existence), ("valse/plurals", plurals), ("crepe/swap_obj", crepe)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / f"{path}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def folders(photos, tmp_path):
    """The photos in two folders, the Visual Genome one under its own name."""
    extra = tmp_path / "visual_genome"
    extra.mkdir()
    shutil.copy(photos / "000000000006.jpg", extra / "99.jpg")
    return [str(extra), str(photos)]


def command(task, run, annotations, folders, *more):
    return [task, "--checkpoint", str(run), "--annotations", str(annotations), "--images", *folders, *more]


def results_of(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("score", [None, "pll", "diff", "image-gain", "image-gain:pll"])
def test_valse_command(untrained_run, files, folders, tmp_path, capsys, score):
    more = ["--out", str(tmp_path / "out"), "--controls", "noise,shuffled", *(["--score", score] if score else [])]
    assert evaluate.main(command("valse", untrained_run, files / "valse", folders, *more)) == 0
    results = results_of(capsys)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["num_items"] == 4 and results["num_missing"] == 0 and results["num_invalid"] == 1
    assert results["score"] == {None: "pll-word-l2r", "image-gain": "image-gain:pll-word-l2r"}.get(score, score)
    assert results["is_default_score"] == (score is None)
    assert set(results["groups"]) == {"existence", "plurals"}
    assert set(results["macro"]) == {"image", "blank", "noise", "shuffled"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    rights = [line["right"] for line in lines]
    assert rights == [line["scores"]["image"][0] > line["scores"]["image"][1] for line in lines]
    assert results["micro"]["image"]["acc_r"] == np.mean(rights)
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "blank" in table and ("the default" in table) == (score is None)
    assert (results["micro"]["image"]["p_c"] is not None) == bool(score and score.startswith("image-gain"))
    assert (tmp_path / "out" / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_image_gain_is_the_difference(untrained_run, files, folders, tmp_path, capsys):
    lines = {}
    for score in ("pll", "image-gain:pll"):
        out = tmp_path / score.replace(":", "-")
        argv = command("sugarcrepe", untrained_run, files / "crepe", folders, "--score", score, "--out", str(out))
        assert evaluate.main(argv) == 0
        lines[score] = [json.loads(line)["scores"] for line in (out / "predictions.jsonl").read_text().splitlines()]
    for plain, gain in zip(lines["pll"], lines["image-gain:pll"], strict=True):
        assert gain["blank"] == plain["blank"]
        assert gain["image"] == pytest.approx(np.subtract(plain["image"], plain["blank"]), abs=2e-5)


def test_limit_takes_the_first_of_each_group(untrained_run, files, folders, tmp_path, capsys):
    argv = command("valse", untrained_run, files / "valse", folders, "--limit", "1", "--out", str(tmp_path / "out"))
    assert evaluate.main(argv) == 0
    assert {group: entry["num_items"] for group, entry in results_of(capsys)["groups"].items()} == {
        "existence": 1, "plurals": 1
    }  # fmt: skip


def test_missing_photos(untrained_run, files, photos, tmp_path, capsys):
    argv = command("valse", untrained_run, files / "valse", [str(photos)], "--out", str(tmp_path / "out"))
    assert evaluate.main(argv) == 2
    line = capsys.readouterr().err
    assert "1 of 4 photos" in line and "v7w_99.jpg" in line and "--allow-missing" in line
    assert not (tmp_path / "out").exists()
    assert evaluate.main([*argv, "--allow-missing"]) == 0
    results = results_of(capsys)
    assert (results["num_items"], results["num_missing"], results["missing_photos"]) == (3, 1, ["v7w_99.jpg"])
    assert "1 pairs left out, 1 photos missing" in (tmp_path / "out" / "table.txt").read_text()


def test_bad_input(untrained_run, files, folders, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "captions.json").write_text('{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}')
    (tmp_path / "broken.json").write_text("{")
    item = json.loads((files / "valse" / "plurals.json").read_text())["item0"]
    del item["foil"]
    (tmp_path / "lacking.json").write_text(json.dumps({"item": item}))
    damaged = tmp_path / "damaged"
    shutil.copytree(photos, damaged)
    (damaged / "000000000001.jpg").write_bytes(b"no picture")
    shutil.copy(photos / "000000000006.jpg", damaged / "99.jpg")
    before = sorted(tmp_path.iterdir())
    for task, annotations, where, more, says in (
        ("valse", files / "crepe", folders, [], ["swap_obj.json is a file of sugarcrepe", "evaluate it with"]),
        ("sugarcrepe", files / "valse", folders, [], ["existence.json is a file of valse"]),
        ("valse", tmp_path / "captions.json", folders, [], ["is a file of retrieval"]),
        ("valse", tmp_path / "lacking.json", folders, [], ["entry 'item' lacks foil"]),
        ("valse", tmp_path / "broken.json", folders, [], ["broken.json: not a JSON file"]),
        ("valse", tmp_path / "empty", folders, [], ["no .json file"]),
        ("valse", tmp_path / "absent", folders, [], ["absent: no such file or folder"]),
        ("valse", files / "valse", [str(tmp_path / "absent")], [], ["--images", "no such folder"]),
        ("valse", files / "valse", [str(tmp_path / "empty")], ["--allow-missing"], ["4 of 4 photos", "their folder"]),
        ("valse", files / "valse", [str(damaged)], [], ["000000000001.jpg: not an image", "replace it"]),
        ("valse", files / "valse", folders, ["--score", "itm"], ["image-text matching head", "--score pll-word-l2r"]),
        ("sugarcrepe", files / "crepe", folders, ["--score", "itc"], ["image-text contrast head"]),
        ("valse", files / "valse", folders, ["--score", "f1"], ["--score f1", "pll-word-l2r"]),
        ("valse", files / "valse", folders, ["--controls", "white"], ["--controls white", "noise"]),
        ("valse", files / "valse", folders, ["--limit", "0"], ["--limit 0"]),
        ("valse", files / "valse", folders, ["--max-tokens", "999"], ["--max-tokens 999", "64"]),
    ):
        argv = command(task, untrained_run, annotations, where, "--out", str(tmp_path / "out"), *more)
        assert evaluate.main(argv) == 2, argv
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert all(word in lines[0] for word in says), lines[0]
    assert sorted(tmp_path.iterdir()) == before, "nothing half-written"
