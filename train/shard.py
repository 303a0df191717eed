"""One file of shards as training reads it: fetched when first needed, every sample checked against its CRC-32."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from streaming.base.format import reader_from_json

from posmask.prep.shards import read_json
from posmask.train.decode import BadSample
from posmask.train.remote import LocalFolder, Missing

log = logging.getLogger("posmask")

NOT_IN_HEADER = ("raw_data", "zip_data", "samples")  # what only the index knows of a file
MAX_COLUMNS_BYTES = 1 << 16  # of the columns' description in the header


class Shard:
    """Random access to the samples of one MDS file.

    The file is the number of samples, N + 1 offsets (all uint32), a description of the columns in JSON, and the samples
    (docs.mosaicml.com/projects/streaming, "MDS").
    """

    def __init__(self, folder: LocalFolder, entry: dict[str, Any]) -> None:
        """entry: the file's place in index.json."""
        self.folder, self.entry = folder, entry
        self.name, self.num_samples = entry["raw_data"]["basename"], entry["samples"]
        self.part = f"{self.name.partition('.')[0]}.json"
        self.decode_sample = reader_from_json(str(folder.path), None, entry).decode_sample
        self.path: Path | None = None  # once it is open

    def open(self) -> None:
        """Fetch the file if it is not here, and read what its samples are found and checked by. Raises Unavailable."""
        if self.path is not None:
            return
        path = self.folder.fetch(self.name, self.entry["raw_data"]["hashes"].get("sha256"))
        with path.open("rb") as file:
            numbers = file.read(4 * (self.num_samples + 2)).ljust(4 * (self.num_samples + 2), b"\0")
            columns = file.read(MAX_COLUMNS_BYTES)
        self.numbers = np.frombuffer(numbers, np.uint32)
        self.is_damaged = self.numbers[0] != self.num_samples or not self._describes(columns)
        self.checksums = self._read_checksums()
        self.path = path  # last, since another thread may ask at the same time

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The columns of sample i. Raises BadSample where any bit of it, or of the file's header, has changed."""
        self.open()
        if self.is_damaged:
            raise BadSample(f"{self.path} is damaged: its header is not the one that index.json describes")
        begin, end = self.numbers[i + 1 : i + 3].tolist()
        data = b""
        if begin < end <= self.entry["raw_data"]["bytes"]:
            with self.path.open("rb", buffering=0) as file:
                file.seek(begin)
                data = file.read(end - begin)
        if not data or (self.checksums is not None and crc32(data) != self.checksums[i]):
            raise BadSample(f"{self.path}, sample {i} is damaged: its CRC-32 is not the one in {self.part}")
        return self.decode_sample(data)

    def _describes(self, columns: bytes) -> bool:
        """Whether `columns` begins with the description that the index has. Nothing that it says is used."""
        try:
            there, _ = json.JSONDecoder().raw_decode(columns.decode("latin-1"))
        except json.JSONDecodeError:
            return False
        return there == {key: value for key, value in self.entry.items() if key not in NOT_IN_HEADER}

    def _read_checksums(self) -> np.ndarray | None:
        """(N,) uint32, the CRC-32 of each sample; None where there are none, as in copies of the .mds files alone."""
        try:
            part = read_json(self.folder.fetch(self.part))
        except Missing:
            part = {}
        if "sample_crc32" not in part:
            _say_unchecked(self.folder.path)
            return None
        start = 0
        for entry in part["shards"]:
            if entry["raw_data"]["basename"] == self.name:
                return np.array(part["sample_crc32"][start : start + self.num_samples], np.uint32)
            start += entry["samples"]
        raise ValueError(f"{self.folder.path}: index.json lists {self.name}, which {self.part} does not")


@cache
def _say_unchecked(folder: Path) -> None:
    """Once for a folder."""
    log.warning("%s has no part-*.json with checksums: a damaged sample of it may not be noticed", folder)
