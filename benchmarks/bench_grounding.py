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
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from posmask.train.card import git_commit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "grounding.json"


def run(*command: str) -> str:
    """Standard output of a command, whose messages pass through. Raises CalledProcessError if it fails."""
    return subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(arm: str, steps: int, captions_per_image: int, blank_rate: float, runs: Path) -> dict:
    """Trains (unless it has been) and probes one run; the probe's entry for the arm's part of speech, and seconds."""
    name = f"{arm}-{steps}-{captions_per_image}" + ("-text-only" if blank_rate == 1 else "")
    out = str(runs / name)
    run(str(ROOT / "train/pretrain.py"), "--mask", arm, "--steps", str(steps), "--blank-rate", str(blank_rate),
        "--captions-per-image", str(captions_per_image), "--out", out, "--snapshots", "0")  # fmt: skip
    probe = run(str(ROOT / "eval/run.py"), "probe", "--checkpoint", out, "--all-at-once", "--words-per-pos", "0")
    entry = json.loads(probe.splitlines()[-1])["pos"][arm]
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return {key: entry[key] for key in ("loss", "top1", "words")} | {"train_s": round(lines[-1]["time_s"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--captions-per-image", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/grounding"))
    args = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
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
            "commit": git_commit(),
            "torch": torch.__version__,
            "device": f"{os.cpu_count()} cores {platform.machine()}",
        }
        rows = [r for r in rows if (r["arm"], r["steps"]) != (arm, args.steps)] + [row]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
