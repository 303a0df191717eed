"""Does an arm ground its own words? Trains each arm with images and text-only, and probes both on held-out scenes.

    python benchmarks/bench_grounding.py --arms noun --steps 800
    python benchmarks/bench_grounding.py --arms adj verb adp --steps 400
    python benchmarks/bench_grounding.py --arms num --steps 800 --captions-per-image 4

The text-only twin is the same run with --blank-rate 1: what an arm learns beyond it came from looking. All words of
the arm are masked at once, as in training. Finished runs are not trained again. Rows go to results/grounding.json,
and the last line printed is JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from studies import add_row, last_json, run, train_s

RESULTS = Path(__file__).parent / "results" / "grounding.json"


def measure(arm: str, steps: int, captions_per_image: int, blank_rate: float, runs: Path) -> dict:
    """Trains (unless it has been) and probes one run; the probe's entry for the arm's part of speech, and seconds."""
    name = f"{arm}-{steps}-{captions_per_image}" + ("-text-only" if blank_rate == 1 else "")
    run("train/pretrain.py", "--mask", arm, "--steps", steps, "--blank-rate", blank_rate,
        "--captions-per-image", captions_per_image, "--out", runs / name, "--snapshots", 0)  # fmt: skip
    probe = run("eval/run.py", "probe", "--checkpoint", runs / name, "--all-at-once", "--words-per-pos", 0)
    entry = last_json(probe)["pos"][arm]
    return {key: entry[key] for key in ("loss", "top1", "words")} | {"train_s": train_s(runs / name)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--captions-per-image", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/grounding"))
    args = parser.parse_args()
    for arm in args.arms:
        seen = measure(arm, args.steps, args.captions_per_image, 0.1, args.runs)
        blind = measure(arm, args.steps, args.captions_per_image, 1.0, args.runs)
        row = {
            "arm": arm,
            "steps": args.steps,
            "captions_per_image": args.captions_per_image,
            "words": seen["words"],
            "loss_image": round(seen["loss"]["image"], 4),
            "loss_blank": round(seen["loss"]["blank"], 4),
            "loss_other": round(seen["loss"]["other"], 4),
            "loss_text_only": round(blind["loss"]["blank"], 4),
            "grounding_nats": round(blind["loss"]["blank"] - seen["loss"]["image"], 4),
            "top1_image": round(seen["top1"]["image"], 4),
            "top1_blank": round(seen["top1"]["blank"], 4),
            "train_s": seen["train_s"],
        }
        add_row(RESULTS, row, key=("arm", "steps"))


if __name__ == "__main__":
    main()
