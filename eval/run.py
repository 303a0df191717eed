"""Evaluate a checkpoint: `python eval/run.py TASK --checkpoint RUN[@STEP]`.

    python eval/run.py probe --checkpoint runs/noun
    python eval/run.py probe --checkpoint runs/noun@100 --data data/scenes/val --all-at-once

Each task writes results.json, predictions.jsonl, table.txt and plot.png to --out (RUN/eval/TASK), prints its table, and
last of all results.json on one line. Exit codes: 0 done, 2 wrong usage or input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from posmask.eval import probe
from posmask.eval.results import save
from posmask.train.checkpoint import load_model, parse_run

TASKS = {"probe": probe}  # name: a module with add_arguments(parser) and evaluate(model, run, args) -> Outcome


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv`."""
    parser = argparse.ArgumentParser(prog="run.py", description="Evaluate a checkpoint.", allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, module in TASKS.items():
        lines = module.__doc__.splitlines()
        task = tasks.add_parser(name, help=lines[0], description=lines[0], allow_abbrev=False)
        task.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder, or RUN@STEP")
        task.add_argument("--out", help="folder for the results (RUN/eval/TASK, with @STEP for a step)")
        module.add_arguments(task)
    args = parser.parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"{args.task}: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Evaluates, writes the files and prints. Raises ValueError for what the user can mend."""
    folder, at = parse_run(args.checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, step = load_model(args.checkpoint, device)
    config = json.loads((folder / "config.json").read_text())
    with torch.inference_mode():
        outcome = TASKS[args.task].evaluate(model, folder, config, args)
    common = {"format": 1, "task": args.task, "run": str(folder), "step": step, "mask": config["mask"]}
    results = common | outcome.results
    name = args.task if at is None else f"{args.task}@{step}"
    out = Path(args.out) if args.out else folder / "eval" / name
    save(out, results, outcome)
    print(outcome.table)
    print(f"written to {out}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
