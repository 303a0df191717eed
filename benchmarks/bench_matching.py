"""Does image-text matching tell a caption from a foil? Accuracy on pairs of held-out scenes, and with a blank image.

    python benchmarks/bench_matching.py
    python benchmarks/bench_matching.py --mask random --steps 1000

Trains --objectives mlm,itm on scenes (unless that has been done), and ranks each VALSE-style caption against its foil
by the score of the matching head. A blank image gets half of the pairs by construction. A row goes to
results/matching.json, and the last line printed is JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from studies import add_row, last_json, run, train_s

RESULTS = Path(__file__).parent / "results" / "matching.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mask", default="noun")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--captions-per-image", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("data/scenes"), help="with train/, val/ and eval/")
    parser.add_argument("--out", type=Path, default=Path("runs/matching"))
    args = parser.parse_args()

    run("train/pretrain.py", "--objectives", "mlm,itm", "--mask", args.mask, "--steps", args.steps,
        "--captions-per-image", args.captions_per_image, "--data", args.data / "train", "--val", args.data / "val",
        "--out", args.out, "--snapshots", 0)  # fmt: skip
    files = args.data / "eval"
    results = last_json(run("eval/run.py", "valse", "--checkpoint", args.out, "--score", "itm",
                            "--annotations", files / "valse", "--images", files / "val2017"))  # fmt: skip
    macro, groups = results["macro"], results["groups"]
    row = {
        "mask": args.mask, "steps": args.steps, "captions_per_image": args.captions_per_image,
        "pairs": results["num_items"],
        **{f"acc_r_{seen}": round(macro[seen]["acc_r"], 4) for seen in ("image", "blank")},
        "acc_r_interval": [round(end, 4) for end in macro["image"]["acc_r_interval"]],
        "groups": {name: round(group["image"]["acc_r"], 4) for name, group in groups.items()},
        "train_s": train_s(args.out),
    }  # fmt: skip
    add_row(RESULTS, row, key=("mask", "steps", "captions_per_image"))


if __name__ == "__main__":
    main()
