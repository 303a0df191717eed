"""Where images and captions come from: one function per source, each returning a sequence of records.

A source is any Sequence of Record with `.name` and `.licence`; `posmask.prep.scenes.Scenes` is one. Indexing it is
cheap: images are read in `Record.load`, by whichever process needs them. All functions raise ValueError, with a remedy,
for what a user can mend.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
NOT_STATED = "not stated"
# The stamps of Tux Paint keep translations below the English sentence: "de.utf8=Ein Apfel."
TRANSLATION = re.compile(r"[a-z]{2,3}(_[A-Za-z]{2,4})?(@\w+)?(\.utf8)?=")


@dataclass(frozen=True)
class Record:
    """One image with all its captions, as the source has them."""

    key: str  # stable name inside the source
    captions: tuple[str, ...]
    load: Callable[[], bytes]  # the encoded image; raises OSError or ValueError when unreadable


class Source(Sequence[Record]):
    """Records in memory under a name and a licence."""

    def __init__(self, name: str, licence: str, records: Sequence[Record]) -> None:
        self.name, self.licence, self.records = name, licence, records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


def coco(annotations: Sequence[Path], images: Path) -> Source:
    """COCO captions JSON, one file or several; key = file_name, looked up in `images` and its direct sub-folders."""
    _check_folder(images, "--images")
    captions: dict[str, list[str]] = {}
    licences: set[str] = set()
    for path in annotations:
        content = _load_json(path)
        try:
            licence_names = {licence["id"]: licence["name"] for licence in content.get("licenses", ())}
            names = {image["id"]: image["file_name"] for image in content["images"]}
            licences |= {licence_names.get(image.get("license"), NOT_STATED) for image in content["images"]}
            for name in names.values():
                captions.setdefault(_text(name, path), [])
            for annotation in content["annotations"]:
                captions[names[annotation["image_id"]]].append(_text(annotation["caption"], path))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no COCO captions file ({type(error).__name__}: {error}); it needs images[].id and "
                "images[].file_name, annotations[].image_id and annotations[].caption"
            ) from None
    folders = [images, *sorted(path for path in images.iterdir() if path.is_dir())]
    _check_any_image(captions, folders)
    return Source("coco", "; ".join(sorted(licences)), _records(captions, folders))


def table(path: Path, image_column: str, caption_column: str, images: Path | None = None) -> Source:
    """CSV, TSV, JSONL or parquet; key = the image column. Rows with the same image become one record.

    Images are looked up in `images` (default: the table's folder). A caption may be a list of strings in JSONL and
    parquet.
    """
    rows = _read_rows(path, (image_column, caption_column))
    captions: dict[str, list[str]] = {}
    for image, caption in rows:
        entries = caption if isinstance(caption, list) else [caption]
        captions.setdefault(_text(image, path), []).extend(_text(e, path) for e in entries if e is not None)
    folders = [images or path.parent]
    _check_folder(folders[0], "--images")
    _check_any_image(captions, folders)
    return Source("table", NOT_STATED, _records(captions, folders))


def folder(images: Path) -> Source:
    """Every image in `images`, recursively, with the .txt of the same name: one caption a line; key = relative path."""
    _check_folder(images, "--images")
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"no image found under {images}; known kinds: {' '.join(sorted(IMAGE_SUFFIXES))}")
    captions = {path.relative_to(images).as_posix(): _read_captions(path.with_suffix(".txt")) for path in found}
    if not any(captions.values()):
        raise ValueError(f"no image under {images} has captions in a .txt file of the same name beside it")
    return Source("folder", NOT_STATED, _records(captions, [images]))


def without(source: Sequence[Record], excluded: set[str], limit: int | None) -> tuple[Source, int]:
    """The first `limit` records of `source` that are not `excluded`, and how many were excluded on the way.

    An entry excludes a record by its key, its file name with or without suffix, or its COCO image id.
    """
    end = len(source) if limit is None else limit
    kept: list[int] = []
    num_excluded = 0
    for i in range(len(source)) if excluded else ():
        if len(kept) >= end:
            break
        if excluded.isdisjoint(_names(source[i].key)):
            kept.append(i)
        else:
            num_excluded += 1
    records = _View(source, kept if excluded else range(min(end, len(source))))
    return Source(source.name, source.licence, records), num_excluded


class _View(Sequence[Record]):
    """Some records of another sequence, fetched when asked for."""

    def __init__(self, records: Sequence[Record], indices: Sequence[int]) -> None:
        self.records, self.indices = records, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.records[self.indices[index]]


def _names(key: str) -> Iterator[str]:
    yield key
    name = key.rsplit("/", 1)[-1]
    yield name
    stem = name.rsplit(".", 1)[0]
    yield stem
    if match := re.fullmatch(r"(?:COCO_[a-z]+\d+_)?0*(\d+)", stem):
        yield match[1]


def _records(captions: dict[str, list[str]], folders: list[Path]) -> list[Record]:
    return [Record(key, tuple(texts), partial(_read_image, folders, key)) for key, texts in captions.items()]


def _read_image(folders: list[Path], name: str) -> bytes:
    for candidate in folders:
        if (path := candidate / name).is_file():
            return path.read_bytes()
    raise FileNotFoundError(name)


def _check_folder(path: Path, flag: str) -> None:
    if not path.is_dir():
        raise ValueError(f"{flag} {path}: no such folder")


def _check_any_image(names: Iterable[str], folders: list[Path]) -> None:
    """Images that lack here and there are dropped and counted later; if all do, the folder is the wrong one."""
    checked = 0
    for name in names:
        checked += 1
        if any((candidate / name).is_file() for candidate in folders):
            return
    if checked:
        raise ValueError(f"no image found: none of {checked} names, such as {name}, is in {folders[0]}; see --images")


def _text(value: Any, path: Path) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{path}: expected text, found {value!r}; image names and captions must be strings")


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no COCO captions file: it holds a {type(content).__name__}, not an object")
    return content


def _read_captions(path: Path) -> list[str]:
    lines = _read_text(path).splitlines() if path.is_file() else []
    return [line for line in lines if line.strip() and not TRANSLATION.match(line)]


def _read_rows(path: Path, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    """The two `columns` of every row of the table at `path`."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    if (suffix := path.suffix.lower()) not in READERS:
        raise ValueError(f"--table {path}: unknown kind {suffix or '(no suffix)'}; known: {' '.join(READERS)}")
    return READERS[suffix](path, columns)


def _check_columns(path: Path, columns: tuple[str, str], there: Sequence[str]) -> None:
    for column in columns:
        if column not in there:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(map(str, there)) or 'none'}")


def _read_delimited(path: Path, columns: tuple[str, str], delimiter: str) -> Iterator[tuple[Any, Any]]:
    csv.field_size_limit(sys.maxsize)
    # Not splitlines(): it would also break rows at U+2028 and form feeds.
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter)
    _check_columns(path, columns, reader.fieldnames or ())
    image, caption = columns
    try:
        yield from ((row[image], row[caption]) for row in reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _read_jsonl(path: Path, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not readable as JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        _check_columns(path, columns, tuple(row))
        yield row[columns[0]], row[columns[1]]


def _read_parquet(path: Path, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(columns=list(columns)):
                yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not readable as parquet: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Path, tuple[str, str]], Iterator[tuple[Any, Any]]]] = {
    ".csv": partial(_read_delimited, delimiter=","),
    ".tsv": partial(_read_delimited, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
