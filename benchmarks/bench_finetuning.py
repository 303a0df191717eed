"""Does fine-tuning learn to look? VQA accuracy of a run, with a blank image, and of its question-only twin.

    python benchmarks/bench_finetuning.py scenes --init runs/noun
    python benchmarks/bench_finetuning.py easy-vqa --steps 500

scenes: shards of scene questions, and files of held-out scenes to be asked about, both as build_shards.py writes them.
easy-vqa: the package of that name (pip install easy-vqa), training split against test split; its files are brought into
the format of VQA v2 first.
The twin is the same run with --blank-rate 1. Finished runs are not trained again. Rows go to results/finetuning.json,
and the last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from studies import add_row, last_json, run, train_s

from posmask.eval.vqa import GROUP_OF

RESULTS = Path(__file__).parent / "results" / "finetuning.json"
QUESTIONS, ANNOTATIONS, IMAGES = "questions.json", "annotations.json", "images"


def write_easy_vqa(split: str, out: Path) -> None:
    """Writes a split of easy-VQA in the format of VQA v2; ten humans give the one answer that it has."""
    package = find_spec("easy_vqa")
    if package is None:
        raise SystemExit("easy-vqa is not installed: pip install easy-vqa==1.0")
    source = Path(package.origin).parent / "data" / split
    (out / IMAGES).mkdir(parents=True, exist_ok=True)
    for path in sorted((source / "images").glob("*.png")):
        Image.open(path).convert("RGB").save(out / IMAGES / f"{int(path.stem):012d}.jpg", quality=95)
    asked, annotations = [], []
    kinds = sorted(GROUP_OF, key=len, reverse=True)
    for number, (question, answer, image) in enumerate(json.loads((source / "questions.json").read_text())):
        common = {"question_id": number, "image_id": image}
        asked.append({**common, "question": question})
        annotations.append({
            **common, "answers": [{"answer": answer, "answer_id": n} for n in range(1, 11)],
            "multiple_choice_answer": answer, "answer_type": "yes/no" if answer in ("yes", "no") else "other",
            "question_type": next((kind for kind in kinds if question.startswith(kind + " ")), "none of the above"),
        })  # fmt: skip
    (out / QUESTIONS).write_text(json.dumps({"questions": asked}))
    (out / ANNOTATIONS).write_text(json.dumps({"annotations": annotations}))


def prepare_easy_vqa(folder: Path, init: str | None) -> Path:
    """Shards of the training split, in the vocabulary of `init` if there is one; the test split stays files."""
    for split in ("train", "test"):
        if not (folder / split / ANNOTATIONS).is_file():
            write_easy_vqa(split, folder / split)
    files, shards = folder / "train", folder / ("shards" if init is None else f"shards-{Path(init).name}")
    tokenizer = f"{init}/tokenizer" if init else "train:256"
    run("prep/build_shards.py", "vqa", "--questions", files / QUESTIONS, "--annotations", files / ANNOTATIONS,
        "--images", files / IMAGES, "--out", shards, "--tokenizer", tokenizer)  # fmt: skip
    return shards


def measure(out: Path, shards: Path, asked: Sequence[object], flags: Sequence[object]) -> dict:
    """Trains (unless it has been) and evaluates one run: accuracies by condition, overall and by group."""

    def shares(rates: dict) -> dict[str, float]:
        return {name: round(rate["accuracy"], 4) for name, rate in rates.items()}

    run("train/finetune.py", "--task", "vqa", "--data", shards, "--out", out, "--snapshots", 0, *flags)
    results = last_json(run("eval/run.py", "vqa", "--checkpoint", out, *asked))
    return {
        "overall": shares(results["overall"]),
        "groups": {name: shares(rates) for name, rates in results["groups"].items()},
        "questions": results["num_items"],
        "train_s": train_s(out),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=("scenes", "easy-vqa"))
    parser.add_argument("--init", help="run to begin with; without one: new weights")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--shards", type=Path, default=Path("data/scene-questions/train"))
    parser.add_argument("--files", type=Path, default=Path("data/scenes/eval"), help="of scenes to be asked about")
    parser.add_argument("--data", type=Path, default=Path("data/easy-vqa"), help="where easy-VQA is prepared")
    parser.add_argument("--runs", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-twin", action="store_true", help="leave the question-only twin out")
    parser.add_argument("flags", nargs="*", help="further flags of finetune.py, after --, such as -- --mask noun")
    args = parser.parse_args()

    if args.set == "scenes":
        shards, files = args.shards, args.files
        asked = ("--questions", files / "v2_OpenEnded_questions.json", "--annotations", files / "v2_annotations.json",
                 "--images", files / "val2017")  # fmt: skip
    else:
        shards, files = prepare_easy_vqa(args.data, args.init), args.data / "test"
        asked = ("--questions", files / QUESTIONS, "--annotations", files / ANNOTATIONS, "--images", files / IMAGES)
    flags = ["--steps", args.steps, *(["--init", args.init] if args.init else []), *args.flags]
    init = Path(args.init).name if args.init else "new"
    words = [args.set, init, str(args.steps), *args.flags]
    name = "-".join(word.removeprefix("--") for word in words)
    seen = measure(args.runs / name, shards, asked, flags)
    row = {
        "set": args.set, "init": init, "steps": args.steps, "flags": args.flags, "questions": seen["questions"],
        "accuracy": seen["overall"]["image"], "accuracy_blank": seen["overall"]["blank"], "groups": seen["groups"],
        "train_s": seen["train_s"],
    }  # fmt: skip
    if not args.no_twin:
        twin = measure(args.runs / f"{name}-question-only", shards, asked, [*flags, "--blank-rate", 1])
        row["accuracy_question_only"] = twin["overall"]["blank"]
    add_row(args.results, row, key=("set", "init", "steps", "flags"))


if __name__ == "__main__":
    main()
