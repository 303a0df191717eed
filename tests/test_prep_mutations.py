"""1,000 broken, odd and hostile inputs: each is kept correctly or dropped with a reason, none stops the build."""

import io
import json
import random
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from posmask.prep import pos, shards, sources, tagging, units
from posmask.prep.samples import Preparer, Recipe
from posmask.prep.shards import Manifest, TokenizerInfo
from posmask.prep.sources import Record
from posmask.prep.verification import sample_problem
from posmask.prep.wordpiece import make, save

NUM_MUTATIONS = 1000
WORDS = "a the red blue cat dog sits runs on under mat tree . , can't black-and-white"


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, data=b""):
    """A PNG that claims a size, whatever its data hold."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def jpeg_of_claimed_size(data, width, height):
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def base_images():
    """name → (bytes, whether it must be kept)."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8).repeat(2, 0).repeat(2, 1))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [rgb.convert("P"), rgb.rotate(90).convert("P")]
    jpeg = encoded(rgb, "JPEG")
    return {
        "baseline": (jpeg, True),
        "progressive": (encoded(rgb, "JPEG", progressive=True), True),
        "grey": (encoded(rgb.convert("L"), "JPEG"), True),
        "cmyk": (encoded(rgb.convert("CMYK"), "JPEG"), True),
        "exif": (encoded(rgb, "JPEG", exif=exif), True),
        "alpha": (encoded(rgb.convert("RGBA"), "PNG"), True),
        "16-bit": (encoded(Image.fromarray(rng.integers(0, 65536, (40, 50)).astype(np.uint16)), "PNG"), True),
        "palette": (encoded(rgb.convert("P"), "PNG"), True),
        "animated gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), True),
        "animated webp": (encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]), True),
        "tiff": (encoded(rgb, "TIFF", compression="tiff_lzw"), True),
        "bmp": (encoded(rgb, "BMP"), True),
        "one pixel": (encoded(rgb.resize((1, 1)), "PNG"), False),
        "bomb png": (png(20_000, 20_000), False),
        "bomb jpeg": (jpeg_of_claimed_size(jpeg, 20_000, 20_000), False),
        "no data": (png(64, 64), False),
        "html": (b"<html><body>404 Not Found</body></html>", False),
        "empty": (b"", False),
        "zeros": (bytes(5000), False),
    }


def mutated(data, rng):
    """Truncated, bits flipped, bytes cut out, doubled or overwritten."""
    changed = bytearray(data)
    if not changed:
        return data
    at = rng.randrange(len(changed))
    how = rng.randrange(5)
    if how == 0:
        del changed[at:]
    elif how == 1:
        for _ in range(rng.choice((1, 1, 3, 30))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif how == 2:
        del changed[at : at + rng.randrange(1, 50)]
    elif how == 3:
        changed[at:at] = changed[at : at + rng.randrange(1, 50)]
    else:
        changed[at : at + 20] = rng.randbytes(20)
    return bytes(changed)


CAPTIONS = {
    "plain": "A red cat sits on the mat.",
    "empty": "",
    "spaces": " \t\u00a0\u200b",
    "control characters": "a \x00\x01\x07\x1b[31mred\x7f cat",
    "emoji": "a 👩‍👩‍👧‍👦 family 🏳️‍🌈 and 👍🏽 cat",
    "right to left": "קטה אדומה \u202e يجلس على mat",
    "mask": "a [MASK] cat [SEP] on [CLS] the [PAD] mat [UNK]",
    "half a surrogate": "a cat \ud83d",
    "invalid UTF-8": b"a caf\xe9 cat".decode("utf-8", "surrogateescape"),
    "combining marks": "a c" + "\u0301" * 300 + "at",
    "one long word": "cat" * 2000,
    "long": "The cat sits on the mat and " * 400,
    "line breaks": "a cat\r\n\u2028sits\x0b\x0con the mat",
    "punctuation": "?!.,;:" * 20,
}
UNUSABLE = {"empty", "spaces", "half a surrogate", "invalid UTF-8"}
REASONS = {
    "no caption", "only empty captions", "no caption in valid Unicode", "no such file", "unreadable file",
    "path leaves the image folder", "empty file", "not an image", "damaged or truncated image",
    "a side of less than 8 pixels", f"more than {Image.MAX_IMAGE_PIXELS} pixels", "floating-point pixels",
}  # fmt: skip


@pytest.fixture(scope="module")
def preparer(tmp_path_factory):
    out = tmp_path_factory.mktemp("mutations")
    save(make("train:300", [WORDS] * 9), out / "tokenizer")
    units.Units(("red cat",), None, (), None, (), {"concreteness": {"cat": 250}}).save(out / "units.json")
    tagger = tagging.find_tagger("auto")
    return Preparer(Recipe("s", out / "tokenizer", tagger, out / "units.json", False, 1, False, 256, 90, 48))


@pytest.fixture(scope="module")
def manifest(preparer):
    info = TokenizerInfo.read(preparer.recipe.tokenizer, "t")
    unset = dict.fromkeys(("tagger", "longest_caption", "image", "dropped", "records_per_part", "parts"))
    return Manifest(
        format_version=1, bits_computed=tuple(pos.BITS), scores=("concreteness",), tokenizer=info, max_tokens=48,
        sources=({"name": "s"},), counts={}, **unset,
    )  # fmt: skip


def test_a_thousand_mutations(preparer, manifest):
    rng = random.Random(0)
    images, texts = base_images(), list(CAPTIONS)
    must_keep, must_drop, records = set(), set(), []
    for number in range(NUM_MUTATIONS):
        name = rng.choice(list(images))
        data, good = images[name]
        # The first round takes every image and every caption as it is.
        pristine = number < len(images) * 2
        if pristine:
            name = list(images)[number % len(images)]
            data, good = images[name]
        else:
            data = mutated(data, rng)
        chosen = [texts[number % len(texts)]] if pristine else rng.choices(texts, k=rng.randrange(1, 3))
        if not pristine and "long" in chosen and rng.random() < 0.9:
            chosen = ["plain"]  # the parser takes its time over 10,000 characters
        captions = [CAPTIONS[text] for text in chosen]
        if not pristine and rng.random() < 0.3:
            characters = [*"".join(captions)[:500]]
            rng.shuffle(characters)
            captions, chosen = ["".join(characters)], ["shuffled"]
        key = f"{number} {name}: {', '.join(chosen)}"
        if pristine:
            (must_keep if good and not UNUSABLE.issuperset(chosen) else must_drop).add(key)
        records.append(Record(key, tuple(captions), lambda data=data: data))
    prepared = preparer(records)
    kept = {sample.key for sample in prepared.samples}
    dropped = dict(prepared.dropped)
    assert len(prepared.samples) + len(prepared.dropped) == len(kept) + len(dropped) == NUM_MUTATIONS
    assert set(dropped.values()) <= REASONS
    assert must_keep <= kept
    assert must_drop <= dropped.keys()
    assert len(kept) > 200
    assert len(dropped) > 200
    for sample in prepared.samples:
        columns = {name: getattr(sample, name) for name in shards.columns(len(manifest.scores))}
        assert sample_problem(columns, manifest) is None, (sample.key, sample_problem(columns, manifest))
        assert sample.num_empty + len(sample.captions) == len(next(r for r in records if r.key == sample.key).captions)
    reasons = Counter(dropped.values())
    assert reasons["damaged or truncated image"] > 50
    assert {"not an image", "empty file", "no caption in valid Unicode", "only empty captions"} <= reasons.keys()


def test_bombs_are_refused_by_their_headers(preparer):
    images = base_images()
    records = [Record(name, ("a cat",), lambda data=images[name][0]: data) for name in ("bomb png", "bomb jpeg")]
    reason = f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    assert preparer(records).dropped == [("bomb png", reason), ("bomb jpeg", reason)]


def source_files(folder):
    """One good file of each kind, and how to open it."""
    jpeg = base_images()["baseline"][0]
    for name in ("0.jpg", "1.jpg"):
        (folder / name).write_bytes(jpeg)
    pairs = [{"image": f"{i}.jpg", "caption": f"A cat {i}."} for i in range(2)]
    coco = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)],
        "annotations": [{"image_id": i, "caption": "A cat."} for i in range(2)],
    }
    split = [{"filename": "0.jpg", "split": "train", "sentences": [{"raw": "A cat."}]}]
    texts = {
        "a.json": json.dumps(pairs), "c.json": json.dumps(coco), "k.json": json.dumps({"images": split}),
        "t.csv": "image,caption\n0.jpg,A cat.\n", "t.jsonl": "".join(json.dumps(pair) + "\n" for pair in pairs),
        "p.tsv": "A cat.\t0.jpg\n", "metadata.csv": "file_name,text\n0.jpg,A cat.\n",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    table = pyarrow.table({"image": [{"bytes": jpeg, "path": "0.jpg"}] * 3, "caption": ["A cat."] * 3})
    pyarrow.parquet.write_table(table, folder / "p.parquet", row_group_size=2)
    with tarfile.open(folder / "w.tar", "w") as archive:
        members = {"0.jpg": jpeg, "0.txt": b"A cat.", "1.jpg": jpeg, "1.json": b'{"caption": "A cat."}'}
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return {
        "a.json": lambda path: sources.albef([path], folder),
        "c.json": lambda path: sources.coco([path], folder),
        "k.json": lambda path: sources.karpathy([path], folder),
        "t.csv": lambda path: sources.table(path, "image", "caption"),
        "t.jsonl": lambda path: sources.table(path, "image", "caption"),
        "p.tsv": lambda path: sources.tsv(path),
        "metadata.csv": lambda path: sources.folder(folder),
        "p.parquet": lambda path: sources.parquet([path]),
        "w.tar": lambda path: sources.webdataset([path]),
    }


def test_mutated_files_are_read_or_refused_by_name(tmp_path):
    rng = random.Random(1)
    outcomes = Counter()
    for name, read in source_files(tmp_path).items():
        path = tmp_path / name
        good = path.read_bytes()
        assert len(read(path)) > 0
        for _ in range(60):
            path.write_bytes(mutated(good, rng))
            try:
                source = read(path)
            except ValueError as error:
                assert name in str(error) or "no image" in str(error), error
                outcomes["refused"] += 1
                continue
            for record in source:
                assert all(isinstance(caption, str) for caption in record.captions)
                try:
                    assert isinstance(record.load(), bytes)
                except (OSError, ValueError):  # what the build counts as a dropped record
                    outcomes["unreadable"] += 1
            outcomes["read"] += 1
        path.write_bytes(good)
    assert min(outcomes["refused"], outcomes["read"]) > 50, outcomes
