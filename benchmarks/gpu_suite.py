"""Everything that only a GPU can tell: the GPU tests, then the benchmarks, then training itself at the base size.

    python benchmarks/gpu_suite.py --data data/scenes/train --photos FOLDER
    python benchmarks/gpu_suite.py --data data/scenes/train --parts tests bench_masked_lm_loss.py

Shards are built beforehand, so that spaCy is not needed here; what else is missing (DALI, a peer) costs its rows and is
named. Also runs from a plain checkout, without an installation. Rows go to results/gpu_suite.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from run_all import BENCHMARKS, run_all

ROOT = Path(__file__).resolve().parent.parent
MIN_IMAGES = 5000
STEPS = 50
OPTIONAL = ("nvidia.dali", "liger_kernel", "cut_cross_entropy", "spacy", "deepspeed", "streaming")


def is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def environment(folder: str) -> dict[str, str]:
    """The environment in which `import posmask` works, installed or not."""
    if is_installed("posmask"):
        return dict(os.environ)
    package = Path(folder) / "posmask"
    package.mkdir()
    for name in ("prep", "train", "eval", "kernels"):
        (package / name).symlink_to(ROOT / name)
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))}


def gpu_tests(env: dict[str, str], limit_s: int) -> str:
    # Most of the time goes into compiling kernels, which several processes share.
    parallel = ["-n", "8"] if is_installed("xdist") else []
    files = sorted({str(path) for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text()})
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *parallel, *files]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=limit_s, stdout=subprocess.PIPE, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s} s: an error"
    print(done.stdout[-6000:], flush=True)
    return done.stdout.strip().splitlines()[-1]


def train(data: list[str], env: dict[str, str], limit_s: int, *flags: str) -> dict:
    """Rates of a short run of the base preset: the last of its log lines."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable, str(ROOT / "train" / "pretrain.py"), "--mask", "noun", "--preset", "base", "--out",
            str(run), "--steps", str(STEPS), "--snapshots", "0", "--checkpoint-every", "0", "--eval-every", "0", *flags,
            *(word for part in data for word in ("--data", part)),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, env=env, timeout=limit_s, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            return {"flags": list(flags), "failed": f"stopped after {limit_s} s"}
        if done.returncode:
            return {"flags": list(flags), "failed": done.stderr.strip().splitlines()[-3:]}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "images_per_s" in line][-1]
    names = ("images_per_s", "tokens_per_s", "masked_tokens_per_s", "data_wait_share", "loss")
    return {"flags": list(flags), "shards": data[0]} | {name: last[name] for name in names}


def pretraining(data: list[str], batch_size: str, missing: list[str], env: dict[str, str], limit_s: int) -> list[dict]:
    """The step rate of `pretrain.py`, and with a compiled image encoder."""
    decode = "cpu" if "nvidia.dali" in missing else "dali"
    rows = [] if decode == "dali" else [{"flags": ["--decode", "dali"], "failed": "nvidia.dali is not installed"}]
    for flags in ((decode,), (decode, "--compile")):
        rows.append(train(data, env, limit_s, "--batch-size", batch_size, "--decode", *flags))
        print(rows[-1], flush=True)
    return rows


def main() -> int:
    scripts = BENCHMARKS["cuda"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="shards built beforehand; a small folder stands many times")
    parser.add_argument("--photos", default="", help="folder of JPEG photos for the decoders")
    parser.add_argument("--batch-size", default="512")
    parser.add_argument("--limit-s", type=int, default=150, help="most seconds for one benchmark")
    parser.add_argument("--parts", nargs="+", default=["tests", *scripts, "pretrain"], metavar="PART",
                        choices=["tests", *scripts, "pretrain"], help="some of: %(choices)s")  # fmt: skip
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_suite: there is no CUDA device", file=sys.stderr)
        return 2
    missing = [name for name in OPTIONAL if not is_installed(name)]
    print(f"missing here: {', '.join(missing) or 'nothing'}", flush=True)
    num_images = sum(entry["samples"] for entry in json.loads((Path(args.data) / "index.json").read_text())["shards"])
    data = [args.data] * max(1, -(-MIN_IMAGES // num_images))
    rows = [{"missing": missing}]
    tests = ""
    with tempfile.TemporaryDirectory() as folder:
        env = environment(folder)
        if "tests" in args.parts:
            tests = gpu_tests(env, 2 * args.limit_s)
            rows.append({"tests": tests})
        chosen = {script: arguments for script, arguments in scripts.items() if script in args.parts}
        rows.append({"benchmarks": run_all(chosen, data, args.photos, args.limit_s, env)})
        if "pretrain" in args.parts:
            rows.append({"pretrain": pretraining(data, args.batch_size, missing, env, args.limit_s)})
        sys.path[1:1] = env.get("PYTHONPATH", "").split(os.pathsep)
        from timing import write_result  # imports posmask, which `environment` may just have made importable

        write_result("gpu_suite", rows, "deepspeed", "transformers")
    return 0 if " failed" not in tests and " error" not in tests else 1


if __name__ == "__main__":
    sys.exit(main())
