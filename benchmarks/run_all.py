"""Runs the benchmarks of one device, one after the other, and prints what each reached.

    python benchmarks/run_all.py --device cpu

Each benchmark checks that both sides compute the same before it times them, and writes its own file to results/. One
that fails or takes too long is named and makes the exit code 1; the others still run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from posmask.train.remote import is_remote

HERE = Path(__file__).resolve().parent
BENCHMARKS = {
    "cpu": {
        "bench_masked_lm_loss.py": (),
        "bench_attention.py": (),
        "bench_packing.py": ("--device", "cpu", "--presets", "base"),
        "bench_step.py": ("--device", "cpu", "--data", "DATA..."),
        "bench_loader.py": ("PHOTOS",),
        "bench_masking.py": ("--data", "DATA"),
        "bench_prep.py": ("--records", "2000"),
    },
    "cuda": {
        "bench_masked_lm_loss.py": (),
        "bench_attention.py": (),
        "bench_packing.py": ("--presets", "base"),
        "bench_masking.py": ("--data", "DATA", "--repeats", "10"),
        "bench_step.py": ("--data", "DATA..."),
        "bench_loader.py": ("--device", "cuda", "PHOTOS"),
    },
}


def run(script: str, arguments: tuple[str, ...], limit_s: int, env: dict[str, str]) -> tuple[str, dict | None]:
    """What came of a benchmark ("done in 12 s", or why not), and the JSON of its last line."""
    started_s = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / script), *arguments],
            stdout=subprocess.PIPE, text=True, timeout=limit_s, check=False, env=env,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s} s", None
    if done.returncode:
        return f"failed with exit code {done.returncode}", None
    lines = done.stdout.strip().splitlines()
    return f"done in {time.monotonic() - started_s:.0f} s", json.loads(lines[-1])


def ratios(value, path: str = "") -> list[str]:
    """Every number under a key that speaks of a ratio, as "path: number"."""
    if isinstance(value, list):
        return [line for item in value for line in ratios(item, path)]
    if not isinstance(value, dict):
        return []
    name = next((str(value[key]) for key in ("case", "preset", "row", "what") if key in value), "")
    here = f"{path} {name}".strip()
    found = []
    if isinstance(value.get("ratio"), str):  # {"ratio": "theirs / ours", "value": 3.2}
        return [f"{here} {value['ratio']}: {value['value']}"]
    for key, item in value.items():
        if "ratio" in key and isinstance(item, int | float):
            peer = f" {value['peer']}" if "peer" in value else ""
            found.append(f"{here}{peer} {key}: {item}")
        else:
            found += ratios(item, f"{here} {key}" if isinstance(item, dict) else here)
    return found


def run_all(
    scripts: dict[str, tuple[str, ...]], data: list[str], photos: str | None, limit_s: int, env: dict[str, str]
) -> dict[str, str]:
    """Runs `scripts` with their arguments, some of which stand for `data` and `photos`; {script: what came of it}."""
    stands_for = {"DATA": data[:1], "DATA...": data, "PHOTOS": ["--photos", photos] if photos else []}
    outcomes = {}
    for script, arguments in scripts.items():
        print(f"== {script}", flush=True)
        given = tuple(word for name in arguments for word in stands_for.get(name, [name]))
        outcomes[script], result = run(script, given, limit_s, env)
        print(outcomes[script], flush=True)
        for line in ratios(result.get("rows", result)) if result else ():
            print(f"   {line}", flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--data", nargs="+", default=["data/scenes/train"], help="shards to mask and to train on")
    parser.add_argument("--photos", help="folder of JPEG photos to decode (without it: scenes on a CPU, none on a GPU)")
    parser.add_argument("--limit-s", type=int, default=600, help="most seconds for one benchmark")
    args = parser.parse_args()
    missing = [data for data in args.data if not (is_remote(data) or Path(data, "index.json").is_file())]
    if missing:
        parser.error(f"no shards in {', '.join(missing)}: build them with prep/build_shards.py, or give --data")
    # Without a GPU in sight nothing can run there by mistake.
    env = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {})
    outcomes = run_all(BENCHMARKS[args.device], args.data, args.photos, args.limit_s, env)
    print(json.dumps(outcomes))
    return 0 if all(outcome.startswith("done") for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
