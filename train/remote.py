"""Folders of shards, on a disk or in an object store whose files are copied to this machine when first needed.

Copies come by streaming's downloader, hence from whatever that reads: s3://, gs://, azure://, oci://, hf://.
"""

from __future__ import annotations

import os
import re
import time
from functools import cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from filelock import FileLock
from streaming.base.storage.download import BOTOCORE_CLIENT_ERROR_CODES, CloudDownloader

from posmask.prep.shards import BUILD_AGAIN, Manifest, temporary_path

NUM_ATTEMPTS = 5  # each of which makes a few of its own
FIRST_WAIT_S = 1.0  # between two attempts; doubles
TIMEOUT_S = 60.0  # without a byte
CHUNK_BYTES = 1 << 20


class Unavailable(ValueError):
    """A file of a folder of shards that cannot be had; the message names it."""


class Missing(Unavailable):
    """... because it is not there, or not for everybody to see: stores give one answer for both."""


def default_cache() -> Path:
    """Where copies are kept: $XDG_CACHE_HOME/posmask, or ~/.cache/posmask."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posmask"


def is_remote(folder: str) -> bool:
    return "://" in folder


def beside(folder: str, name: str) -> str | None:
    """The folder `name` beside `folder`, if there are shards in it."""
    if not is_remote(folder):
        there = Path(folder).parent / name
        return str(there) if (there / "index.json").is_file() else None
    url = f"{folder.rstrip('/').rpartition('/')[0]}/{name}"
    try:
        with TemporaryDirectory() as temporary:
            download(f"{url}/index.json", Path(temporary) / "index.json")
    except Missing:
        return None
    return url


def open_folder(folder: str, cache_folder: Path | None) -> LocalFolder:
    """A folder of shards with manifest, index and tokenizer at hand; copies go below `cache_folder`."""
    return RemoteFolder(folder, cache_folder or default_cache()) if is_remote(folder) else LocalFolder(Path(folder))


class LocalFolder:
    """Shards on a disk of this machine, or on one that it shares."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = Manifest.load(path)

    def fetch(self, name: str, expected_sha256: str | None = None) -> Path:
        """The local path of a file. Raises Missing. The hash is for copies: a disk is not read twice."""
        if not (self.path / name).is_file():
            raise Missing(f"{self.path} lacks {name}; {BUILD_AGAIN}, or copy it from where the shards came from")
        return self.path / name


class RemoteFolder(LocalFolder):
    """Shards at a URL, and what has been copied of them into a folder of the cache.

    That folder is named by the content of manifest and index, so that shards built anew under the same URL never mix
    with copies of the old ones, and a file in it is right: it gets its name when whole and checked. Any number of
    processes of one machine may share it.
    """

    def __init__(self, url: str, cache_folder: Path) -> None:
        self.url = url.rstrip("/")
        try:
            cache_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"--cache {cache_folder}: {error.strerror}; name a folder to write to") from None
        with TemporaryDirectory(dir=cache_folder, suffix=".tmp") as temporary:
            names = ("manifest.json", "index.json")
            try:
                paths = [download(f"{self.url}/{name}", Path(temporary) / name) for name in names]
            except Missing as error:
                raise Missing(f"{self.url} holds no posmask shards: {error}") from None
            content = sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
            self.path = cache_folder / f"{re.sub('[^A-Za-z0-9]+', '-', self.url)[-80:]}-{content[:16]}"
            self.path.mkdir(exist_ok=True)
            for path in paths:
                path.replace(self.path / path.name)
        self.manifest = Manifest.load(self.path)
        for name in self.manifest.tokenizer.files:
            self.fetch(f"tokenizer/{name}", self.manifest.tokenizer.sha256 if name == "vocab.txt" else None)

    def fetch(self, name: str, expected_sha256: str | None = None) -> Path:
        """The local path of a file, which is copied if it is not there yet. Raises Unavailable."""
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise Unavailable(f"{self.url}: refused, since its index names {name!r}, a file outside the folder")
        path = self.path / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with FileLock(self.path / f"{name.replace('/', '-')}.lock"):
                if not path.exists():
                    for leftover in path.parent.glob(f"{path.name}.*.tmp*"):  # of killed processes
                        leftover.unlink()
                    download(f"{self.url}/{name}", path, expected_sha256)
        return path


def download(url: str, path: Path, expected_sha256: str | None = None) -> Path:
    """Copy a file such that it is at `path` whole or not at all. Raises Unavailable when that goes wrong repeatedly."""
    downloader = _downloader(url[: url.index("/", url.index("://") + 3)])
    for attempt in range(NUM_ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
        temporary = temporary_path(path)
        try:
            downloader.download(url, str(temporary), TIMEOUT_S)
            if expected_sha256 in (None, _sha256(temporary)):
                return temporary.replace(path)
            reason = "its sha256 is not the one that the index has"
        except Exception as error:  # each store has its own; the last one is shown
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if _is_missing(error):
                raise Missing(f"{url} is not there, or not readable with these credentials") from error
        finally:
            temporary.unlink(missing_ok=True)
    raise Unavailable(f"{url} could not be copied in {NUM_ATTEMPTS} attempts: {reason}")


@cache
def _downloader(store: str) -> CloudDownloader:
    """For a scheme and a bucket or host; threads may share it. To connect takes longer than to copy a small file."""
    try:
        return CloudDownloader.get(store)
    except (ImportError, ValueError) as error:
        raise Unavailable(f"{store} cannot be read: {error}") from None


def _is_missing(error: Exception) -> bool:
    code = getattr(error, "response", {}).get("Error", {}).get("Code")  # of botocore
    return isinstance(error, FileNotFoundError) or code in BOTOCORE_CLIENT_ERROR_CODES


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
