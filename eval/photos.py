"""Photos of a benchmark: found under the names they go by, prepared as training's were, encoded once each."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from posmask.prep.images import BrokenImage, normalise
from posmask.train.decode import make_decoder
from posmask.train.model import PosMaskModel

# COCO 2014 puts its split before the number of a photo, COCO 2017 does not; numbers are unique over both.
COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})\.jpg")
VISUAL7W_NAME = re.compile(r"v7w_(\d+\.jpg)")  # as VALSE calls the photos of Visual Genome
IMAGES_PER_WINDOW = 128
# The defaults of prep/build_shards.py.
MAX_SHORT_SIDE, JPEG_QUALITY = 256, 90


def add_arguments(parser: argparse.ArgumentParser, limit: str = "the first N items of each group") -> None:
    """Flags of every task that shows photos."""
    parser.add_argument("--annotations", required=True, metavar="PATH", help="the benchmark's file, or folder of files")
    parser.add_argument("--images", required=True, nargs="+", metavar="DIR", help="folders to look for photos in")
    parser.add_argument("--allow-missing", action="store_true", help="leave out items whose photo is not there")
    parser.add_argument("--limit", type=int, metavar="N", help=limit)


def check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: must be at least 1")


class PhotoFolders:
    """Looks photos up by name in several folders; a COCO photo also under the other names it has."""

    def __init__(self, folders: Iterable[str]):
        self.folders = list(folders)
        self.by_name: dict[str, Path] = {}
        self.by_number: dict[str, Path] = {}
        for folder in self.folders:
            if not Path(folder).is_dir():
                raise ValueError(f"--images {folder}: no such folder")
            for path in sorted(Path(folder).iterdir()):
                self.by_name.setdefault(path.name, path)
                if match := COCO_NAME.fullmatch(path.name):
                    self.by_number.setdefault(match[1], path)

    def find(self, name: str) -> Path | None:
        """Where the photo that annotations call `name` is, or None."""
        if name in self.by_name:
            return self.by_name[name]
        if match := COCO_NAME.fullmatch(name):
            return self.by_number.get(match[1])
        if match := VISUAL7W_NAME.fullmatch(name):
            return self.by_name.get(match[1])
        return None

    def missing(self, names: Iterable[str], allow_missing: bool) -> list[str]:
        """The names, each once, that no folder has. Raises ValueError if there are some and they are not allowed."""
        wanted = list(dict.fromkeys(names))
        missing = [name for name in wanted if self.find(name) is None]
        if missing and (not allow_missing or len(missing) == len(wanted)):
            first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            where = f"{len(missing)} of {len(wanted)} photos are not in --images {' '.join(self.folders)} ({first})"
            remedy = "name their folder" + ("" if allow_missing else ", or leave their items out with --allow-missing")
            raise ValueError(f"{where}: {remedy}")
        return missing


class PhotoEncoder:
    """From files to image tokens, by way of prep's normalisation and the decoder of training."""

    def __init__(self, model: PosMaskModel, folders: PhotoFolders, decode: str):
        config = model.config
        self.model, self.folders = model, folders
        self.device = next(model.parameters()).device
        self.decoder = make_decoder(decode, config.image_size, IMAGES_PER_WINDOW, self.device)
        self.mean = torch.tensor(config.image_mean, device=self.device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(config.image_std, device=self.device).view(1, 3, 1, 1) * 255

    def pixels(self, names: list[str]) -> Tensor:
        """(B, 3, S, S) fp32, normalised. Raises ValueError naming a file that is no picture."""
        encoded = []
        for name in names:
            path = self.folders.find(name)
            try:
                data = normalise(path.read_bytes(), MAX_SHORT_SIDE, JPEG_QUALITY).data
            except (BrokenImage, OSError) as error:
                raise ValueError(f"{path}: {error}; replace it, or remove it and use --allow-missing") from None
            encoded.append(np.frombuffer(bytearray(data), np.uint8))  # writable, as torch wants it
        whole = np.zeros((len(names), 2), np.float32), np.ones((len(names), 2), np.float32)
        pixels = self.decoder(encoded, *whole, names).permute(0, 3, 1, 2).float()
        return (pixels - self.mean) / self.std

    def windows(self, names: list[str]) -> Iterator[tuple[slice, Tensor]]:
        """Runs of `names`, about equally long, with their image tokens (B, N, D): each photo is encoded once."""
        num_windows = -(-len(names) // IMAGES_PER_WINDOW)
        for run in np.array_split(np.arange(len(names)), num_windows):
            window = slice(int(run[0]), int(run[-1]) + 1)
            yield window, self.model.image(self.pixels(names[window]))
