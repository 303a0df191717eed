"""What the benchmarks that train a model share: running the project's commands, and a results file of rows."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from posmask.train.card import git_commit

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *flags: object) -> str:
    """Standard output of a script of the project; its messages pass through. CalledProcessError if it fails."""
    words = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def last_json(output: str) -> dict:
    """The JSON line that commands end with."""
    return json.loads(output.splitlines()[-1])


def train_s(out: Path) -> int:
    """How many seconds the run in `out` trained."""
    return round(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["time_s"])


def add_row(path: Path, row: dict, key: Sequence[str]) -> None:
    """Adds a row, and where it was measured, to the list in `path`; it takes the place of one with the same `key`."""
    row = row | {
        "commit": git_commit(), "torch": torch.__version__, "device": f"{os.cpu_count()} cores {platform.machine()}",
    }  # fmt: skip
    rows = json.loads(path.read_text()) if path.is_file() else []
    rows = [other for other in rows if any(other[k] != row[k] for k in key)] + [row]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(row), flush=True)
