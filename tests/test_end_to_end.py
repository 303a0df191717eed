"""Prep, pre-training and probe through their command lines, on scenes; runs outside a checkout too."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from posmask.eval import run as evaluate
from posmask.train import pretrain
from posmask.train.checkpoint import checkpoints, load_model
from posmask.train.loader import Collator, Shards, View, evaluation_batches
from posmask.train.model import Packing


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "noun"
    argv = ["--mask", "noun", "--data", f"{scenes}/train", "--out", str(out), "--steps", "12", "--batch-size", "32"]
    argv += ["--log-every", "2", "--checkpoint-every", "4", "--eval-every", "6", "--snapshots", "3"]
    assert pretrain.main(argv) == 0
    return out


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_folder(run):
    names = {path.name for path in run.iterdir()}
    files = {"config.json", "metrics.jsonl", "model.safetensors", "model_config.json", "tokenizer", "README.md"}
    assert files | {"checkpoints", "snapshots", "commit.txt"} <= names
    assert any(name.startswith("events.") for name in names)
    assert [step for step, _ in checkpoints(run)] == [8, 12], "the newest two are kept"
    assert sorted(path.stem for path in (run / "snapshots").iterdir()) == [f"step-{n:07d}" for n in (1, 3, 12)]


def test_metrics(run):
    train = [line for line in lines_of(run) if "loss" in line]
    assert [line["step"] for line in train] == [2, 4, 6, 8, 10, 12]
    assert train[-1]["loss"] < train[0]["loss"] - 0.2
    assert set(train[0]["pos"]) == {"noun"}, "a noun arm masks nouns alone"
    assert [line["images"] for line in train] == [64, 128, 192, 256, 320, 384]
    assert all(line["masked_tokens"] < line["tokens"] for line in train)
    assert [line["step"] for line in lines_of(run) if "val" in line] == [6, 12]


def test_model_loads_in_one_call(run):
    model, step = load_model(str(run), torch.device("cpu"))
    early, at = load_model(f"{run}@3", torch.device("cpu"))
    assert (step, at) == (12, 3)
    assert not torch.equal(model.head.dense.weight, early.head.dense.weight)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_plain_streaming_dataset_reads_the_shards(scenes):
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=f"{scenes}/val", batch_size=1, shuffle=False)
    sample = dataset[0]
    assert sample["image"][:2] == b"\xff\xd8"
    assert len(sample["tokens"]) == len(sample["tags"]) == sample["caption_lengths"].sum()
    assert len(sample["captions"]) == len(sample["caption_lengths"])


@pytest.mark.parametrize("flags", [[], ["--all-at-once"]])
def test_probe(run, scenes, tmp_path, capsys, flags):
    out = tmp_path / "probe"
    argv = ["probe", "--checkpoint", str(run), "--data", f"{scenes}/val", "--out", str(out), "--words-per-pos", "40"]
    assert evaluate.main(argv + flags) == 0
    results = json.loads((out / "results.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results
    assert {"format", "task", "run", "step", "mask", "data", "num_items", "num_missing", "pos"} <= set(results)
    assert (out / "plot.png").read_bytes()[:4] == b"\x89PNG"
    noun = results["pos"]["noun"]
    assert noun["tokens"] >= noun["words"] > 10
    assert noun["image_gain"] == pytest.approx(noun["loss"]["blank"] - noun["loss"]["image"])
    assert "noun" in (out / "table.txt").read_text()
    check_predictions(run, scenes, [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()])


def check_predictions(run, scenes, predictions):
    """Losses of a few predictions against one caption at a time, built by hand from the shards."""
    model, _ = load_model(str(run), torch.device("cpu"))
    config = model.config
    shards = Shards((f"{scenes}/val",))
    view = View(0, config.image_size, config.image_mean, config.image_std)
    batch = next(evaluation_batches(shards, Collator(view, 0, 64, "auto", torch.device("cpu")), 64, None))
    samples = {int(shards[i]["id"]): i for i in range(len(batch.sample_ids))}
    checked = 0
    for item in predictions[:: max(1, len(predictions) // 8)]:
        if item["id"] not in samples or samples[item["id"]] == 0:
            continue
        i = samples[item["id"]]
        sample = shards[i]
        start = int(np.sum(sample["caption_lengths"][: item["caption"]], dtype=np.int64))
        tokens = torch.from_numpy(
            sample["tokens"][start : start + int(sample["caption_lengths"][item["caption"]])].astype(np.int32)
        )
        targets = tokens[item["positions"]].long()
        tokens[item["positions"]] = shards.manifest.tokenizer.mask_id
        packing = Packing.of(torch.tensor([0, len(tokens)]), len(tokens), len(tokens))
        pictures = {"image": batch.images[i : i + 1], "other": batch.images[i - 1 : i]}
        pictures["blank"] = torch.zeros_like(pictures["image"])
        for name, picture in pictures.items():
            with torch.no_grad():
                hidden = model.fuse(
                    model.encode_text(tokens, packing), packing, model.image(picture), torch.zeros(1, dtype=torch.int32)
                )
                loss = F.cross_entropy(model.logits(hidden[item["positions"]]), targets)
            assert item["loss"][name] == pytest.approx(float(loss), abs=2e-4)
        checked += 1
    assert checked >= 3


def test_finished_run_is_left_alone(run, scenes, capsys):
    argv = ["--mask", "noun", "--data", f"{scenes}/train", "--out", str(run), "--steps", "12", "--batch-size", "32"]
    argv += ["--eval-every", "6", "--snapshots", "3"]
    before = (run / "metrics.jsonl").read_text()
    assert pretrain.main(argv) == 0
    assert "already complete" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == before
