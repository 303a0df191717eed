"""SugarCrepe (Hsieh et al., arXiv 2306.14610), and other sets in its layout: does the true caption beat the negative?

    python eval/run.py sugarcrepe --checkpoint runs/noun --annotations sugarcrepe/data --images val2017

--annotations is a category's JSON file, or a folder of them: entries of filename, caption, negative_caption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from posmask.eval import pairs
from posmask.eval.annotations import json_files, read_entries
from posmask.eval.pairs import MEASURE, Pair, add_arguments, item_value
from posmask.eval.results import Outcome
from posmask.eval.scoring import Score, has_head
from posmask.train.model import PosMaskModel

__all__ = ["MEASURE", "add_arguments", "evaluate", "item_value", "read"]


def read(annotations: str) -> list[Pair]:
    """The pairs of a file or folder; the category is the name of the file. Raises ValueError for another format."""
    found = []
    for path in json_files(annotations):
        for name, entry in read_entries(path, "sugarcrepe")[1].items():
            photo = entry.get("filename", entry.get("image"))
            if photo is None:
                raise ValueError(f"--annotations {path}: entry {name!r} lacks 'filename', the name of its photo")
            found.append(Pair(name, path.stem, photo, entry["caption"], entry["negative_caption"]))
    return found


def evaluate(model: PosMaskModel, run: Path, config: dict, args: argparse.Namespace) -> Outcome:
    """Scores every pair of --annotations."""
    score = Score.parse(args.score, has_head(model, "itm"))
    scored = pairs.score_pairs(model, run, config, args, pairs.take(read(args.annotations), args.limit), score)
    return pairs.report("sugarcrepe", run, args.annotations, scored, score, args.score is None, {})
