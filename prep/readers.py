"""Read the files that captions come in: text, JSON, tables of rows, tar archives; on a disk or at a URL.

All functions raise ValueError with the file and a remedy.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from posmask.prep import locations

NOT_JSON = (json.JSONDecodeError, RecursionError)  # the second: too many brackets in one another


def read_text(path: Path) -> str:
    """The content of a UTF-8 file."""
    try:
        with locations.reaching(path):
            return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"no such file: {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None


def load_json(path: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(read_text(path))
    except NOT_JSON as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None


def read_rows(path: Path, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    """The two `columns` of every row of the table at `path`."""
    if (suffix := path.suffix.lower()) not in READERS:
        raise ValueError(f"--table {path}: unknown kind {suffix or '(no suffix)'}; known: {' '.join(READERS)}")
    return READERS[suffix](path, columns)


def column_names(path: Path) -> list[str]:
    """The columns of a .csv, or of the first row of a .jsonl."""
    first, _, _ = read_text(path).partition("\n")
    if path.suffix.lower() == ".csv":
        return next(csv.reader([first]), [])
    try:
        row = json.loads(first)
    except NOT_JSON as error:
        raise ValueError(f"{path}, line 1 is not readable as JSON: {error}") from None
    return list(row) if isinstance(row, dict) else []


def _check_columns(path: Path, columns: tuple[str, str], there: Sequence[str]) -> None:
    for column in columns:
        if column not in there:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(map(str, there)) or 'none'}")


def read_plain_rows(path: Path, num_columns: int) -> Iterator[list[str]]:
    """The rows of a file of `num_columns` columns with tabs between, no header and no quoting."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line:
            continue
        row = line.removesuffix("\r").split("\t")
        if len(row) != num_columns:
            raise ValueError(f"{path}, line {number}: {len(row)} columns, but --columns names {num_columns}")
        yield row


def _read_delimited(path: Path, columns: tuple[str, str], delimiter: str) -> Iterator[tuple[Any, Any]]:
    csv.field_size_limit(sys.maxsize)
    # Not splitlines(): it would also break rows at U+2028 and form feeds.
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    _check_columns(path, columns, reader.fieldnames or ())
    image, caption = columns
    try:
        yield from ((row[image], row[caption]) for row in reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _read_jsonl(path: Path, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except NOT_JSON as error:
            raise ValueError(f"{path}, line {number} is not readable as JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        _check_columns(path, columns, tuple(row))
        yield row[columns[0]], row[columns[1]]


def _read_parquet(path: Path, columns: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
    with _open_parquet(path) as file:
        _check_columns(path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(columns=list(columns)):
            yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with (
            locations.reaching(path),
            locations.open_binary(path) as content,
            pyarrow.parquet.ParquetFile(content) as file,
        ):
            yield file
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except locations.Unreachable:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not readable as parquet: {str(error).splitlines()[0]}") from None


def read_parquet_pairs(
    path: Path, image_column: str, caption_column: str
) -> Iterator[tuple[int, int, str | None, Any]]:
    """(row group, row in it, the image's path if the file has it, caption) of every row; no image is read."""
    from pyarrow import types

    with _open_parquet(path) as file:
        _check_columns(path, (image_column, caption_column), file.schema_arrow.names)
        kind = file.schema_arrow.field(image_column).type
        names = {field.name for field in kind} if types.is_struct(kind) else set()
        if "bytes" not in names and not types.is_binary(kind) and not types.is_large_binary(kind):
            raise ValueError(f"{path}: the column {image_column!r} holds {kind}, no images; see the source table")
        columns = [caption_column, *([f"{image_column}.path"] if "path" in names else [])]
        for group in range(file.num_row_groups):
            content = file.read_row_group(group, columns=columns)
            paths = content[image_column].to_pylist() if "path" in names else [None] * len(content)
            for row, (caption, image) in enumerate(zip(content[caption_column].to_pylist(), paths, strict=True)):
                yield group, row, image and image["path"], caption


@lru_cache(maxsize=2)  # a chunk of records lies in one row group, or in two
def _read_row_group(path: Path, group: int, column: str) -> Any:
    with _open_parquet(path) as file:
        return file.read_row_group(group, columns=[column])[column]


def read_parquet_image(path: Path, group: int, row: int, column: str) -> bytes:
    """The bytes of an image in a struct of bytes and path, or in plain bytes. Raises OSError where there are none."""
    value = _read_row_group(path, group, column)[row].as_py()
    data = value["bytes"] if isinstance(value, dict) else value
    if data is None:
        raise FileNotFoundError(f"row {row} of {path} has no image")
    return data


READERS: dict[str, Callable[[Path, tuple[str, str]], Iterator[tuple[Any, Any]]]] = {
    ".csv": partial(_read_delimited, delimiter=","),
    ".tsv": partial(_read_delimited, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def read_tar(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The samples of a tar archive: the name up to the first dot, and by suffix where its files lie (offset, bytes).

    Files of one sample stand together (github.com/webdataset/webdataset). Nothing is unpacked; still, a member whose
    name could leave a folder, or that is a link, means an archive nobody should trust, and is refused.
    """
    name, files = "", {}
    try:
        with (
            locations.reaching(path),
            locations.open_binary(path) as file,
            tarfile.open(fileobj=file, mode="r:") as archive,
        ):
            for member in archive:
                parts = PurePosixPath(member.name).parts
                if member.issym() or member.islnk() or ".." in parts or member.name.startswith("/"):
                    raise ValueError(f"{path}: refused, since {member.name!r} is a link or leaves the archive's folder")
                if not member.isreg() or member.issparse():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                full = f"{folder}/{stem}" if folder else stem
                if full != name:
                    if files:
                        yield name, files
                    name, files = full, {}
                files[suffix.lower()] = (member.offset_data, member.size)
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except locations.Unreachable:
        raise
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not readable as an uncompressed tar archive: {error}") from None
    if files:
        yield name, files


def read_member(path: Path, offset: int, num_bytes: int) -> bytes:
    """`num_bytes` of a file from `offset`. Raises ValueError when the file ends before."""
    data = locations.read_span(path, offset, offset + num_bytes)
    if len(data) != num_bytes:
        raise ValueError(f"{path} is truncated")
    return data
