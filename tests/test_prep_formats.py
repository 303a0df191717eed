"""The formats that captioned images are passed around in, each file made by the format's own library."""

import io
import json
import pickle
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from posmask.prep import shards, sources
from posmask.prep.build_shards import main


def picture(number, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (40 + number, 32), (number * 8 % 256, 90, 120)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "val2014").mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(picture(i))
        (folder / "val2014" / f"v{i}.jpg").write_bytes(picture(i))
    return folder


def content(source):
    return [(record.key, record.captions) for record in source]


def built(tmp_path, *command):
    """The keys and captions that the command line puts into shards."""
    from streaming.base.format import reader_from_json

    out = tmp_path / "out"
    assert main([*map(str, command), "--out", str(out), "--workers", "1", "--tokenizer", "train:200"]) == 0
    assert shards.Manifest.load(out).dropped == {}
    index = json.loads((out / "index.json").read_text())
    readers = [reader_from_json(str(out), None, shard) for shard in index["shards"]]
    return [(reader[i]["key"], tuple(reader[i]["captions"])) for reader in readers for i in range(len(reader))]


def karpathy_file(path):
    def image(name, split, *captions, **more):
        sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions]
        return {"filename": name, "split": split, "sentences": sentences} | more

    images = [
        image("0.jpg", "train", "A cat.", "The cat."),
        image("1.jpg", "val", "A dog."),
        image("v2.jpg", "restval", "A bird.", filepath="val2014", cocoid=2),
        image("2.jpg", "test", "A fish."),
    ]
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def test_karpathy_splits(images, tmp_path):
    path = karpathy_file(tmp_path / "dataset_coco.json")
    train = [("0.jpg", ("A cat.", "The cat."))]
    assert content(sources.karpathy([path], images)) == train
    assert content(sources.karpathy([path], images, "val")) == [("1.jpg", ("A dog.",))]
    with_restval = [*train, ("val2014/v2.jpg", ("A bird.",))]
    assert content(sources.karpathy([path], images, restval=True)) == with_restval
    command = ("karpathy", "--annotations", path, "--images", images)
    assert built(tmp_path, *command, "--restval") == with_restval
    with pytest.raises(ValueError, match=r"no image of the split 'dev' in .*; it has restval, test, train, val"):
        sources.karpathy([path], images, "dev")
    path.write_text('{"images": [{"filename": "0.jpg"}]}')
    with pytest.raises(ValueError, match=r"is no file of Karpathy splits .KeyError: 'split'"):
        sources.karpathy([path], images)


def test_albef_lists(images, tmp_path):
    pairs = [{"image": "0.jpg", "caption": "A cat."}, {"image": "1.jpg", "caption": ["A dog.", "The dog."]}]
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(pairs))
    second.write_text(json.dumps([{"image": "0.jpg", "caption": "The cat.", "image_id": 3}]))
    expected = [("0.jpg", ("A cat.", "The cat.")), ("1.jpg", ("A dog.", "The dog."))]
    assert content(sources.albef([first, second], images)) == expected
    assert built(tmp_path, "albef", "--annotations", first, second, "--images", images) == expected
    wrong = {'[{"image": "0.jpg"}]': "KeyError: 'caption'", '["0.jpg"]': "TypeError", "3": "TypeError"}
    for text, message in wrong.items():
        first.write_text(text)
        with pytest.raises(ValueError, match=f"is no file of list of pairs .*{message}"):
            sources.albef([first], images)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_image_folders_with_metadata(images, tmp_path, name):
    rows = [("0.jpg", "A cat, asleep."), ("val2014/v1.jpg", "A dog.")]
    expected = [(image, (caption,)) for image, caption in rows]
    for column in ("text", "caption", "words"):
        if name.endswith("csv"):
            text = f'file_name,{column}\n' + "".join(f'{image},"{caption}"\n' for image, caption in rows)
        else:
            text = "".join(json.dumps({"file_name": image, column: caption}) + "\n" for image, caption in rows)
        (images / name).write_text(text)
        if column != "words":
            assert content(sources.folder(images)) == expected
    with pytest.raises(ValueError, match="no column 'text'; it has file_name, words"):
        sources.folder(images)
    assert built(tmp_path, "folder", "--images", images, "--caption-column", "words") == expected
    (images / name).unlink()
    with pytest.raises(ValueError, match=r"--caption-column words: .* has none of metadata\.csv, metadata\.jsonl"):
        sources.folder(images, "words")


def test_tsv_of_cc3m(images, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('a "quoted" cat\t0.jpg\r\nthe cat\t0.jpg\n\na dog\tval2014/v1.jpg\n')
    expected = [("0.jpg", ('a "quoted" cat', "the cat")), ("val2014/v1.jpg", ("a dog",))]
    assert content(sources.tsv(path, images=images)) == expected
    path.write_text("0.jpg\t7\ta cat\n")
    command = ("tsv", "--table", path, "--images", images, "--columns", "image,-,caption")
    assert built(tmp_path, *command) == [("0.jpg", ("a cat",))]
    with pytest.raises(ValueError, match="line 1: 3 columns, but --columns names 2"):
        sources.tsv(path, images=images)
    with pytest.raises(ValueError, match="--columns image,url: name caption and image once each"):
        sources.tsv(path, "image,url", images)


def img2dataset_tar(path):
    """As img2dataset lays a shard out; the third download failed, the fourth has its caption in the JSON only."""
    with webdataset.TarWriter(str(path)) as sink:
        sink.write({"__key__": "000000000", "jpg": picture(0), "txt": "A cat.", "json": {"caption": "A cat."}})
        sink.write({"__key__": "000000001", "png": picture(1, "PNG"), "txt": "A dög.\n", "json": {"sha256": "0"}})
        sink.write({"__key__": "000000002", "json": {"caption": "A fish.", "status": "failed_to_download"}})
        sink.write({"__key__": "000000003", "webp": picture(3, "WEBP"), "json": {"caption": ["A bird.", "The bird."]}})
    return path


def test_webdataset_tars(tmp_path):
    path = img2dataset_tar(tmp_path / "00000.tar")
    expected = [
        ("00000.tar/000000000", ("A cat.",)),
        ("00000.tar/000000001", ("A dög.",)),
        ("00000.tar/000000003", ("A bird.", "The bird.")),
    ]
    source = sources.webdataset([path])
    assert content(source) == expected
    assert [pickle.loads(pickle.dumps(record)).load() for record in source] == [
        picture(0), picture(1, "PNG"), picture(3, "WEBP"),
    ]  # fmt: skip
    assert [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)] == [
        f"00000000{i}" for i in range(4)
    ]
    assert built(tmp_path, "webdataset", "--files", path) == expected


@pytest.mark.parametrize("name", ["../0.jpg", "a/../../0.jpg", "/0.jpg"])
def test_a_tar_member_that_leaves_the_folder_is_refused(tmp_path, name):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match=r"t\.tar: refused, since '.*0\.jpg' is a link or leaves the archive's folder"):
        sources.webdataset([tmp_path / "t.tar"])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_is_refused(tmp_path, kind):
    member = tarfile.TarInfo("0.jpg")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"t\.tar: refused, since '0\.jpg' is a link"):
        sources.webdataset([tmp_path / "t.tar"])


def test_unusable_tars(tmp_path):
    path = img2dataset_tar(tmp_path / "t.tar")
    whole = path.read_bytes()
    with tarfile.open(tmp_path / "z.tar", "w:gz") as archive:
        archive.add(path, "x.txt")
    path.write_bytes(whole[:1500])
    (tmp_path / "text.tar").write_text("<html>not found</html>")
    for name in ("t.tar", "z.tar", "text.tar"):
        with pytest.raises(ValueError, match=f"{name} is not readable as an uncompressed tar archive"):
            sources.webdataset([tmp_path / name])
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"empty\.tar has no image with a caption"):
        sources.webdataset([tmp_path / "empty.tar"])
    with pytest.raises(ValueError, match="no such file"):
        sources.webdataset([tmp_path / "gone.tar"])


def test_hugging_face_parquet(tmp_path):
    """The schema of an Image column of Hugging Face datasets, its metadata included; a row group of two rows."""
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {"info": {"features": {"image": {"_type": "Image"}, "caption": {"dtype": "string", "_type": "Value"}}}}
    schema = pyarrow.schema(
        [("image", image), ("caption", pyarrow.list_(pyarrow.string()))],
        metadata={b"huggingface": json.dumps(features).encode()},
    )
    rows = {
        "image": [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(5)],
        "caption": [[f"Picture {i}.", f"The picture {i}."] for i in range(5)],
    }
    path = tmp_path / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows, schema), path, row_group_size=2)
    expected = [(f"{i}.jpg", (f"Picture {i}.", f"The picture {i}.")) for i in range(5)]
    source = sources.parquet([path])
    assert content(source) == expected
    assert [pickle.loads(pickle.dumps(record)).load() for record in source] == [picture(i) for i in range(5)]
    assert built(tmp_path, "parquet", "--files", path) == expected


def test_parquet_with_plain_bytes_and_no_paths(tmp_path):
    path = tmp_path / "p.parquet"
    table = pyarrow.table({"jpg": [picture(0), None, picture(2)], "txt": ["A cat.", "A dog.", None]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    source = sources.parquet([path], "jpg", "txt")
    assert content(source) == [
        ("p.parquet/0-0", ("A cat.",)), ("p.parquet/0-1", ("A dog.",)), ("p.parquet/1-0", ()),
    ]  # fmt: skip
    assert source[2].load() == picture(2)
    with pytest.raises(FileNotFoundError):
        source[1].load()
    with pytest.raises(ValueError, match="has no column 'image'; it has jpg, txt"):
        sources.parquet([path])
    with pytest.raises(ValueError, match="the column 'txt' holds string, no images; see the source table"):
        sources.parquet([path], "txt", "txt")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"p\.parquet is not readable as parquet"):
        sources.parquet([path], "jpg", "txt")


@pytest.mark.parametrize("name", ["../secret.jpg", "a/../../secret.jpg", "{parent}/secret.jpg"])
def test_paths_that_leave_the_image_folder_are_dropped_and_named(images, tmp_path, name):
    (tmp_path / "secret.jpg").write_bytes(picture(0))
    name = name.format(parent=tmp_path)
    path = tmp_path / "pairs.jsonl"
    rows = [{"i": "0.jpg", "t": "A cat."}, {"i": name, "t": "A dog."}, {"i": f"{images}/1.jpg", "t": "A fish."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["table", "--table", path, "--images", images, "--image-column", "i", "--caption-column", "t"]
    more = ["--out", tmp_path / "out", "--max-dropped", "0.5", "--workers", "1", "--tokenizer", "train:64"]
    assert main([*map(str, [*command, *more])]) == 0
    assert shards.Manifest.load(tmp_path / "out").dropped == {"path leaves the image folder": 1}
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert dropped == [{"key": name, "reason": "path leaves the image folder"}]
