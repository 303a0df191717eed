"""Shards of questions hold what the annotation files say, and name what is wrong with them."""

import json
import shutil

import numpy as np
import pytest

from posmask.prep.answers import Answers, accuracy, normalise
from posmask.prep.build_shards import main
from posmask.prep.scenes import SceneQuestions, Scenes, jpeg_at
from posmask.prep.shards import Manifest
from posmask.train.loader import Shards


def command(scenes, out, *more, questions=None, annotations=None):
    files = scenes / "eval"
    argv = ["vqa", "--questions", str(questions or files / "v2_OpenEnded_questions.json"), "--annotations"]
    argv += [str(annotations or files / "v2_annotations.json"), "--images", str(files / "val2017"), "--out", str(out)]
    return [*argv, "--tokenizer", str(scenes / "train" / "tokenizer"), "--workers", "1", *more]


def read(scenes, name):
    return json.loads((scenes / "eval" / name).read_text())


def test_shards_hold_the_files(scenes, question_shards):
    questions = read(scenes, "v2_OpenEnded_questions.json")["questions"]
    annotations = {a["question_id"]: a for a in read(scenes, "v2_annotations.json")["annotations"]}
    shards = Shards((str(question_shards),))
    found = {}
    for i in range(len(shards)):
        sample = shards[i]
        assert len(sample["captions"]) == len(sample["question_ids"]) == len(sample["answers"])
        number = int(sample["key"].removesuffix(".jpg"))
        assert sample["image"] == (scenes / "eval" / "val2017" / f"{number:012d}.jpg").read_bytes()
        for asked in zip(sample["captions"], sample["question_ids"], sample["answers"], strict=True):
            found[asked[1]] = (number, *asked)
    assert len(found) == len(questions) == len(annotations)
    for question in questions:
        image, text, number, scores = found[question["question_id"]]
        assert (image, text, number) == (question["image_id"], question["question"], question["question_id"])
        humans = [answer["answer"] for answer in annotations[number]["answers"]]
        assert scores == {answer: accuracy(answer, humans) for answer in set(humans)}
    counts = Manifest.load(question_shards).counts
    wanted = [a["multiple_choice_answer"] for a in annotations.values()]
    assert counts["answers"] == {answer: wanted.count(answer) for answer in set(wanted)}
    assert list(counts["answers"].values()) == sorted(counts["answers"].values(), reverse=True)


def test_the_build_can_be_verified_and_repeated(scenes, question_shards, tmp_path, capsys):
    assert main(["verify", str(question_shards)]) == 0
    assert main(command(scenes, question_shards)) == 0
    assert "already complete" in capsys.readouterr().out
    again = tmp_path / "again"
    assert main([*command(scenes, again)[:-2], "--workers", "2", "--records-per-part", "4096"]) == 0
    assert (again / "part-00000.00000.mds").read_bytes() == (question_shards / "part-00000.00000.mds").read_bytes()


def test_scores_are_the_evaluators_accuracy():
    rng = np.random.default_rng(0)
    words = ("yes", "Yes", "no", "two", "2", "a cat", "cat", "t-shirt", "t shirt", "dont", "don't")
    for _ in range(500):
        humans = rng.choice(words[: rng.integers(1, len(words) + 1)], 10).tolist()
        answers = Answers.of(7, humans[0], humans)
        assert answers.most_common in answers.scores
        assert all(score == accuracy(answer, humans) > 0 for answer, score in answers.scores.items())
        alike = len(set(humans)) == 1
        assert set(answers.scores) == ({humans[0]} if alike else {normalise(human) for human in humans})


def test_names_of_coco_2014(scenes, tmp_path):
    folder = tmp_path / "images" / "train2014"
    folder.mkdir(parents=True)
    for path in sorted((scenes / "eval" / "val2017").iterdir()):
        shutil.copy(path, folder / f"COCO_train2014_{path.name}")
    content = read(scenes, "v2_OpenEnded_questions.json") | {"data_subtype": "train2014"}
    (tmp_path / "questions.json").write_text(json.dumps(content))
    argv = command(scenes, tmp_path / "out", questions=tmp_path / "questions.json")
    argv[argv.index("--images") + 1] = str(tmp_path / "images")
    assert main(argv) == 0
    shards = Shards((str(tmp_path / "out"),))
    assert len(shards) == len(list(folder.iterdir())) and shards[0]["key"] == "000000000001.jpg"


def test_scene_questions(scenes, tmp_path):
    out = tmp_path / "questions"
    argv = ["scene-questions", "--num-scenes", "60", "--tokenizer", str(scenes / "train" / "tokenizer"), "--out"]
    assert main([*argv, str(out), "--workers", "1"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["train", "val"], "evaluation files come with the captions"
    shards = Shards((str(out / "train"),))
    assert len(shards) == 60
    source = SceneQuestions("train", 60, 0)
    for i in (0, 31, 59):
        sample, record = shards[i], source[i]
        assert sample["captions"] == list(record.captions) and sample["key"] == Scenes("train", 60, 0)[i].key
        assert sample["answers"] == [answers.scores for answers in record.answers]
        assert sample["image"] == jpeg_at("train", 0, i)
    numbers = [number for i in range(60) for number in shards[i]["question_ids"]]
    assert len(set(numbers)) == len(numbers) > 120


@pytest.mark.parametrize(
    ("questions", "annotations", "says"),
    [
        (None, "captions_val2017.json", ["captions_val2017.json", "no file of VQA annotations", "multiple_choice"]),
        ("v2_annotations.json", None, ["v2_annotations.json", "no file of VQA questions"]),
        ("some", None, ["does not ask", "same splits"]),
        (None, "some", ["question", "same splits"]),
    ],
)
def test_files_of_something_else(scenes, tmp_path, capsys, questions, annotations, says):
    files = {"questions": "v2_OpenEnded_questions.json", "annotations": "v2_annotations.json"}
    some = {kind: read(scenes, name) for kind, name in files.items()}
    given = {}
    for kind, name in (("questions", questions), ("annotations", annotations)):
        if name == "some":
            (tmp_path / kind).write_text(json.dumps(some[kind] | {kind: some[kind][kind][:5]}))
        given[kind] = None if name is None else tmp_path / kind if name == "some" else scenes / "eval" / name
    assert main(command(scenes, tmp_path / "out", **given)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in says), lines
    assert not (tmp_path / "out").exists()


def test_missing_images(scenes, tmp_path, capsys):
    argv = command(scenes, tmp_path / "out")
    argv[argv.index("--images") + 1] = str(scenes / "train")
    assert main(argv) == 2
    assert "no image found" in capsys.readouterr().err
    folder = tmp_path / "images"
    shutil.copytree(scenes / "eval" / "val2017", folder)
    (folder / "000000000003.jpg").unlink()
    argv[argv.index("--images") + 1] = str(folder)
    assert main(argv) == 1
    assert "000000000003.jpg" in capsys.readouterr().err
