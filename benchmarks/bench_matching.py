"""Does image-text matching tell a caption from a foil? Accuracy on pairs of held-out scenes, and with a blank image.

    python benchmarks/bench_matching.py
    python benchmarks/bench_matching.py --mask random --init runs/noun

Trains --objectives mlm,itm on scenes (unless that has been done), beginning with a run that masks and no more: matching
stays at chance until the words of a caption find what they name in the image, and takes most of a step meanwhile. Then
ranks each VALSE-style caption against its foil by the score of the matching head. A blank image gets half of the pairs
by construction. A row goes to results/matching.json, and the last line printed is JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from studies import add_row, last_json, run, train_s

MASK = "noun@0.4+verb,adp,num@0.6"  # what the pairs turn on; of the rarer kinds all that a caption has
RESULTS = Path(__file__).parent / "results" / "matching.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mask", default=MASK)
    parser.add_argument("--init", type=Path, help="run to begin with (by default one of 1,000 steps is trained)")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--data", type=Path, default=Path("data/scenes"), help="with train/, val/ and eval/")
    parser.add_argument("--runs", type=Path, default=Path("runs/matching"))
    args = parser.parse_args()

    shared = ("--mask", args.mask, "--data", args.data / "train", "--val", args.data / "val", "--snapshots", 0,
              "--captions-per-image", 2, "--batch-size", 128, "--lr", 1e-3)  # fmt: skip
    init, out = args.init or args.runs / "mlm", args.runs / "mlm-itm"
    if args.init is None:
        run("train/pretrain.py", "--preset", "laptop", "--steps", 1000, "--out", init, *shared)
    run("train/finetune.py", "--task", "none", "--init", init, "--objectives", "mlm,itm", "--steps", args.steps,
        "--out", out, *shared)  # fmt: skip
    files = args.data / "eval"
    results = last_json(run("eval/run.py", "valse", "--checkpoint", out, "--score", "itm",
                            "--annotations", files / "valse", "--images", files / "val2017"))  # fmt: skip
    macro, groups = results["macro"], results["groups"]
    row = {
        "mask": args.mask, "init": init.name, "steps": args.steps,
        "pairs": results["num_items"],
        **{f"acc_r_{seen}": round(macro[seen]["acc_r"], 4) for seen in ("image", "blank")},
        "acc_r_interval": [round(end, 4) for end in macro["image"]["acc_r_interval"]],
        "groups": {name: round(group["image"]["acc_r"], 4) for name, group in groups.items()},
        "train_s": train_s(out),
    }  # fmt: skip
    add_row(RESULTS, row, key=("mask", "init", "steps"))


if __name__ == "__main__":
    main()
