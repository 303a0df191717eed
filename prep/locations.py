"""Where a source's files are: on a disk, or at a URL such as s3://bucket/folder, which fsspec reads.

A location is a pathlib.Path or, for a URL, a UPath (github.com/fsspec/universal_pathlib), which has the same methods.
Only what differs is here. `pip install posmask[s3]` brings what S3 needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 1 << 20  # read ahead from a URL; fsspec's own 50 MiB are too many for a few captions
WILDCARDS = "*?["


class Unreachable(OSError):
    """A store that does not give a file, which may well be there. It ends a build, where a broken file is dropped."""


def parse(text: str) -> Path:
    """The location that a user wrote. Raises ValueError for a URL that nothing installed can read."""
    if "://" not in text:
        return Path(text)
    try:
        from upath import UPath

        path = UPath(text)
        _ = path.fs  # imports what reads this kind of URL
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text}: {error}; for s3:// pip install 'posmask[s3]'") from None
    return path


def expand(text: str) -> list[Path]:
    """The locations that a user wrote, sorted: a URL may hold wildcards, which no shell expands."""
    path = parse(text)
    if isinstance(path, Path) or not any(character in text for character in WILDCARDS):
        return [path]
    with reaching(path):
        found = sorted(path.fs.glob(path.path))
    if not found:
        raise ValueError(f"no such file: {text}")
    return [parse(path.fs.unstrip_protocol(name)) for name in found]


@contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Raises Unreachable for what goes wrong between here and the store of a URL; a missing file stays one."""
    if isinstance(path, Path):
        yield
        return
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, Unreachable):
        raise
    except _store_errors() as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Unreachable(f"{path} cannot be read: {reason}; the same command tries again") from error


def _store_errors() -> tuple[type[Exception], ...]:
    """What fsspec's file systems raise beside OSError. Imported where a URL is read, so all of it is installed."""
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError

    return (OSError, asyncio.TimeoutError, aiohttp.ClientError, BotoCoreError, ClientError)


def open_binary(path: Path) -> BinaryIO:
    """A file to read here and there in."""
    return path.open("rb") if isinstance(path, Path) else path.open("rb", buffering=BLOCK_BYTES)


def read_span(path: Path, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes of a file from `start` to before `end`, or as many as there are; one request where it is a URL."""
    with reaching(path):
        if not isinstance(path, Path):
            return path.fs.cat_file(path.path, start=start, end=end) if start is None or start != end else b""
        with path.open("rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))
