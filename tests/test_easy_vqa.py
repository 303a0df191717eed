"""easy-VQA, real images and questions that others made: fine-tuning reaches 90 % of its test split."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "bench_finetuning.py"
installed = importlib.util.find_spec("easy_vqa") is not None


@pytest.mark.slow
@pytest.mark.skipif(not installed, reason="easy-vqa is not installed: pip install 'posmask[easy-vqa]'")
def test_ninety_percent(tmp_path):
    command = [sys.executable, str(BENCHMARK), "easy-vqa", "--steps", "500", "--no-twin"]
    for flag, name in (("--runs", "runs"), ("--data", "data"), ("--results", "results.json")):
        command += [flag, str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["questions"] == 9673
    assert row["accuracy"] >= 0.9 and row["accuracy_blank"] < 0.75, row
