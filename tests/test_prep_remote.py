"""Sources at s3:// URLs give what the same files on a disk give, and say in one line what a store does not give."""

import io
import json
import sys
import tarfile
from importlib import import_module

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from posmask.prep import shards, sources
from posmask.prep.arguments import make_parser
from posmask.prep.build_shards import main, open_source

NUM_PICTURES = 6


def picture(i):
    buffer = io.BytesIO()
    Image.new("RGB", (40 + i, 30), (i * 40, 90, 120)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same pairs in every layout that a source reads."""
    folder = tmp_path_factory.mktemp("files")
    names = [f"{i}.jpg" for i in range(NUM_PICTURES)]
    texts = [f"Picture {i} shows a cat." for i in range(NUM_PICTURES)]
    (folder / "pictures" / "sub").mkdir(parents=True)
    for i, (name, text) in enumerate(zip(names, texts, strict=True)):
        (folder / "pictures" / name).write_bytes(picture(i))
        (folder / "pictures" / name).with_suffix(".txt").write_text(text)
    (folder / "pictures" / "sub" / "7.png").write_bytes(picture(7))
    pairs = list(zip(names, texts, strict=True))
    (folder / "albef.json").write_text(json.dumps([{"image": n, "caption": t} for n, t in pairs]))
    images = [{"id": i, "file_name": n} for i, n in enumerate(names)]
    captions = [{"image_id": i, "caption": t} for i, t in enumerate(texts)]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": captions}))
    split = [{"filename": n, "split": "train", "sentences": [{"raw": t}]} for n, t in pairs]
    (folder / "karpathy.json").write_text(json.dumps({"images": split}))
    (folder / "pairs.tsv").write_text("".join(f"{t}\t{n}\n" for n, t in pairs))
    (folder / "pairs.csv").write_text("image,caption\n" + "".join(f"{n},{t}\n" for n, t in pairs))
    table = pyarrow.table({"image": names, "caption": texts})
    pyarrow.parquet.write_table(table, folder / "pairs.parquet")
    inside = pyarrow.table({"image": [picture(i) for i in range(NUM_PICTURES)], "caption": texts})
    for start in (0, 3):
        pyarrow.parquet.write_table(inside.slice(start, 3), folder / f"train-{start}.parquet", row_group_size=2)
        with tarfile.open(folder / f"{start}.tar", "w") as archive:
            for i in range(start, start + 3):
                for name, data in ((f"{i}.jpg", picture(i)), (f"{i}.txt", texts[i].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


IMAGES = ["--images", "{at}/pictures"]
COMMANDS = {
    "coco": ["--annotations", "{at}/coco.json", *IMAGES],
    "karpathy": ["--annotations", "{at}/karpathy.json", *IMAGES],
    "albef": ["--annotations", "{at}/albef.json", *IMAGES],
    "tsv": ["--table", "{at}/pairs.tsv", *IMAGES],
    "table": ["--table", "{at}/pairs.csv", "--image-column", "image", "--caption-column", "caption", *IMAGES],
    "folder": IMAGES,
    "webdataset": ["--files", "{at}/0.tar", "{at}/3.tar"],
    "parquet": ["--files", "{at}/train-0.parquet", "{at}/train-3.parquet"],
}


def opened(source, at, *flags):
    words = [word.format(at=at) for word in flags or COMMANDS[source]]
    return open_source(make_parser().parse_args([source, *words]))


@pytest.mark.parametrize("source", COMMANDS)
def test_the_same_records_from_s3(files, object_store, source):
    object_store.put(files, "s3://bucket/data")
    local, remote = opened(source, files), opened(source, "s3://bucket/data")
    assert [(r.key, r.captions) for r in remote] == [(r.key, r.captions) for r in local]
    assert len(local) == NUM_PICTURES + (source == "folder")
    assert [r.load() for r in remote] == [r.load() for r in local]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


def build(at, out, *more):
    columns = ["--image-column", "image", "--caption-column", "caption"]
    shared = ["--tokenizer", "train:64", "--workers", "1", "--records-per-part", "4", "--out", str(out)]
    return main(["table", "--table", f"{at}/pairs.parquet", "--images", f"{at}/pictures", *columns, *shared, *more])


def test_shards_from_s3_have_the_same_bytes_though_requests_fail(files, object_store, tmp_path):
    object_store.put(files, "s3://bucket/data")
    assert build(files, tmp_path / "local") == 0
    counts = {}

    def fail(method, path):
        """The first time that something is asked for, differently for each."""
        counts[method, path] = counts.get((method, path), 0) + 1
        return ("error", "truncate", "drop")[len(counts) % 3] if counts[method, path] == 1 else None

    object_store.fault = fail
    assert build("s3://bucket/data", tmp_path / "remote", "--workers", "2") == 0
    assert max(counts.values()) > 1
    assert content(tmp_path / "remote") == content(tmp_path / "local")


def test_wildcards_are_for_files(files, object_store):
    object_store.put(files, "s3://bucket/data")
    source = opened("parquet", "", "--files", "s3://bucket/data/train-*.parquet")
    assert [record.key for record in source] == [record.key for record in opened("parquet", files)]
    with pytest.raises(ValueError, match=r"no such file: s3://bucket/data/none-\*.tar"):
        opened("webdataset", "", "--files", "s3://bucket/data/none-*.tar")


@pytest.mark.parametrize("name", ["../secret.jpg", "s3://bucket/secret.jpg", "/secret.jpg", "file:///etc/hostname"])
def test_paths_that_leave_the_folder_of_a_url(files, object_store, name):
    object_store.put(files, "s3://bucket/data")
    object_store.client.put_object(Bucket="bucket", Key="data/secret.jpg", Body=b"secret")
    rows = [{"image": "s3://bucket/data/pictures/0.jpg", "caption": "a"}, {"image": name, "caption": "b"}]
    lines = "\n".join(map(json.dumps, rows))
    object_store.client.put_object(Bucket="bucket", Key="data/pairs.jsonl", Body=lines.encode())
    columns = ["--image-column", "image", "--caption-column", "caption", *IMAGES]
    source = opened("table", "s3://bucket/data", "--table", "{at}/pairs.jsonl", *columns)
    assert source[0].load() == picture(0), "a URL inside the folder is right"
    with pytest.raises(sources.OutsideFolder):
        source[1].load()


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("albef", ["--annotations", "s3://bucket/none.json", "--images", "s3://bucket/data/pictures"],
         "no such file: s3://bucket/none.json"),
        ("albef", ["--annotations", "s3://bucket/data/albef.json", "--images", "s3://nowhere/pictures"],
         "--images s3://nowhere/pictures: no such folder"),
        ("albef", ["--annotations", "s3://bucket/data/albef.json", "--images", "s3://bucket/data"],
         "no image found: none of 6 names, such as 0.jpg, is in s3://bucket/data; see --images"),
        ("webdataset", ["--files", "s3://bucket/none.tar"], "no such file: s3://bucket/none.tar"),
        ("webdataset", ["--files", "s3://nowhere/none.tar"], "no such file: s3://nowhere/none.tar"),
        ("parquet", ["--files", "s3://bucket/none.parquet"], "no such file: s3://bucket/none.parquet"),
        ("parquet", ["--files", "s3://bucket/data/albef.json"], "albef.json is not readable as parquet"),
        ("parquet", ["--files", "gopher://bucket/p"], "gopher://bucket/p: Unsupported filesystem: 'gopher'"),
        ("tsv", ["--table", "s3://bucket/data/0.tar"], "0.tar is not UTF-8 text"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_in_one_line(files, object_store, tmp_path, capsys, source, flags, message):
    object_store.put(files, "s3://bucket/data")
    assert main([source, *flags, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_its_packages_a_url_is_refused(tmp_path, monkeypatch, capsys):
    for module in ("upath", "s3fs"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            if module == "s3fs":
                import_module("fsspec.registry")._registry.pop("s3", None)  # what it has imported before
            assert main(["webdataset", "--files", "s3://bucket/a.tar", "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "s3://bucket/a.tar: " in error and "pip install 'posmask[s3]'" in error and error.count("\n") == 1


def test_a_store_that_stops_answering_stops_the_build_and_drops_nothing(files, object_store, tmp_path, capsys):
    """An image that is missing is dropped; one that the store does not give may be fine."""
    object_store.put(files, "s3://bucket/data")
    object_store.client.delete_object(Bucket="bucket", Key="data/pictures/1.jpg")
    out = tmp_path / "out"
    object_store.fault = lambda method, path: "error" if path.endswith("/5.jpg") else None
    assert build("s3://bucket/data", out, "--max-dropped", "0.5") == 2
    error = capsys.readouterr().err
    assert "s3://bucket/data/pictures/5.jpg cannot be read: " in error and error.count("\n") == 1
    assert not (out / "part-00001.json").exists()
    object_store.fault = lambda method, path: None
    assert build("s3://bucket/data", out, "--max-dropped", "0.5") == 0
    assert shards.Manifest.load(out).dropped == {"no such file": 1}
