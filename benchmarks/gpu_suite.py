"""Everything that only a GPU can tell: the GPU tests, then the benchmarks, then training itself at the base size.

    python benchmarks/gpu_suite.py --data data/scenes/train

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

ROOT = Path(__file__).resolve().parent.parent
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
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")],
        cwd=ROOT, env=env, timeout=limit_s, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[-4000:], flush=True)
    return done.stdout.strip().splitlines()[-1]


def train(data: str, folder: str, env: dict[str, str], limit_s: int, *flags: str) -> dict:
    """Rates of the last log line of a short run of the base preset."""
    out = Path(folder) / "run"
    command = [
        sys.executable, str(ROOT / "train" / "pretrain.py"), "--mask", "noun", "--preset", "base", "--data", data,
        "--out", str(out), "--steps", "60", "--snapshots", "0", "--checkpoint-every", "0", "--eval-every", "0", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, env=env, timeout=limit_s, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"flags": list(flags), "failed": done.stderr.strip().splitlines()[-1:]}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "images_per_s" in line][-1]
    names = ("images_per_s", "tokens_per_s", "masked_tokens_per_s", "data_wait_share")
    return {"flags": list(flags)} | {name: last[name] for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="shards built beforehand")
    parser.add_argument("--batch-size", default="512")
    parser.add_argument("--limit-s", type=int, default=150, help="most seconds for one benchmark")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_suite: there is no CUDA device", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT / "benchmarks"))
    with tempfile.TemporaryDirectory() as folder:
        env = environment(folder)
        sys.path[1:1] = env.get("PYTHONPATH", "").split(os.pathsep)
        from run_all import run_all
        from timing import write_result

        missing = [name for name in OPTIONAL if not is_installed(name)]
        print(f"missing here: {', '.join(missing) or 'nothing'}", flush=True)
        tests = gpu_tests(env, 2 * args.limit_s)
        outcomes = run_all("cuda", args.data, args.limit_s, env)
        runs = []
        for decode in ("dali", "cpu"):
            if decode == "dali" and "nvidia.dali" in missing:
                runs.append({"flags": ["--decode", "dali"], "failed": ["nvidia.dali is not installed"]})
                continue
            with tempfile.TemporaryDirectory() as run_folder:
                flags = ("--decode", decode, "--batch-size", args.batch_size)
                runs.append(train(args.data, run_folder, env, args.limit_s, *flags))
            print(runs[-1], flush=True)
        rows = [{"missing": missing}, {"tests": tests}, {"benchmarks": outcomes}, {"pretrain": runs}]
        write_result("gpu_suite", rows, "deepspeed", "transformers")
    return 0 if " failed" not in tests and " error" not in tests else 1


if __name__ == "__main__":
    sys.exit(main())
