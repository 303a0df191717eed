"""VQA accuracy against its definition, the official normalisation, readers and report."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from posmask.eval import run as evaluate
from posmask.eval import vqa
from posmask.prep.answers import PUNCTUATION, accuracy, normalise

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_photos"


def by_definition(prediction, answers):
    """Mean over the sets that leave one human out of min(1, matches / 3); normalised unless all are the same."""
    if len({answer.strip() for answer in answers}) > 1:
        prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    sets = itertools.combinations(answers, len(answers) - 1)
    return np.mean([min(1, sum(answer == prediction for answer in others) / 3) for others in sets])


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("a.b", "ab"),
        ("t-shirt", "t shirt"),
        ("1,000-2", "10002"),
        ("12/25", "12 25"),
        ("Two", "2"),
        ("none", "0"),
        ("The  Red\tBall", "red ball"),
        ("an apple, a pear", "apple pear"),
        ("3.5", "3.5"),  # a period before a digit stays
        ("5.", "5"),
        (".5.", ".5"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("shouldntve", "shouldntve"),  # only one apostrophe may be missing
        ("shouldnt've", "shouldn't've"),
        ("somebody'd", "somebodyd"),  # the wrong way round, as in the evaluator
        ("well", "well"),
        ("its", "its"),
        ("yes/no", "yes no"),
        ("yes / no", "yes no"),
        ("left- right-", "left right"),  # beside a space once, it goes everywhere
        ("a:b", "a:b"),  # a colon is no punctuation to it
        ("x" + "." * 40, "x" + "." * 8),  # 32 periods at most
        ("$5", "$5"),
    ],
)
def test_normalisation(answer, normal):
    assert normalise(answer) == normal


def test_accuracy_by_number_of_matches():
    for matches, wanted in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        answers = ["cat"] * matches + [f"other{i}" for i in range(10 - matches)]
        assert accuracy("cat", answers) == pytest.approx(wanted)


def test_accuracy_of_random_answer_sets():
    rng = random.Random(0)
    words = ("yes", "Yes", "no", "two", "2", "a cat", "cat", "t-shirt", "t shirt", "1,000", "dont", "don't", "x.")
    seen = set()
    for _ in range(3000):
        answers = [rng.choice(words[: rng.randint(1, len(words))]) for _ in range(10)]
        prediction = rng.choice(words)
        wanted = by_definition(prediction, answers)
        assert accuracy(prediction, answers) == pytest.approx(wanted)
        seen.add(round(float(wanted), 6))
    assert seen == {0, 0.3, 0.6, 0.9, 1}


def test_nothing_is_normalised_where_all_agree():
    assert accuracy("2", ["two"] * 10) == 0
    assert accuracy("2", ["two"] * 9 + ["three"]) == 1
    assert accuracy("two\n", ["two"] * 9 + ["\ttwo"]) == 1


def test_65_question_types_in_groups():
    assert len(vqa.GROUP_OF) == sum(map(len, vqa.GROUPS.values())) == 65
    assert len(PUNCTUATION) == len(set(PUNCTUATION)) == 21


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")
def test_the_real_questions():
    annotations = vqa.read(str(DATA / "v2_annotations.json"))
    assert len(annotations) == 90
    rng = random.Random(1)
    everything = [answer["answer"] for entry in annotations.values() for answer in entry["answers"]]
    for entry in annotations.values():
        answers = [answer["answer"] for answer in entry["answers"]]
        assert len(answers) == 10 and entry["answer_type"] in vqa.ANSWER_TYPES
        for prediction in {*answers, entry["multiple_choice_answer"], *rng.sample(everything, 5)}:
            assert accuracy(prediction, answers) == pytest.approx(by_definition(prediction, answers))


KINDS = (("is the", "yes/no"), ("how many", "number"), ("what color is the", "other"), ("none of the above", "other"))


@pytest.fixture
def files(tmp_path):
    """40 questions of four types whose humans all agree, ten of each; a model right in 8, 6, 4 and 2 of them."""
    annotations, questions, answers, blank = [], [], [], []
    for i in range(40):
        kind, answer_type = KINDS[i % 4]
        humans = [{"answer": "right", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
        annotations.append({
            "question_id": 100 + i, "image_id": i, "question_type": kind, "answer_type": answer_type,
            "multiple_choice_answer": "right", "answers": humans,
        })  # fmt: skip
        questions.append({"question_id": 100 + i, "image_id": i, "question": f"{kind} {i}?"})
        answers.append({"question_id": 100 + i, "answer": "right" if i // 4 < 8 - 2 * (i % 4) else "wrong"})
        blank.append({"question_id": 100 + i, "answer": "right" if i < 4 else "wrong"})
    contents = {
        "annotations": {"annotations": annotations}, "questions": {"questions": questions}, "answers": answers,
        "blank": blank, "some": answers[:39], "twice": [*answers, answers[0]], "odd": [{"question_id": 1}],
        "strange": [*answers, {"question_id": 1, "answer": "x"}],
        "types": {"annotations": [annotations[0] | {"question_type": "whence"}]},
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def command(run, files, annotations, predictions, *more):
    argv = ["vqa", "--checkpoint", str(run), "--annotations", str(files / f"{annotations}.json")]
    argv += ["--out", str(files / "out"), *more]
    return argv + (["--predictions", str(files / f"{predictions}.json")] if predictions else [])


def test_report(untrained_run, files, capsys):
    more = ["--questions", str(files / "questions.json"), "--blank-predictions", str(files / "blank.json")]
    assert evaluate.main(command(untrained_run, files, "annotations", "answers", *more)) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["num_items"] == 40 and results["num_missing"] == 0

    def accuracies(part, name="image"):
        return {key: entry[name]["accuracy"] for key, entry in results[part].items()}

    assert accuracies("question_types") == {
        "what color is the": 0.4, "how many": 0.6, "is the": 0.8, "none of the above": 0.2
    }  # fmt: skip
    assert accuracies("answer_types") == pytest.approx({"yes/no": 0.8, "number": 0.6, "other": 0.3})
    assert accuracies("groups")["attribute/colour"] == 0.4 and accuracies("groups")["other yes/no"] == 0.8
    assert results["overall"]["image"]["accuracy"] == 0.5 and results["overall"]["blank"]["accuracy"] == 0.1
    low, high = results["overall"]["image"]["interval"]
    assert low < 0.5 < high and high - low == pytest.approx(3.92 * 0.5 / 40**0.5, rel=0.15)
    lines = [json.loads(line) for line in (files / "out" / "predictions.jsonl").read_text().splitlines()]
    assert lines[5]["question"] == "how many 5?" and lines[5]["answer"] == {"image": "right", "blank": "wrong"}
    table = (files / "out" / "table.txt").read_text()
    assert "+40.0" in table and "none of the above" in table
    assert (files / "out" / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input(untrained_run, files, capsys):
    for annotations, predictions, more, says in (
        ("annotations", None, [], ["no answer head", "--predictions FILE"]),
        ("annotations", "some", [], ["1 of 40 questions", "--allow-missing"]),
        ("annotations", "twice", [], ["answers a question twice"]),
        ("annotations", "odd", [], ["must be a list of"]),
        ("annotations", "strange", [], ["question 1 is not in --annotations"]),
        ("annotations", "absent", [], ["--predictions", "absent.json", "No such file"]),
        ("questions", "answers", [], ["is no file of vqa"]),
        ("types", "answers", [], ["'whence'", "65"]),
        ("absent", "answers", [], ["absent.json: no such file"]),
        ("annotations", "answers", ["--questions", str(files / "blank.json")], ["not a file of VQA questions"]),
    ):
        assert evaluate.main(command(untrained_run, files, annotations, predictions, *more)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and all(word in lines[0] for word in says), lines
        assert not (files / "out").exists()
    assert evaluate.main(command(untrained_run, files, "annotations", "some", "--allow-missing")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_missing"] == 1
