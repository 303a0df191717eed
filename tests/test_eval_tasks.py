"""Every task as a user runs it, on the built-in scenes and on real photos."""

import json
from pathlib import Path

import pytest

from posmask.eval import run as evaluate

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_photos"
absent = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no {PHOTOS}")
real = pytest.param("real", marks=[pytest.mark.real_data, absent])
COMMON = {"format", "task", "run", "step", "mask", "data", "num_items", "num_missing"}


@pytest.fixture
def evaluated(untrained_run, scenes, tmp_path, capsys):
    """Runs a task on the files of a source: evaluated(source, task, annotations, *more) → results, predictions."""

    def go(source, task, annotations, *more):
        folder = scenes / "eval" if source == "scenes" else PHOTOS
        out = tmp_path / task
        argv = [task, "--checkpoint", str(untrained_run), "--annotations", str(folder / annotations), "--out", str(out)]
        argv += [] if task == "vqa" else ["--images", str(folder / "val2017")]
        assert evaluate.main([*argv, *more]) == 0, capsys.readouterr().err
        results = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert results == json.loads((out / "results.json").read_text()) and results.keys() >= COMMON
        assert (results["run"], results["step"], results["task"]) == (str(untrained_run), 7, task)
        assert (out / "plot.png").stat().st_size > 5000 and (out / "table.txt").read_text().startswith(f"{task} of ")
        lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        assert len(lines) == results["num_items"] > 0 and results["num_missing"] == 0
        return results, lines

    return go


@pytest.mark.parametrize("source", ["scenes", real])
def test_valse(evaluated, source):
    results, lines = evaluated(source, "valse", "valse", "--limit", "6")
    if source == "real":
        assert {name: entry["num_items"] for name, entry in results["groups"].items()} == {
            "coreference-standard": 1, "foil-it": 5, "plurals": 6, "relations": 6
        }  # fmt: skip
    else:
        assert len(results["groups"]) == 11
        blank = results["micro"]["blank"]["acc_r"]
        assert blank == 0.5, "each string is as often caption as foil, so text alone is at chance"
    assert all(line["scores"].keys() == {"image", "blank"} for line in lines)


@pytest.mark.parametrize("source", ["scenes", real])
def test_sugarcrepe(evaluated, source):
    results, _ = evaluated(source, "sugarcrepe", "sugarcrepe", "--limit", "4", "--score", "image-gain:pll")
    assert {name: entry["num_items"] for name, entry in results["groups"].items()} == dict.fromkeys(
        ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"), 4
    )


def test_foil(evaluated):
    results, _ = evaluated("scenes", "foil", "foil/foilv1.0_test_2017.json", "--limit", "10")
    assert results["num_not_located"] == 0 and results["num_slots_tagged_noun"] == 10
    assert results["tasks"]["t1_pairwise"]["blank"]["accuracy"] == 0.5


@pytest.mark.parametrize("source", ["scenes", real])
def test_vqa(evaluated, scenes, tmp_path, source):
    folder = scenes / "eval" if source == "scenes" else PHOTOS
    annotations = json.loads((folder / "v2_annotations.json").read_text())["annotations"]
    answers = [{"question_id": e["question_id"], "answer": e["multiple_choice_answer"]} for e in annotations]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    more = ["--predictions", str(tmp_path / "answers.json"), "--questions", str(folder / "v2_OpenEnded_questions.json")]
    results, lines = evaluated(source, "vqa", "v2_annotations.json", *more)
    accuracy = results["overall"]["image"]["accuracy"]
    assert accuracy == 1 if source == "scenes" else 0.8 < accuracy < 1, "humans do not all agree on real photos"
    assert all(line["question"].endswith("?") for line in lines[:20])
