"""Checkpoints as files: only complete ones count, and a run folder never shows weights under a wrong step."""

import json

import pytest
import torch
from safetensors.torch import load_file

from posmask.train import checkpoint, pretrain
from posmask.train.checkpoint import checkpoints, load_model, load_weights, parse_run

CPU = torch.device("cpu")


def arguments(scenes, out, steps, *more):
    return [
        "--mask", "noun", "--data", f"{scenes}/train", "--out", str(out), "--steps", str(steps), "--batch-size", "8",
        "--checkpoint-every", "2", "--eval-every", "0", "--eval-images", "8", "--snapshots", "0", "--log-every", "1",
        *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def short_run(scenes, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "short"
    assert pretrain.main(arguments(scenes, run, 2)) == 0
    return run


def test_what_a_checkpoint_holds(short_run):
    ((step, folder),) = checkpoints(short_run)
    weights, moments = load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors")
    parameters = {name for name, _ in load_model(str(short_run), CPU)[0].named_parameters()}
    assert set(moments) == {f"{name}.{key}" for name in parameters for key in checkpoint.MOMENTS}
    assert {value.dtype for value in moments.values()} == {torch.float32}
    assert all((moments[f"{name}.exp_avg_sq"] >= 0).all() for name in parameters)
    assert any(name.endswith("running_var") for name in weights)
    exported = load_file(short_run / "model.safetensors")
    assert step == 2 and exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["world_size"], state["counters"]["images"]) == (2, 1, 16)


def test_a_half_written_checkpoint_does_not_count(short_run):
    partial = short_run / "checkpoints" / "step-0000009.tmp"
    partial.mkdir()
    assert [step for step, _ in checkpoints(short_run)] == [2]
    assert load_weights(short_run)[2] == 2
    partial.rmdir()


def test_names_of_runs(short_run):
    assert parse_run(str(short_run)) == (short_run, None)
    assert parse_run(f"{short_run}@2") == (short_run, 2)
    with pytest.raises(ValueError, match="no such run folder"):
        parse_run(f"{short_run}-absent@2")
    with pytest.raises(ValueError, match=r"no weights of that step; there are 2$"):
        load_weights(short_run, 1)


def test_a_finished_run_that_goes_on_is_unfinished_until_its_new_end(scenes, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert pretrain.main(arguments(scenes, run, 2)) == 0
    short = load_file(run / "model.safetensors")
    all_losses, calls = pretrain.all_losses, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:  # the first warms the optimizer up, the next is step 3
            raise KeyboardInterrupt
        return all_losses(*args)

    monkeypatch.setattr(pretrain, "all_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(arguments(scenes, run, 4, "--resume", str(run)))
    monkeypatch.undo()
    assert load_weights(run)[2] == 2, "what was trained for 2 steps may not pass for 4"
    assert pretrain.main(arguments(scenes, run, 4)) == 0
    _, weights, step = load_weights(run)
    assert step == 4 and any(not torch.equal(weights[name], short[name]) for name in short)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["images"] for line in lines if "loss" in line] == [8, 16, 24, 32]
