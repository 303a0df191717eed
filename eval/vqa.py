"""VQA v2 (Goyal et al., arXiv 1612.00837): accuracy by answer type, by question type and by what a question asks for.

    python eval/run.py vqa --checkpoint runs/noun --annotations v2_mscoco_val2014_annotations.json --predictions FILE

--predictions is a file in the official results format, [{"question_id": 1, "answer": "yes"}, ...], --blank-predictions
one that the same model made with a blank image. Accuracy and normalisation are those of the official evaluator, quirks
included.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from posmask.eval.annotations import read_entries, read_json
from posmask.eval.results import Outcome, draw_bars, percent, percent_interval, render
from posmask.eval.stats import rate
from posmask.train.model import PosMaskModel

MEASURE = "accuracy"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The evaluator means "a period that is not in a number", but its look-behind is written as a look-ahead that always
# holds. It also passes re.UNICODE where the number of replacements belongs, which is 32.
PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = int(re.UNICODE)
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
# Restored where one apostrophe is missing. Those whose bare form is another word (we'll, it's, she'd) are not on the
# evaluator's list.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTED.split() for i in range(len(word)) if word[i] == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the evaluator

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


def normalise(answer: str) -> str:
    """An answer as the official evaluator compares it (processPunctuation, then processDigitArticle)."""
    text = answer
    has_number = COMMA_IN_NUMBER.search(answer) is not None
    for character in PUNCTUATION:
        beside_space = character + " " in answer or " " + character in answer
        text = text.replace(character, "" if beside_space or has_number else " ")
    text = PERIOD.sub("", text, count=MAX_PERIODS)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy of an answer given N human ones: the mean over the N sets of N - 1 of min(1, matches / 3).

    Normalised only where the humans do not all agree to the letter, as in the official evaluator.
    """
    prediction, *answers = (one.replace("\n", " ").replace("\t", " ").strip() for one in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = map(normalise, (prediction, *answers))
    matches, total = answers.count(prediction), len(answers)
    # A set without one of the matching answers has one match less.
    return (matches * min(1, (matches - 1) / 3) + (total - matches) * min(1, matches / 3)) / total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    parser.add_argument("--annotations", required=True, metavar="PATH", help="VQA v2 annotations (answers)")
    parser.add_argument("--questions", metavar="PATH", help="VQA v2 questions, to be written beside the answers")
    parser.add_argument("--predictions", metavar="PATH", help="answers in the official results format")
    parser.add_argument("--blank-predictions", metavar="PATH", help="answers of the same model to a blank image")
    parser.add_argument("--allow-missing", action="store_true", help="leave out questions without a prediction")


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


def evaluate(model: PosMaskModel, run: Path, config: dict, args: argparse.Namespace) -> Outcome:
    """Accuracies of the answers in --predictions."""
    if args.predictions is None:
        raise ValueError(
            f"{run} has no answer head: give its answers with --predictions FILE, in the official results format"
        )
    annotations = read(args.annotations)
    answers = {"image": read_predictions(args.predictions, "--predictions", annotations, args.allow_missing)}
    if args.blank_predictions:
        given = read_predictions(args.blank_predictions, "--blank-predictions", annotations, args.allow_missing)
        answers["blank"] = given
    answered = [key for key in annotations if all(key in given for given in answers.values())]
    questions = {}
    if args.questions:
        content = read_json(Path(args.questions), "--questions")
        if not isinstance(content, dict) or "questions" not in content:
            raise ValueError(f"--questions {args.questions}: not a file of VQA questions")
        questions = {entry["question_id"]: entry["question"] for entry in content["questions"]}
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
    return Outcome(results, predictions, make_table(title, results), lambda figure: draw(figure, results, title))


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
