"""Sources give the same records however the pairs are stored, and name what is wrong with a file."""

import csv
import json
from pathlib import Path

import pytest

from posmask.prep import sources

PAIRS = [("b/1.jpg", "a cat, asleep"), ("2.jpg", 'a "red"\u2028dog'), ("b/1.jpg", "the cat\nsleeps")]
RECORDS = [("b/1.jpg", ("a cat, asleep", "the cat\nsleeps")), ("2.jpg", ('a "red"\u2028dog',))]


@pytest.fixture
def images(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jpg").write_bytes(b"one")
    (tmp_path / "2.jpg").write_bytes(b"two")
    return tmp_path


def content(source):
    return [(record.key, record.captions) for record in source]


def write_table(path):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"img": i, "text": t}) + "\n\n" for i, t in PAIRS))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"img": [i for i, _ in PAIRS], "text": [t for _, t in PAIRS]}), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([("img", "text"), *PAIRS])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables(images, suffix):
    path = images / f"pairs{suffix}"
    write_table(path)
    source = sources.table(path, "img", "text")
    assert content(source) == RECORDS
    assert [record.load() for record in source] == [b"one", b"two"]
    with pytest.raises(ValueError, match=r"no column 'words'; it has img, text"):
        sources.table(path, "img", "words")


def test_a_caption_may_be_a_list(images):
    (images / "t.jsonl").write_text(json.dumps({"img": "2.jpg", "text": ["one", None, "two"]}))
    assert content(sources.table(images / "t.jsonl", "img", "text")) == [("2.jpg", ("one", "two"))]


def test_a_name_may_begin_like_its_folder(images, monkeypatch):
    (images / "b" / "b").mkdir()
    (images / "b" / "b" / "1.jpg").write_bytes(b"inner")
    monkeypatch.chdir(images)
    (images / "t.jsonl").write_text(json.dumps({"img": "b/1.jpg", "text": "a cat"}))
    assert sources.table(images / "t.jsonl", "img", "text", Path("b"))[0].load() == b"inner"


def coco_file(path, names, captions, **more):
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    annotations = [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, **more}))
    return path


def test_coco_merges_files_and_finds_images_in_sub_folders(images):
    first = coco_file(images / "a.json", ["1.jpg", "2.jpg"], [(0, "x"), (1, "y"), (0, "z")])
    second = coco_file(images / "b.json", ["2.jpg", "3.jpg"], [(0, "w")])
    source = sources.coco([first, second], images)
    assert content(source) == [("1.jpg", ("x", "z")), ("2.jpg", ("y", "w")), ("3.jpg", ())]
    assert source[0].load() == b"one"
    assert source.licence == "not stated"
    with pytest.raises(FileNotFoundError):
        source[2].load()


def test_folder_reads_a_caption_a_line_and_no_translations(images):
    (images / "2.txt").write_text("An apple.\n\nde.utf8=Ein Apfel.\npt_br.utf8=Uma maçã.\nA fruit = food.\n")
    assert content(sources.folder(images)) == [("2.jpg", ("An apple.", "A fruit = food.")), ("b/1.jpg", ())]


def test_without_leaves_out_by_key_name_and_coco_id():
    keys = ["val2017/000000000030.jpg", "COCO_train2014_000000000071.jpg", "x/cat.png", "x/30.png", "dog.png"]
    source = sources.Source("s", "l", [sources.Record(key, (), bytes) for key in keys])

    def kept(excluded, limit=None):
        subset, num_excluded = sources.without(source, excluded, limit)
        return [keys.index(record.key) for record in subset], num_excluded

    assert kept(set()) == ([0, 1, 2, 3, 4], 0)
    assert kept({"30"}) == ([1, 2, 4], 2)
    assert kept({"71", "cat"}) == ([0, 3, 4], 2)
    assert kept({"x/cat.png", "unknown"}) == ([0, 1, 3, 4], 1)
    assert kept({"71"}, limit=2) == ([0, 2], 1)
    assert kept(set(), limit=2) == ([0, 1], 0)
    assert kept(set(), limit=99) == ([0, 1, 2, 3, 4], 0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "no column 'img'; it has none"),
        ("t.csv", "img,text\nnowhere.jpg,a\n", "no image found: none of 1 names, such as nowhere.jpg"),
        ("t.jsonl", '{"img": "2.jpg", "text": "a"}\n{"img"', "line 2 is not readable as JSON"),
        ("t.jsonl", '{"img": 2, "text": "a"}', "expected text, found 2"),
        ("t.jsonl", "[1]", "line 1: expected an object, found list"),
        ("t.parquet", "no parquet", "not readable as parquet"),
        ("t.xlsx", "", "unknown kind .xlsx; known: .csv .tsv .jsonl .parquet"),
        ("gone.csv", None, "no such file"),
    ],
)
def test_unreadable_tables(images, name, text, message):
    if text is not None:
        (images / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        sources.table(images / name, "img", "text")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "is no file of COCO captions .AttributeError"),
        ("{}", "is no file of COCO captions .KeyError: 'images'."),
        ('{"images": [{"id": 1, "file_name": "2.jpg"}], "annotations": [{"image_id": 9}]}', "KeyError: 9"),
        ("[" * 100_000, "not readable as JSON: maximum recursion depth"),
        ('{"images": [{"id": 1, "file_name": "9.jpg"}], "annotations": []}', "no image found"),
    ],
)
def test_unreadable_annotations(images, text, message):
    (images / "c.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        sources.coco([images / "c.json"], images)


def test_not_utf8_is_named(images):
    (images / "t.csv").write_bytes("img,text\n2.jpg,caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        sources.table(images / "t.csv", "img", "text")
