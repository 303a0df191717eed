"""Training is reproducible: run twice, resumed, killed, on one rank or two, whatever the ZeRO stage."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from posmask.train import config, pretrain
from posmask.train.checkpoint import checkpoints

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMES = ("time_s", "images_per_s", "captions_per_s", "tokens_per_s", "masked_tokens_per_s", "data_wait_share")
ROOT = Path(__file__).resolve().parent.parent


def flags(scenes, out, *more, steps=6, mask="noun"):
    return [
        "--mask", mask, "--data", f"{scenes}/train", "--out", str(out), "--steps", str(steps), "--batch-size", "16",
        "--log-every", "1", "--checkpoint-every", "3", "--eval-every", "3", "--eval-images", "16", "--snapshots", "0",
        "--keep-checkpoints", "9", "--dtype", "fp32", *more,
    ]  # fmt: skip


def command(*words, threads=1):
    """A command line for a process of its own, without what runs in this one have put into the environment."""
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    return {"args": [sys.executable, *words], "env": env | {"OMP_NUM_THREADS": str(threads)}}


def two_ranks(*words):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(**command(*launcher, *words), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def log_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same(a, b):
    assert log_of(a) == log_of(b)
    weights = [load_file(run / "model.safetensors") for run in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")]
)
def test_continued_run_equals_the_uninterrupted_one(scenes, tmp_path, stage, dtype):
    more = ["--zero-stage", str(stage), "--dtype", dtype, "--micro-batch-size", "8"]
    assert pretrain.main(flags(scenes, tmp_path / "whole", *more)) == 0
    resume = ["--resume", f"{tmp_path}/whole@3"]
    assert pretrain.main(flags(scenes, tmp_path / "rest", *more, *resume)) == 0
    whole, rest = log_of(tmp_path / "whole"), log_of(tmp_path / "rest")
    assert all(line["grad_norm"] > 0 for line in whole if "loss" in line)
    assert [line for line in whole if line["step"] > 3] == rest
    weights = [load_file(tmp_path / run / "model.safetensors") for run in ("whole", "rest")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("mask", ["weighted", "decay:noun->bandit@0.3"])
def test_a_mask_that_changes_during_training_is_continued(scenes, tmp_path, mask):
    assert pretrain.main(flags(scenes, tmp_path / "whole", mask=mask)) == 0
    assert pretrain.main(flags(scenes, tmp_path / "rest", "--resume", f"{tmp_path}/whole@3", mask=mask)) == 0
    whole, rest = log_of(tmp_path / "whole"), log_of(tmp_path / "rest")
    assert [line for line in whole if line["step"] > 3] == rest
    policies = [json.loads((tmp_path / f"whole/checkpoints/step-000000{step}/state.json").read_text())["policy"]
                for step in (3, 6)]  # fmt: skip
    assert policies[0] != policies[1], "it has learned something"


def test_the_same_command_twice(scenes, tmp_path):
    for name in ("a", "b"):
        assert pretrain.main(flags(scenes, tmp_path / name, mask="random")) == 0
    assert_same(tmp_path / "a", tmp_path / "b")
    assert pretrain.main(flags(scenes, tmp_path / "c", "--seed", "1", mask="random")) == 0
    assert log_of(tmp_path / "c") != log_of(tmp_path / "a")


def test_killed_and_continued(scenes, tmp_path):
    more = ["--checkpoint-every", "30", "--eval-every", "0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    module = ["-m", "posmask.train.pretrain"]
    subprocess.run(**command(*module, *flags(scenes, whole, *more, steps=60)), check=True, capture_output=True)
    argv = flags(scenes, killed, *more, steps=60)
    process = subprocess.Popen(**command(*module, *argv), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (checkpoints(killed) and log_of(killed)[-1]["step"] > 32):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists()
    subprocess.run(**command(*module, *argv), check=True, capture_output=True)
    assert_same(whole, killed)


def test_sigterm_saves_and_the_same_command_continues(scenes, tmp_path, monkeypatch, capsys):
    """The signal arrives in step 2; the run stops at its end, with a checkpoint of it."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert pretrain.main(flags(scenes, whole)) == 0
    all_losses = pretrain.all_losses
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return all_losses(*args)

    monkeypatch.setattr(pretrain, "all_losses", interrupted)
    assert pretrain.main(flags(scenes, stopped)) == 0
    assert "stopped by SIGTERM" in capsys.readouterr().out
    assert [step for step, _ in checkpoints(stopped)] == [2]
    monkeypatch.undo()
    assert pretrain.main(flags(scenes, stopped)) == 0
    assert_same(whole, stopped)


@pytest.mark.parametrize(
    ("has_gpu", "has_instructions", "dtype"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_the_type_is_what_the_machine_is_fast_in(monkeypatch, has_gpu, has_instructions, dtype):
    monkeypatch.setattr(config, "has_bf16_instructions", lambda: has_instructions)
    assert config.parse_args(["--mask", "noun"], has_gpu).dtype == dtype
    assert config.parse_args(["--mask", "noun", "--dtype", "fp32"], has_gpu).dtype == "fp32"


@pytest.mark.parametrize(("short_side", "image_size", "advised"), [(256, 64, 96), (256, 224, None), (100, 64, None)])
def test_images_much_larger_than_seen_are_named(short_side, image_size, advised):
    """The mean sides of upright and wide images are both larger than the short side."""
    run = config.parse_args(["--mask", "noun"], has_gpu=False)
    world = SimpleNamespace(size=1, device=torch.device("cpu"))
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(image_size=image_size)
    sizes = [(256, 90, 80), (short_side, short_side + 70, short_side + 16)]
    keys = "size", "mean_width", "mean_height"
    manifests = [SimpleNamespace(image=dict(zip(keys, size, strict=True))) for size in sizes]
    shards = type("Shards", (list,), {"manifests": manifests})()
    _, *advice = pretrain.describe_start(run, world, (shards,), model, 0).splitlines()
    assert len(advice) == (advised is not None)
    if advised:
        assert "stored at 256 px and seen at 64" in advice[0] and "--image-size 96 " in advice[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_with_accumulation_equal_one_large_batch(scenes, tmp_path, stage):
    """Text-only, since BatchNorm's batch statistics depend on the micro-batch. Captions have unequal numbers of
    nouns, so micro-batches have unequal counts."""
    more = ["--blank-rate", "1", "--zero-stage", str(stage), "--eval-every", "0", "--grad-clip", "0"]
    assert pretrain.main(flags(scenes, tmp_path / "one", *more)) == 0
    two_ranks("-m", "posmask.train.pretrain", *flags(scenes, tmp_path / "two", *more, "--micro-batch-size", "2"))
    one, two = ([line for line in log_of(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-4)
        assert (a["tokens"], a["masked_tokens"]) == (b["tokens"], b["masked_tokens"])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_continues_on_another_number_of_ranks(scenes, tmp_path, stage):
    more = ["--blank-rate", "1", "--zero-stage", str(stage), "--eval-every", "0"]
    assert pretrain.main(flags(scenes, tmp_path / "one", *more)) == 0
    resume = ["--resume", f"{tmp_path}/one@3"]
    two_ranks("-m", "posmask.train.pretrain", *flags(scenes, tmp_path / "two", *more, *resume))
    resume = ["--resume", f"{tmp_path}/two@6"]
    assert pretrain.main(flags(scenes, tmp_path / "back", *more, *resume, steps=8)) == 0
    assert pretrain.main(flags(scenes, tmp_path / "straight", *more, "--resume", f"{tmp_path}/one@6", steps=8)) == 0

    def losses(name, first):
        return [line["loss"] for line in log_of(tmp_path / name) if "loss" in line and line["step"] >= first]

    assert losses("two", 4) == pytest.approx(losses("one", 4), rel=1e-4)
    assert losses("back", 7) == pytest.approx(losses("straight", 7), rel=1e-4)


def test_deepspeed_launcher_with_two_ranks(scenes, tmp_path):
    script = ROOT / "train" / "pretrain.py"
    assert script.is_file(), "this test runs in a checkout"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port, str(script)]
    argv = flags(scenes, tmp_path / "run", "--eval-every", "0", steps=3)
    done = subprocess.run(**command(*words, *argv), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((checkpoints(tmp_path / "run")[-1][1] / "state.json").read_text())
    assert (state["step"], state["world_size"]) == (3, 2)
