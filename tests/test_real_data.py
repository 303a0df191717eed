"""The whole way on real photos and captions, and on a table of human-written statements, in small."""

import json
from pathlib import Path

import pytest

from posmask.eval import run as evaluate
from posmask.prep import build_shards
from posmask.train import pretrain

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
pytestmark = [pytest.mark.real_data, pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")]
COCO = ["coco", "--annotations", f"{DATA}/coco_photos/captions_val2017.json", "--images", f"{DATA}/coco_photos/val2017"]
NLVR = ["table", "--table", f"{DATA}/nlvr/dev_true.csv"]


def columns_of_nlvr():
    header = (DATA / "nlvr" / "dev_true.csv").read_text().splitlines()[0].split(",")
    image = next(name for name in header if "image" in name or "file" in name)
    caption = next(name for name in header if "sentence" in name or "caption" in name)
    return ["--image-column", image, "--caption-column", caption]


@pytest.mark.parametrize("source", ["coco", "nlvr"])
def test_prep_train_probe(source, tmp_path, capsys):
    source_flags = COCO if source == "coco" else NLVR + columns_of_nlvr()
    data, run = tmp_path / "shards", tmp_path / "run"
    tokenizer = ["--tokenizer", f"{DATA}/bert_uncased/vocab.txt"]
    assert build_shards.main([*source_flags, *tokenizer, "--out", str(data), "--limit", "48"]) == 0
    argv = ["--mask", "noun", "--data", str(data), "--val", str(data), "--out", str(run), "--steps", "6"]
    assert pretrain.main([*argv, "--batch-size", "16", "--log-every", "2", "--snapshots", "0"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.1
    assert json.loads((run / "model_config.json").read_text())["vocab_size"] == 30522
    capsys.readouterr()
    assert evaluate.main(["probe", "--checkpoint", str(run), "--words-per-pos", "20"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["pos"]["noun"]["words"] >= 5
    # After six steps the model knows which words are common nouns, and knows nothing of the other classes.
    assert results["pos"]["noun"]["loss"]["image"] < results["pos"]["adp"]["loss"]["image"]
