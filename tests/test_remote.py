"""Shards in an object store: the batches of a local copy whatever requests fail, and a cache that is never wrong."""

import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
import torch

from posmask.train import pretrain, remote
from posmask.train.config import parse_args
from posmask.train.loader import Collator, Loader, Shards, View, evaluation_batches

CPU = torch.device("cpu")
VIEW = View(3, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), captions_per_image=2, blank_rate=0.3, crop_scale=(0.6, 1.0))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Three parts of 128 scenes or fewer, and the val folder beside them."""
    from posmask.prep.build_shards import main

    out = tmp_path_factory.mktemp("remote") / "scenes"
    flags = ["--num-scenes", "300", "--tokenizer", "train:500", "--workers", "1", "--records-per-part", "128"]
    assert main([*flags, "--out", str(out)]) == 0
    return out


@pytest.fixture
def store(built, object_store, monkeypatch):
    for split in ("train", "val"):
        object_store.put(built / split, f"s3://bucket/scenes/{split}")
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    return object_store


def batches(shards, steps=12):
    loader = Loader(
        shards, Collator(VIEW, 0, 32, "cpu", CPU), seed=3, batch_size=32, micro_batch_size=32, rank=0, world_size=1,
        num_steps=steps,
    )  # fmt: skip
    try:
        return list(loader)
    finally:
        loader.close()


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for name in ("tokens", "tags", "caption_starts", "caption_image", "caption_key", "images"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def copied(cache):
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_batches_are_those_of_a_local_copy_though_requests_fail(built, store, tmp_path):
    counts = {}

    def fail(method, path):
        """The first two requests for a file, differently for each."""
        counts[path] = counts.get(path, 0) + (method == "GET")
        return ("error", "truncate", "drop")[len(path + method) % 3] if counts[path] in (1, 2) else None

    store.fault = fail
    shards = Shards(("s3://bucket/scenes/train",), tmp_path / "cache")
    assert not [name for name in copied(tmp_path / "cache") if name.endswith(".mds")], "each shard when it is needed"
    local = Shards((f"{built}/train",))
    assert_equal(batches(shards), batches(local))
    assert sum(count > 2 for path, count in counts.items() if path.endswith(".mds")) == 3
    there = copied(tmp_path / "cache")
    assert len([name for name in there if name.endswith(".mds")]) == 3
    assert not [name for name in there if ".tmp" in name]

    store.fault, store.requests[:] = lambda method, path: None, []
    again = Shards(("s3://bucket/scenes/train",), tmp_path / "cache")
    val = Shards(("s3://bucket/scenes/val",), tmp_path / "cache")
    assert_equal(batches(again), batches(local))
    assert not [path for _, path in store.requests if path.endswith(".mds") and "train" in path]
    whole = Collator(View(0, 32, VIEW.image_mean, VIEW.image_std), 0, 16, "cpu", CPU)
    expected = list(evaluation_batches(Shards((f"{built}/val",)), whole, 16, None))
    assert_equal(list(evaluation_batches(val, whole, 16, None)), expected)


def command(tmp_path, *more):
    return [
        "--mask", "noun", "--data", "s3://bucket/scenes/train", "--cache", str(tmp_path / "cache"), "--out",
        str(tmp_path / "run"), "--steps", "2", "--batch-size", "8", "--eval-images", "8", "--snapshots", "0", *more,
    ]  # fmt: skip


def test_the_validation_set_beside_a_url(store, tmp_path):
    assert parse_args(command(tmp_path), False).val == "s3://bucket/scenes/val"
    for entry in store.client.list_objects_v2(Bucket="bucket", Prefix="scenes/val")["Contents"]:
        store.client.delete_object(Bucket="bucket", Key=entry["Key"])
    assert parse_args(command(tmp_path), False).val is None


def test_a_run_on_remote_shards(built, store, tmp_path):
    assert pretrain.main(command(tmp_path)) == 0
    ours, theirs = (
        {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
        for folder in (tmp_path / "run", built / "train")
    )
    assert ours == theirs
    assert "| s3://bucket/scenes/train | 300 |" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("missing", "flags", "message"),
    [
        ("train/part-00002.00000.mds", ["--batch-size", "256"],
         "s3://bucket/scenes/train/part-00002.00000.mds is not there"),
        ("train/index.json", [], "s3://bucket/scenes/train holds no posmask shards: s3://bucket/scenes/train/index.json"),
        ("train/tokenizer/vocab.txt", [], "s3://bucket/scenes/train/tokenizer/vocab.txt is not there"),
        ("val/manifest.json", [], "s3://bucket/scenes/val holds no posmask shards"),
        (None, ["--data", "s3://nowhere/train"], "s3://nowhere/"),
        (None, ["--cache", __file__], f"--cache {__file__}: File exists; name a folder to write to"),
        (None, ["--data", "gopher://bucket/train", "--val", "x"], "gopher://bucket cannot be read: Unsupported"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_in_one_line(store, tmp_path, capsys, missing, flags, message):
    if missing:
        store.client.delete_object(Bucket="bucket", Key=f"scenes/{missing}")
    assert pretrain.main(command(tmp_path, *flags)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("pretrain: ") and error.count("\n") == 1


def test_a_shard_that_never_arrives_whole_is_named(store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "NUM_ATTEMPTS", 2)
    key = "scenes/train/part-00002.00000.mds"
    content = bytearray(store.client.get_object(Bucket="bucket", Key=key)["Body"].read())
    content[1000] ^= 1
    store.client.put_object(Bucket="bucket", Key=key, Body=bytes(content))
    shards = Shards(("s3://bucket/scenes/train",), tmp_path / "cache")
    shards.prefetch(np.arange(300))
    for _ in range(2):
        with pytest.raises(remote.Unavailable, match=r"part-00002.* could not be copied in 2 attempts: its sha256"):
            shards[2 * 128]
    assert shards[0]["key"] != shards[255]["key"]
    assert "part-00002.00000.mds" not in copied(tmp_path / "cache")


@pytest.fixture(scope="module")
def fork():
    """Starts processes that have everything imported, and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["posmask.train.loader"])
    return context


def read_all(cache, variables, results):
    os.environ.update(variables)
    shards = Shards(("s3://bucket/scenes/train",), cache)
    shards.prefetch(np.arange(len(shards)))
    results.put([shards[i]["image"] for i in range(len(shards))])


def test_processes_share_a_cache_and_copy_each_shard_once(built, store, fork, tmp_path):
    results = fork.Queue()
    ranks = [fork.Process(target=read_all, args=(tmp_path / "cache", store.variables, results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    local = Shards((f"{built}/train",))
    expected = [local[i]["image"] for i in range(len(local))]
    assert [results.get(timeout=120) == expected for _ in ranks] == [True] * 3
    for rank in ranks:
        rank.join()
    asked = [path for method, path in store.requests if method == "GET" and path.endswith(".mds")]
    assert sorted(asked) == sorted(set(asked))


def test_a_killed_copy_leaves_nothing_that_is_taken_for_whole(built, store, fork, tmp_path):
    stalled = threading.Event()
    name = "part-00001.00000.mds"

    def stall(method, path):
        if method == "GET" and path.endswith(name) and not stalled.is_set():
            stalled.set()
            return "stall"
        return None

    store.fault = stall
    nobody = fork.Queue()
    process = fork.Process(target=read_all, args=(tmp_path / "cache", store.variables, nobody))
    process.start()
    assert stalled.wait(60)
    time.sleep(0.3)
    process.kill()
    process.join()
    there = copied(tmp_path / "cache")
    assert name not in there and any(n.startswith(name) for n in there), "a part of it was there"
    shards, local = Shards(("s3://bucket/scenes/train",), tmp_path / "cache"), Shards((f"{built}/train",))
    assert [shards[i]["image"] for i in range(300)] == [local[i]["image"] for i in range(300)]
    assert name in copied(tmp_path / "cache") and not [n for n in copied(tmp_path / "cache") if ".tmp" in n]


def test_shards_built_anew_at_the_same_url_are_not_mixed_with_old_copies(built, store, tmp_path):
    before = Shards(("s3://bucket/scenes/train",), tmp_path / "cache")[0]
    store.put(built / "val", "s3://bucket/scenes/train")  # its files overwrite those of the same names
    after = Shards(("s3://bucket/scenes/train",), tmp_path / "cache")
    assert len(after) == 30 and after[0]["image"] == Shards((f"{built}/val",))[0]["image"] != before["image"]


def test_names_that_leave_the_folder_are_refused(built, store, tmp_path):
    index = (built / "train" / "index.json").read_text().replace("part-00000.00000.mds", "../escaped.mds")
    store.client.put_object(Bucket="bucket", Key="scenes/train/index.json", Body=index.encode())
    with pytest.raises(remote.Unavailable, match=r"refused, since its index names '\.\./escaped\.mds'"):
        Shards(("s3://bucket/scenes/train",), tmp_path / "cache")[0]
