"""Evaluate a checkpoint: `python eval/run.py TASK --checkpoint RUN[@STEP]`, or compare runs that were evaluated.

    python eval/run.py probe --checkpoint runs/noun
    python eval/run.py probe --checkpoint runs/noun@100 --data data/scenes/val --all-at-once
    python eval/run.py valse --checkpoint runs/noun --annotations valse/data --images val2014 val2017 visual7w swig
    python eval/run.py compare runs/matched-noun runs/noun --task valse

Each task writes results.json, predictions.jsonl, table.txt and plot.png to --out (RUN/eval/TASK), prints its table, and
last of all results.json on one line. Exit codes: 0 done, 2 wrong usage or input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from posmask.eval import foil, probe, retrieval, stats, sugarcrepe, valse, vqa
from posmask.eval.results import save
from posmask.train.checkpoint import load_model, parse_run

# name: a module with add_arguments(parser), evaluate(model, run, config, args) -> Outcome and, where runs can be
# compared, MEASURE and item_value(prediction) -> (group, item, value).
TASKS = {
    "probe": probe, "valse": valse, "foil": foil, "sugarcrepe": sugarcrepe, "vqa": vqa, "retrieval": retrieval,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv`."""
    parser = argparse.ArgumentParser(prog="run.py", description="Evaluate a checkpoint.", allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task_name", required=True, metavar="TASK")
    for name, module in TASKS.items():
        task = add_command(tasks, name, module)
        task.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder, or RUN@STEP")
        task.add_argument("--out", help="folder for the results (RUN/eval/TASK, with @STEP for a step)")
        module.add_arguments(task)
        task.set_defaults(command=run)
    comparison = add_command(tasks, "compare", stats)
    stats.add_arguments(comparison)
    comparison.set_defaults(command=compare)
    args = parser.parse_args(argv)
    try:
        args.command(args)
    except ValueError as error:
        print(f"{args.task_name}: {error}", file=sys.stderr)
        return 2
    return 0


def add_command(commands, name: str, module) -> argparse.ArgumentParser:
    """A sub-command that the first line of its module describes."""
    line = module.__doc__.splitlines()[0]
    return commands.add_parser(name, help=line, description=line, allow_abbrev=False)


def compare(args: argparse.Namespace) -> None:
    """Prints arms side by side, and last of all the numbers as JSON on one line."""
    table, results = stats.compare(args, TASKS)
    print(table, flush=True)
    print(json.dumps(results))


def run(args: argparse.Namespace) -> None:
    """Evaluates, writes the files and prints. Raises ValueError for what the user can mend."""
    folder, at = parse_run(args.checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, step = load_model(args.checkpoint, device)
    config = json.loads((folder / "config.json").read_text())
    with torch.inference_mode():
        outcome = TASKS[args.task_name].evaluate(model, folder, config, args)
    common = {"format": 1, "task": args.task_name, "run": str(folder), "step": step, "mask": config["mask"]}
    results = common | outcome.results
    name = args.task_name if at is None else f"{args.task_name}@{step}"
    out = Path(args.out) if args.out else folder / "eval" / name
    save(out, results, outcome)
    print(outcome.table)
    print(f"written to {out}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
