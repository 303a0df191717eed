"""VQA v2 (Goyal et al., arXiv 1612.00837): accuracy by answer type, by question type and by what a question asks for.

    python eval/run.py vqa --checkpoint runs/noun-vqa --questions Q.json --annotations A.json --images val2014
    python eval/run.py vqa --checkpoint runs/noun --annotations A.json --predictions FILE

A model that train/finetune.py gave an answer head answers each question twice, with its image and with a blank one; the
answers are also written in the official results format, [{"question_id": 1, "answer": "yes"}, ...], to
official_results.json and official_results_blank.json. Answers of another model in that format are read with
--predictions and --blank-predictions. Accuracy is that of the official evaluator.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from posmask.eval.annotations import read_entries, read_json
from posmask.eval.photos import PhotoEncoder, PhotoFolders
from posmask.eval.results import Outcome, draw_bars, percent, percent_interval, render
from posmask.eval.scoring import Encoder, batches, conditions, encode
from posmask.eval.stats import rate
from posmask.prep.answers import accuracy
from posmask.train.model import PosMaskModel

MEASURE = "accuracy"
ANSWER_TYPES = ("yes/no", "number", "other")
# The 64 prefixes by which VQA sorts questions, and the rest, by what is asked for.
GROUPS = {
    "object": (
        "what", "what is", "what is the", "what are", "what are the", "what is this", "what animal is", "what kind of",
        "what type of", "what brand", "what is the name", "what room is", "who is", "which",
    ),
    "attribute/colour": (
        "what color", "what color is", "what color is the", "what color are the", "what is the color of the",
    ),
    "count": ("how many", "how many people are", "how many people are in", "what number is"),
    "activity": ("what sport is", "what is the man", "what is the woman", "what is the person", "what does the"),
    "location/relation": ("where is the", "where are the", "what is on the", "what is in the"),
    "existence": ("is there", "is there a", "are there", "are there any"),
    "other yes/no": (
        "is", "is the", "is this", "is this a", "is this an", "is this person", "is it", "is he", "is that a",
        "is the man", "is the woman", "is the person", "are", "are the", "are these", "are they", "do", "do you",
        "does the", "does this", "can you", "could", "has", "was",
    ),
    "other": ("how", "why", "why is the", "what time", "none of the above"),
}  # fmt: skip
GROUP_OF = {kind: group for group, kinds in GROUPS.items() for kind in kinds}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    parser.add_argument("--annotations", required=True, metavar="PATH", help="VQA v2 annotations (answers)")
    parser.add_argument("--questions", metavar="PATH", help="VQA v2 questions, to be answered")
    parser.add_argument("--images", nargs="+", metavar="DIR", help="folders to look for photos in")
    parser.add_argument("--predictions", metavar="PATH", help="answers in the official results format, of any model")
    parser.add_argument("--blank-predictions", metavar="PATH", help="answers of the same model to a blank image")
    parser.add_argument("--allow-missing", action="store_true", help="leave out questions without photo or prediction")


def item_value(prediction: dict) -> tuple[str, str, float | None]:
    """(question group, question, accuracy) of a line of predictions.jsonl, for comparisons."""
    return prediction["group"], str(prediction["id"]), prediction["accuracy"]["image"]


def read(annotations: str) -> dict[int, dict]:
    """Annotations by question_id. Raises ValueError for another format or an unknown question type."""
    path = Path(annotations)
    if not path.is_file():
        raise ValueError(f"--annotations {annotations}: no such file")
    found = {}
    for entry in read_entries(path, "vqa")[1].values():
        if entry["question_type"] not in GROUP_OF:
            raise ValueError(
                f"--annotations {path}: question {entry['question_id']} is of the unknown type "
                f"{entry['question_type']!r}; it must be one of VQA's {len(GROUP_OF)}"
            )
        found[entry["question_id"]] = entry
    return found


def read_predictions(path: str, flag: str, wanted: dict[int, dict], allow_missing: bool) -> dict[int, str]:
    """Answers by question_id. Raises ValueError for another format, a stranger's answers, or missing ones."""
    content = read_json(Path(path), flag)
    if not isinstance(content, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("answer"), str) and "question_id" in entry for entry in content
    ):
        raise ValueError(f'{flag} {path}: must be a list of {{"question_id": number, "answer": text}}')
    answers = {entry["question_id"]: entry["answer"] for entry in content}
    if len(answers) < len(content):
        raise ValueError(f"{flag} {path}: answers a question twice")
    if strange := [key for key in answers if key not in wanted]:
        raise ValueError(f"{flag} {path}: question {strange[0]} is not in --annotations; they are of different splits")
    missing = len(wanted) - len(answers)
    if missing and (not allow_missing or not answers):
        raise ValueError(
            f"{flag} {path}: {missing} of {len(wanted)} questions have no answer; answer them, or leave them out with "
            "--allow-missing"
        )
    return answers


def read_questions(path: str) -> dict[int, str]:
    """Questions by question_id. Raises ValueError for another format."""
    content = read_json(Path(path), "--questions")
    try:
        return {entry["question_id"]: entry["question"] for entry in content["questions"]}
    except (KeyError, TypeError):
        raise ValueError(f"--questions {path}: not a file of VQA questions") from None


def find_answers(
    model: PosMaskModel, run: Path, config: dict, args: argparse.Namespace, annotations: dict[int, dict],
    questions: dict[int, str],
) -> dict[str, dict[int, str]]:  # fmt: skip
    """{"image": {question_id: answer}, "blank": …}, of the model or of the files that --predictions names.

    Raises ValueError for a model without an answer head, and for what it lacks to answer.
    """
    if args.predictions:
        files = {"image": ("--predictions", args.predictions), "blank": ("--blank-predictions", args.blank_predictions)}
        given = {name: pair for name, pair in files.items() if pair[1]}
        return {
            name: read_predictions(path, flag, annotations, args.allow_missing) for name, (flag, path) in given.items()
        }
    if model.vqa is None:
        raise ValueError(
            f"{run} has no answer head: fine-tune it with train/finetune.py --task vqa --init {run}, or give its "
            "answers with --predictions FILE, in the official results format"
        )
    if not (args.questions and args.images):
        raise ValueError(f"to let {run} answer, give --questions FILE and --images DIR; or answers with --predictions")
    if lacking := [key for key in annotations if key not in questions]:
        raise ValueError(
            f"--questions {args.questions} lacks question {lacking[0]} of --annotations; they are of different splits"
        )
    asked: dict[str, list[int]] = {}
    for key, entry in annotations.items():
        asked.setdefault(photo_name(entry["image_id"]), []).append(key)
    folders = PhotoFolders(args.images)
    for name in folders.missing(asked, args.allow_missing):
        del asked[name]
    return answer(model, run, asked, questions, PhotoEncoder(model, folders, config["decode"]))


def photo_name(image_id: int) -> str:
    """As COCO 2017 names it; `PhotoFolders` finds it under the other names too."""
    return f"{int(image_id):012d}.jpg"


def answer(
    model: PosMaskModel, run: Path, asked: dict[str, list[int]], questions: dict[int, str], photos: PhotoEncoder
) -> dict[str, dict[int, str]]:
    """The model's answers to the questions `asked` of each photo, with the photo and with a blank one."""
    encoder, names = Encoder(run, model), list(asked)
    answers: dict[str, dict[int, str]] = {"image": {}, "blank": {}}
    for window, features in photos.windows(names):
        shown = conditions(model, features, ("blank",), seed=0)
        keys = [key for name in names[window] for key in asked[name]]
        image_of = np.repeat(np.arange(len(features)), [len(asked[name]) for name in names[window]])
        texts = encoder([questions[key] for key in keys])
        for rows in batches([len(text.ids) for text in texts]):
            text_TD, packing = encode(model, [texts[i].ids for i in rows])
            own = torch.from_numpy(image_of[rows]).to(text_TD.device, torch.int32)
            for name, image_BND in shown.items():
                image = own if name == "image" else torch.zeros_like(own)
                best = model.answer(text_TD, packing, image_BND, image).argmax(1).tolist()
                answers[name] |= {keys[i]: model.config.answers[k] for i, k in zip(rows, best, strict=True)}
    return answers


def evaluate(model: PosMaskModel, run: Path, config: dict, args: argparse.Namespace) -> Outcome:
    """Accuracies of the model's answers, or of those in --predictions."""
    annotations = read(args.annotations)
    questions = read_questions(args.questions) if args.questions else {}
    answers = find_answers(model, run, config, args, annotations, questions)
    answered = [key for key in annotations if all(key in given for given in answers.values())]
    predictions = []
    for key in answered:
        entry = annotations[key]
        human = [answer["answer"] for answer in entry["answers"]]
        predictions.append({
            "id": key, "image_id": entry["image_id"], "question": questions.get(key), "group":
            GROUP_OF[entry["question_type"]], "question_type": entry["question_type"],
            "answer_type": entry["answer_type"], "truth": entry["multiple_choice_answer"],
            "answer": {name: given[key] for name, given in answers.items()},
            "accuracy": {name: accuracy(given[key], human) for name, given in answers.items()},
        })  # fmt: skip
    results = {"data": args.annotations, "num_items": len(answered), "num_missing": len(annotations) - len(answered)}
    results |= summarise(predictions, tuple(answers))
    title = f"vqa of {run}, {len(answered):,} questions of {args.annotations}; 95 % intervals over questions"
    if results["num_missing"]:
        title += f"\n{results['num_missing']:,} questions without an answer are left out"
    files = {} if args.predictions else official_files(answers)
    return Outcome(results, predictions, make_table(title, results), lambda figure: draw(figure, results, title), files)


def official_files(answers: dict[str, dict[int, str]]) -> dict[str, list[dict]]:
    """Answers as the official evaluation server takes them, one file a condition."""
    names = {"image": "official_results.json", "blank": "official_results_blank.json"}
    return {
        names[name]: [{"question_id": key, "answer": text} for key, text in given.items()]
        for name, given in answers.items()
    }


def summarise(predictions: list[dict], names: tuple[str, ...]) -> dict:
    """Accuracy overall, by answer type, by group and by question type; each {condition: rate}."""

    def rates(chosen: list[dict]) -> dict:
        return {name: rate([item["accuracy"][name] for item in chosen]) for name in names}

    def by(key: str, order: Sequence[str]) -> dict:
        parts = {value: [item for item in predictions if item[key] == value] for value in order}
        return {value: rates(chosen) for value, chosen in parts.items() if chosen}

    return {
        "overall": rates(predictions),
        "answer_types": by("answer_type", ANSWER_TYPES),
        "groups": by("group", tuple(GROUPS)),
        "question_types": by("question_type", tuple(GROUP_OF)),
    }


def rows_of(results: dict) -> list[tuple[str, dict]]:
    rows = [("overall", results["overall"])]
    for key in ("answer_types", "groups", "question_types"):
        rows += [(f"  {name}" if key == "question_types" else name, entry) for name, entry in results[key].items()]
    return rows


def make_table(title: str, results: dict) -> str:
    """One row a kind of question: overall, answer types, groups, question types."""
    names = tuple(results["overall"])
    header = ["questions", "number"]
    for name in names:
        header += ["accuracy" if name == "image" else f"{name} image", "95 %"]
    if len(names) > 1:
        header.append("gain")
    rows = []
    for label, entry in rows_of(results):
        row = [label, f"{entry['image']['num_items']:,}"]
        for name in names:
            row += [percent(entry[name]["accuracy"]), percent_interval(entry[name]["interval"])]
        if len(names) > 1:
            row.append(f"{100 * (entry['image']['accuracy'] - entry['blank']['accuracy']):+.1f}")
        rows.append(row)
    return render(title, header, rows)


def draw(figure: Figure, results: dict, title: str) -> None:
    """Accuracy overall, by answer type and by group."""
    rows = [("overall", results["overall"]), *results["answer_types"].items(), *results["groups"].items()]
    draw_bars(figure, title, rows, "VQA accuracy [%]", [])
