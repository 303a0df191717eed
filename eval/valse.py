"""VALSE (Parcalabescu et al., arXiv 2112.07566): which linguistic phenomena does the model ground?

    python eval/run.py valse --checkpoint runs/noun --annotations valse/data --images val2014 val2017 visual7w swig

--annotations is a piece's JSON file, or a folder of them. Items whose caption fewer than two of three annotators chose
are left out, as the benchmark does.
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

MIN_VOTES = 2  # of three annotators, for the caption


def read(annotations: str) -> tuple[list[Pair], int]:
    """(valid pairs of a file or folder, number of items left out as not valid); the piece is the file's name.

    Raises ValueError for another format.
    """
    found, num_invalid = [], 0
    for path in json_files(annotations):
        for name, entry in read_entries(path, "valse")[1].items():
            if entry["mturk"]["caption"] >= MIN_VOTES:
                found.append(Pair(name, path.stem, entry["image_file"], entry["caption"], entry["foil"]))
            else:
                num_invalid += 1
    return found, num_invalid


def evaluate(model: PosMaskModel, run: Path, config: dict, args: argparse.Namespace) -> Outcome:
    """Scores every valid item of --annotations."""
    score = Score.parse(args.score, has_head(model, "itm"))
    found, num_invalid = read(args.annotations)
    scored = pairs.score_pairs(model, run, config, args, pairs.take(found, args.limit), score)
    extra = {"num_invalid": num_invalid}
    return pairs.report("valse", run, args.annotations, scored, score, args.score is None, extra)
