"""Mistakes of users: one clear line, exit code 2, nothing written."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from posmask.eval import run as evaluate
from posmask.train import pretrain
from posmask.train.loader import Shards


@pytest.fixture(scope="module")
def tiny_run(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "noun"
    argv = ["--mask", "noun", "--data", f"{scenes}/train", "--out", str(out), "--steps", "2", "--batch-size", "8"]
    assert pretrain.main([*argv, "--eval-images", "8"]) == 0
    return out


def train_args(scenes, out, *more, mask="noun"):
    return ["--mask", mask, "--data", f"{scenes}/train", "--out", str(out), "--steps", "2", "--batch-size", "8", *more]


@pytest.mark.parametrize(
    ("mask", "flags", "says"),
    [
        ("nouns", [], ["'nouns' is unknown", "noun", "whole-word"]),
        ("none", [], ["only objective"]),
        ("whole-word", ["--mask-amount", "all"], ["whole-word", "--mask-amount all"]),
        ("noun", ["--mask-rate", "0.3"], ["--mask-rate 0.3", "contradicts"]),
        ("noun", ["--replace", "0.8,0.1,0.2"], ["sum to 1"]),
        ("noun", ["--micro-batch-size", "3"], ["--batch-size 8", "--micro-batch-size 3"]),
        ("noun", ["--steps", "0"], ["--steps 0", "at least 1"]),
        ("noun", ["--blank-rate", "2"], ["--blank-rate 2"]),
        ("noun", ["--crop-scale", "1,0.5"], ["--crop-scale 1.0,0.5"]),
        ("noun", ["--batch-size", "4000"], ["300 images", "--batch-size 4000"]),
        ("noun", ["--deepspeed_config", "absent.json"], ["absent.json", "no such file"]),
        ("noun", ["--lr", "0"], ["--lr 0", "above 0"]),
        ("noun", ["--batch-size", "0"], ["--batch-size 0", "at least 1"]),
        ("noun", ["--wandb"], ["--wandb", "pip install"]),
        ("noun", ["--data", "absent"], ["absent"]),
        ("noun", ["--val", "absent"], ["absent"]),
        ("noun", ["--resume", "absent"], ["absent", "no such run"]),
        ("noun", ["--text-weights", "./absent.safetensors"], ["absent.safetensors"]),
    ],
)
def test_pretrain_refuses(scenes, tmp_path, capsys, mask, flags, says):
    out = tmp_path / "run"
    assert pretrain.main(train_args(scenes, out, *flags, mask=mask)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in says), lines[0]
    assert not out.exists()


def test_malformed_flag_exits_with_2(capsys):
    for argv in (["--mask", "noun", "--zero-stage", "4"], ["--mask", "noun", "--stepz", "3"], []):
        with pytest.raises(SystemExit) as stopped:
            pretrain.main(argv)
        assert stopped.value.code == 2
    capsys.readouterr()


def test_shards_of_another_version(scenes, tmp_path, capsys):
    shutil.copytree(scenes / "val", tmp_path / "shards")
    path = tmp_path / "shards" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    argv = train_args(scenes, tmp_path / "run", "--data", str(tmp_path / "shards"))
    assert pretrain.main(argv) == 2
    line = capsys.readouterr().err
    assert "99" in line and "reads 1" in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"train_batch_size": 4}', "'train_batch_size'"),
        ('{"bf16": {"enabled": true}}', "'bf16'"),
        ('{"zero_optimization": {"stage": 3}}', "'stage'"),
        ("[]", "JSON object"),
        ("{", "not JSON"),
    ],
)
def test_unfit_deepspeed_config(scenes, tmp_path, capsys, text, says):
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert pretrain.main(train_args(scenes, tmp_path / "run", "--deepspeed_config", str(path))) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--text-weights", "--image-weights"])
@pytest.mark.parametrize("name", ["junk.safetensors", "junk.pt"])
def test_files_that_are_no_weights(scenes, tmp_path, capsys, flag, name):
    (tmp_path / name).write_text("junk")
    assert pretrain.main(train_args(scenes, tmp_path / "run", flag, str(tmp_path / name))) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and flag in lines[0] and name in lines[0]
    assert not (tmp_path / "run").exists()


def test_out_that_is_no_run(scenes, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    for name in ("file", "folder"):
        assert pretrain.main(train_args(scenes, tmp_path / name)) == 2
        assert "is not a run" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "mine").read_text() == "mine"


def test_validation_shards_of_another_tokenizer(scenes, tmp_path, capsys):
    shutil.copytree(scenes / "val", tmp_path / "val")
    path = tmp_path / "val" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert pretrain.main(train_args(scenes, tmp_path / "run", "--val", str(tmp_path / "val"))) == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_resume_from_a_step_that_is_not_there_or_past_the_end(scenes, tiny_run, tmp_path, capsys):
    for step, says in ((77, "no such checkpoint"), (2, "step 2 leaves nothing of --steps 2")):
        assert pretrain.main(train_args(scenes, tmp_path / "run", "--resume", f"{tiny_run}@{step}")) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_folder_of_another_run(scenes, tiny_run, capsys):
    before = (tiny_run / "config.json").read_bytes()
    assert pretrain.main(train_args(scenes, tiny_run, "--lr", "0.5", "--eval-images", "8")) == 2
    assert "--lr: 0.001 there, 0.5 now" in capsys.readouterr().err
    assert pretrain.main(train_args(scenes, tiny_run, "--resume", "never", "--eval-images", "8")) == 2
    assert (tiny_run / "config.json").read_bytes() == before


def test_checkpoint_of_another_preset(scenes, tiny_run, tmp_path, capsys):
    argv = train_args(scenes, tmp_path / "run", "--preset", "base", "--resume", str(tiny_run), "--steps", "3")
    assert pretrain.main(argv) == 2
    assert "preset laptop" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_probe_refuses(scenes, tiny_run, tmp_path, capsys):
    for argv, says in (
        (["--checkpoint", str(tmp_path / "absent")], "no such run"),
        (["--checkpoint", str(tmp_path)], "not a run folder"),
        (["--checkpoint", f"{tiny_run}@77"], "no weights of that step"),
        (["--checkpoint", str(tiny_run), "--data", str(tmp_path / "absent")], "no such folder"),
    ):
        assert evaluate.main(["probe", *argv, "--out", str(tmp_path / "out")]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and says in lines[0]
        assert not (tmp_path / "out").exists()
    other = tmp_path / "val"
    shutil.copytree(scenes / "val", other)
    vocabulary = other / "tokenizer" / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text() + "zzz\n")
    assert evaluate.main(["probe", "--checkpoint", str(tiny_run), "--data", str(other)]) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_no_traceback_from_the_command():
    # Runs in this process have completed a launcher's variables: the port among them is taken.
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    env = {key: value for key, value in os.environ.items() if key not in launcher}
    command = [sys.executable, "-m", "posmask.train.pretrain", "--mask", "noun", "--data", "absent"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "absent" in done.stderr


def test_an_image_that_cannot_be_decoded(scenes, tmp_path, capsys, monkeypatch, caplog):
    """It stops the run by name; with --on-bad-sample skip the run goes on, names it once and counts it each time."""
    read = Shards.__getitem__

    def damaged(self, i):
        sample = read(self, i)
        return sample | {"image": b"no JPEG"} if i == 7 else sample

    monkeypatch.setattr(Shards, "__getitem__", damaged)
    key = repr(Shards((f"{scenes}/train",))[7]["key"])
    epochs = ["--batch-size", "100", "--steps", "6", "--log-every", "3", "--eval-every", "0"]
    epochs += ["--micro-batch-size", "20"]
    assert pretrain.main(train_args(scenes, tmp_path / "stop", *epochs)) == 2
    assert key in capsys.readouterr().err
    assert pretrain.main(train_args(scenes, tmp_path / "skip", *epochs, "--on-bad-sample", "skip")) == 0
    lines = [json.loads(line) for line in (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines()]
    counts = [(line["images"], line["bad_samples"]) for line in lines if "loss" in line]
    assert counts == [(299, 1), (598, 2)], "300 images are an epoch of 3 steps"
    assert sum(key in record.getMessage() for record in caplog.records) == 1
