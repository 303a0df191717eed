"""The whole of prep through its command: what comes out, that it is the same every time, and how it fails."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from posmask.prep import pos, shards
from posmask.prep.build_shards import main

CAPTIONS = ["A red cat sleeps on the mat.", "Two dogs can't see the [MASK] bird!", "A blue house stands near a tree."]


def jpeg(number):
    buffer = io.BytesIO()
    Image.new("RGB", (40 + number, 32), (number * 8 % 256, 90, 120)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """Ten pictures with two captions each, as a folder source."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
        (folder / f"{i}.txt").write_text(f"{CAPTIONS[i % 3]}\n{CAPTIONS[(i + 1) % 3]}\n")
    return folder


def arguments(pictures, out, *more):
    return ["folder", "--images", str(pictures), "--out", str(out), "--workers", "1", "--tokenizer", "train:300", *more]


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_samples(out):
    from streaming.base.format import reader_from_json

    index = json.loads((out / "index.json").read_text())
    readers = [reader_from_json(str(out), None, shard) for shard in index["shards"]]
    return [reader[i] for reader in readers for i in range(len(reader))]


def test_samples_hold_what_the_format_says(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(pictures, out, "--records-per-part", "4")) == 0
    manifest = shards.Manifest.load(out)
    samples = read_samples(out)
    assert [sample["key"] for sample in samples] == [f"{i}.jpg" for i in range(10)]
    info = manifest.tokenizer
    upos = dict.fromkeys(pos.UPOS, 0)
    for i, sample in enumerate(samples):
        assert sample["image"] == jpeg(i)
        assert int(sample["id"]) == shards.sample_id("folder", sample["key"])
        assert sample["captions"] == [CAPTIONS[i % 3], CAPTIONS[(i + 1) % 3]]
        tokens, tags, lengths = sample["tokens"], sample["tags"], sample["caption_lengths"]
        assert (tokens.dtype, tags.dtype, lengths.dtype) == (np.uint16, np.uint32, np.uint8)
        ends = lengths.cumsum(dtype=int)
        assert len(tokens) == len(tags) == ends[-1]
        special = np.zeros(len(tokens), bool)
        special[[0, *ends[:-1]]] = True
        special[ends - 1] = True
        assert (tokens[special].reshape(-1, 2) == [info.cls_id, info.sep_id]).all()
        assert not tags[special].any()
        assert not np.isin(tokens[~special], [info.cls_id, info.sep_id, info.mask_id]).any()
        assert (tags[~special] & pos.UPOS_MASK).all()
        assert ((tags[~special] & pos.MASKABLE > 0) == (tokens[~special] != info.unk_id)).all()
        assert not (tags >> 31).any()
        for tag in upos:
            upos[tag] += int(np.count_nonzero(tags & pos.UPOS_BIT[tag]))
    counts = manifest.counts
    assert counts["per_upos"] == upos
    assert (counts["images"], counts["captions"]) == (10, 20)
    assert counts["tokens"] == sum(len(sample["tokens"]) for sample in samples)
    assert counts["maskable"] == sum(np.count_nonzero(sample["tags"] & pos.MASKABLE) for sample in samples)
    assert manifest.longest_caption == max(sample["caption_lengths"].max() for sample in samples)
    assert manifest.image == {"size": 256, "quality": 90, "mean_width": 44.5, "mean_height": 32.0}
    assert [part["samples"] for part in manifest.parts] == [4, 4, 2]
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("images", "captions", "tokens", "NOUN"))


def test_bytes_depend_on_neither_workers_nor_folder_nor_interruption(pictures, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    parts = ["--records-per-part", "3"]
    assert main(arguments(pictures, first, *parts)) == 0
    assert main(arguments(pictures, second, *parts, "--workers", "2")) == 0
    built = files(first)
    assert files(second) == built
    assert not [name for name in built if ".tmp" in name]

    # As a kill leaves it: a finished part, one whose shards were not yet confirmed, a temporary folder, no merge.
    for name in ("manifest.json", "index.json", "dropped.jsonl", "part-00001.json", "part-00003.json"):
        (second / name).unlink()
    (second / "part-00001.00000.mds").write_bytes(b"to be replaced")
    (second / "part-00003.99999.tmp").mkdir()
    untouched = (second / "part-00000.00000.mds").stat().st_mtime_ns
    assert main(arguments(pictures, second, *parts)) == 0
    assert files(second) == built
    assert (second / "part-00000.00000.mds").stat().st_mtime_ns == untouched


def test_a_finished_build_says_so_and_another_configuration_is_refused(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(pictures, out)) == 0
    built = files(out)
    capsys.readouterr()
    assert main(arguments(pictures, out, "--workers", "2")) == 0
    assert "already complete" in capsys.readouterr().out
    assert main(arguments(pictures, out, "--max-tokens", "20")) == 2
    assert "another max_tokens: 48 there, 20 now" in capsys.readouterr().err
    (pictures / "3.txt").write_text("A different caption.")
    assert main(arguments(pictures, out)) == 2
    assert "records_sha256" in capsys.readouterr().err
    assert files(out) == built


def test_a_plain_streaming_dataset_reads_the_shards(pictures, tmp_path, monkeypatch):
    from streaming import StreamingDataset

    out = tmp_path / "out"
    assert main(arguments(pictures, out)) == 0
    # Its lock files stay behind, so they get a folder of their own.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dataset = StreamingDataset(local=str(out), batch_size=1, shuffle=False, num_canonical_nodes=1)
    assert len(dataset) == 10
    assert [dataset[i]["key"] for i in range(10)] == [f"{i}.jpg" for i in range(10)]
    assert sorted(dataset[0]) == sorted(shards.columns(num_scores=0))


def test_another_build_may_take_the_tokenizer_of_the_first(pictures, tmp_path):
    assert main(arguments(pictures, tmp_path / "train")) == 0
    more = ["--limit", "3", "--tokenizer", str(tmp_path / "train" / "tokenizer")]
    assert main(arguments(pictures, tmp_path / "val", *more)) == 0
    train, val = (shards.Manifest.load(tmp_path / split) for split in ("train", "val"))
    assert train.tokenizer == val.tokenizer
    assert files(tmp_path / "train" / "tokenizer") == files(tmp_path / "val" / "tokenizer")


def test_broken_records_are_dropped_counted_and_named(pictures, tmp_path, capsys):
    (pictures / "2.jpg").write_bytes(jpeg(2)[:400])
    (pictures / "5.txt").unlink()
    (pictures / "7.txt").write_text("\u200b\n\u00a0 \n")
    out = tmp_path / "out"
    assert main(arguments(pictures, out)) == 1
    error = capsys.readouterr().err
    assert "3 of 10 records dropped" in error
    assert "--max-dropped" in error
    assert "2.jpg" in error
    assert not (out / "manifest.json").exists()
    lines = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    expected = [("2.jpg", "damaged or truncated image"), ("5.jpg", "no caption"), ("7.jpg", "only empty captions")]
    assert [(line["key"], line["reason"]) for line in lines] == expected

    # The same folder goes on with a higher limit: nothing has to be built again.
    assert main(arguments(pictures, out, "--max-dropped", "0.3")) == 0
    manifest = shards.Manifest.load(out)
    assert (manifest.counts["images"], manifest.counts["records"], sum(manifest.dropped.values())) == (7, 10, 3)
    assert "dropped: damaged" in capsys.readouterr().out


def test_an_empty_caption_among_others_is_left_out_and_counted(pictures, tmp_path):
    (pictures / "0.txt").write_text("A cat.\n\u200b\nA dog.\n")
    assert main(arguments(pictures, tmp_path / "out", "--limit", "1")) == 0
    assert read_samples(tmp_path / "out")[0]["captions"] == ["A cat.", "A dog."]
    assert shards.Manifest.load(tmp_path / "out").counts["empty_captions"] == 1


def test_exclude_limit_and_cut(pictures, tmp_path):
    (tmp_path / "no.txt").write_text("0.jpg\n2\n\n")
    (pictures / "1.txt").write_text("cat " * 100)
    more = ["--exclude", str(tmp_path / "no.txt"), "--limit", "2", "--max-tokens", "12"]
    assert main(arguments(pictures, tmp_path / "out", *more)) == 0
    samples = read_samples(tmp_path / "out")
    assert [sample["key"] for sample in samples] == ["1.jpg", "3.jpg"]
    assert samples[0]["caption_lengths"].tolist() == [12]
    manifest = shards.Manifest.load(tmp_path / "out")
    assert manifest.sources[0]["excluded"] == 2
    assert manifest.counts["cut_captions"] >= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--images", "nowhere"], "--images nowhere: no such folder"),
        (["--table", "t.csv"], "--table t.csv contradicts the source folder; it belongs to table"),
        (["--workers", "0"], "0 is not a whole number of at least 1"),
        (["--quality", "200"], "--quality 200 is not within 1 to 95"),
        (["--max-tokens", "300"], "--max-tokens 300 is not within 8 to 255"),
        (["--tokenizer", "nowhere/vocab.txt"], "no such file or folder"),
        (["--tagger", "xx_nowhere"], "no spaCy model xx_nowhere"),
        (["--exclude", "nowhere.txt"], "--exclude nowhere.txt"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(pictures, tmp_path, capsys, change, message):
    assert main(arguments(pictures, tmp_path / "out", *change)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["flickr"], "invalid choice: 'flickr'"),
        (["coco", "--images", "."], "the source coco needs --annotations"),
        (["table", "--table", "t.csv", "--caption-column", "c"], "the source table needs --image-column"),
        (["scenes", "--images", "."], "--images . contradicts the source scenes"),
        (["folder", "--images", "."], "no image found under ."),
        (["coco", "--images", ".", "--annotations", "c.json"], "no such file: c.json"),
    ],
)
def test_other_wrong_usage(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_scenes_share_one_vocabulary_and_come_with_evaluation_sets(tmp_path, capsys):
    command = ["--num-scenes", "40", "--out", str(tmp_path / "scenes"), "--workers", "1"]
    assert main(command) == 0
    train, val = (shards.Manifest.load(tmp_path / "scenes" / split) for split in ("train", "val"))
    assert (train.counts["images"], val.counts["images"]) == (40, 4)
    assert train.tokenizer == val.tokenizer
    assert train.sources[0]["command"] == "python prep/build_shards.py scenes --num-scenes 40"
    assert train.dropped == val.dropped == {}
    assert (tmp_path / "scenes" / "eval" / "captions_val2017.json").is_file()
    built = files(tmp_path)
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("already complete") == 2
    assert files(tmp_path) == built


def test_duplicate_names_and_empty_sources_are_refused(tmp_path):
    from posmask.prep.arguments import make_parser
    from posmask.prep.build_shards import build, fingerprint
    from posmask.prep.sources import Record, Source

    twice = Source("s", "l", [Record("a", ("x",), bytes), Record("a", ("y",), bytes)])
    with pytest.raises(ValueError, match="the image a comes twice"):
        fingerprint(twice)
    with pytest.raises(ValueError, match="the source s is empty"):
        build(make_parser().parse_args([]), Source("s", "l", []), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_left_alone(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    assert main(arguments(pictures, out)) == 2
    assert "is not a build of posmask shards" in capsys.readouterr().err
    assert list(files(out)) == ["thesis.tex"]


def test_an_interrupt_leaves_finished_parts_only_and_the_build_continues(pictures, tmp_path):
    for i in range(10, 250):
        (pictures / f"{i}.jpg").write_bytes(jpeg(i % 100))
        (pictures / f"{i}.txt").write_text(f"{CAPTIONS[i % 3]}\n" * 20)  # seconds of tagging are left to interrupt
    out = tmp_path / "out"
    more = ["--records-per-part", "16"]
    command = [sys.executable, "-m", "posmask.prep.build_shards", *arguments(pictures, out, *more, "--workers", "2")]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}

    def hear_interrupts():  # a shell's background jobs are born deaf to them, and so would be what this test starts
        signal.signal(signal.SIGINT, signal.default_int_handler)

    child = subprocess.Popen(command, **pipes, start_new_session=True, preexec_fn=hear_interrupts)
    while not (out / "part-00000.json").exists() and child.poll() is None:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does it: to the workers, too
    error = child.communicate(timeout=60)[1]
    assert child.returncode == 130, error
    assert error == "interrupted; finished parts are kept, the same command continues\n"
    names = set(files(out))
    assert not [name for name in names if ".tmp" in name]
    assert "manifest.json" not in names
    for name in [name for name in names if name.endswith(".mds")]:
        assert f"{name.split('.')[0]}.json" in names
    assert main(arguments(pictures, out, *more)) == 0
    assert shards.Manifest.load(out).counts["images"] == 250


def manifest_of(tmp_path, pictures):
    assert main(arguments(pictures, tmp_path / "out", "--limit", "1")) == 0
    return tmp_path / "out"


def test_manifest_round_trip_and_what_it_refuses(pictures, tmp_path):
    out = manifest_of(tmp_path, pictures)
    manifest = shards.Manifest.load(out)
    before = (out / "manifest.json").read_bytes()
    manifest.save(out)
    assert (out / "manifest.json").read_bytes() == before
    assert str(tmp_path) not in json.dumps(manifest.sources).replace(str(pictures), "")

    values = json.loads(before)
    for change, message in [
        ({"format_version": 2}, "format_version 2, this posmask reads 1"),
        ({"surprise": 1}, r"wrong or missing keys \['surprise'\]"),
    ]:
        (out / "manifest.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=message):
            shards.Manifest.load(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        shards.Manifest.load(out)
    (out / "manifest.json").write_bytes(before)
    (out / "index.json").unlink()
    with pytest.raises(ValueError, match=r"no index\.json"):
        shards.Manifest.load(out)
    (out / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds an unfinished build; run the same build command again"):
        shards.Manifest.load(out)
    (out / "build.json").unlink()
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        shards.Manifest.load(out)
    with pytest.raises(ValueError, match="no such folder"):
        shards.Manifest.load(Path("nowhere"))


def test_merge_names_missing_parts(pictures, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(pictures, out, "--records-per-part", "5")) == 0
    (out / "part-00001.json").unlink()
    with pytest.raises(ValueError, match="lacks part-00001; run the same build command again"):
        shards.merge(out)


def test_a_failing_part_leaves_nothing(tmp_path):
    def samples():
        tokens, tags, lengths = np.ones(2, np.uint16), np.zeros(2, np.uint32), np.array([2], np.uint8)
        yield shards.Sample("a", 1, b"", tokens, tags, np.zeros((2, 0), np.uint8), lengths, [""], 8, 8, 0, 0)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        shards.write_part(tmp_path, 0, 2, samples(), [])
    assert not list(tmp_path.iterdir())


def test_ids_are_pinned():
    assert shards.sample_id("coco", "000000000030.jpg") == 7394613064603349677
    assert shards.part_name(17) == "part-00017"


def test_training_side_imports_neither_spacy_nor_pil():
    code = "import sys, posmask.prep.shards; sys.exit(bool({'spacy', 'PIL', 'datasets', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
