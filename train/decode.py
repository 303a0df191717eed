"""JPEG bytes to square uint8 images: DALI (on the GPU where there is one), or Pillow on the CPU.

Both take the crop of each sample as shares of the image, so that it follows the sample and not a generator's state.
The two decoders differ by a few grey levels; a run uses one of them throughout.
"""

from __future__ import annotations

import importlib.util
import io
import logging
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

log = logging.getLogger("posmask")


class UndecodableImage(ValueError):
    """A sample whose image no decoder reads; the message names it."""


class Decoder(Protocol):
    def __call__(self, encoded: list[np.ndarray], anchors: np.ndarray, shapes: np.ndarray, keys: list[str]) -> Tensor:
        """encoded: B arrays of JPEG bytes; anchors, shapes (B, 2) fp32: the crop's (x, y) and (width, height) as shares
        of the image; keys: names for errors. Returns (B, S, S, 3) uint8. Raises UndecodableImage.
        """


def make_decoder(decode: str, image_size: int, max_images: int, device: torch.device) -> Decoder:
    """`decode` is auto (DALI if it is installed, and says so if not), dali or cpu."""
    if decode == "auto" and importlib.util.find_spec("nvidia.dali") is None:
        log.warning("--decode auto: nvidia-dali is not installed, decoding with Pillow on the CPU")
        decode = "cpu"
    return CpuDecoder(image_size, device) if decode == "cpu" else DaliDecoder(image_size, max_images, device)


class DaliDecoder:
    """DALI's decoder, crop and antialiased resize; `mixed` on a GPU, CPU operators without one."""

    def __init__(self, image_size: int, max_images: int, device: torch.device, num_threads: int = 2):
        from nvidia.dali import fn, pipeline_def, types

        @pipeline_def(batch_size=max_images, num_threads=num_threads, prefetch_queue_depth=1)
        def decode(where: str):
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            anchor = fn.external_source(name="anchor", dtype=types.FLOAT, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.FLOAT, ndim=1)
            image = fn.decoders.image_slice(
                encoded, anchor, shape, device=where, axis_names="WH", output_type=types.RGB,
                normalized_anchor=True, normalized_shape=True,
            )  # fmt: skip
            return fn.resize(image, size=[image_size, image_size], antialias=True, interp_type=types.INTERP_LINEAR)

        self.device = device
        self.image_size = image_size
        self.on_gpu = device.type == "cuda"
        self.pipeline = decode("mixed" if self.on_gpu else "cpu", device_id=device.index if self.on_gpu else None)
        self.pipeline.build()

    def __call__(self, encoded: list[np.ndarray], anchors: np.ndarray, shapes: np.ndarray, keys: list[str]) -> Tensor:
        self.pipeline.feed_input("encoded", encoded)
        self.pipeline.feed_input("anchor", list(anchors))
        self.pipeline.feed_input("shape", list(shapes))
        try:
            (images,) = self.pipeline.run()
        except RuntimeError as error:
            raise _name_undecodable(encoded, keys, error) from error
        # DALI owns its output until the next run, so it is copied out; on a GPU, on the current stream.
        if self.on_gpu:
            from nvidia.dali.plugin.pytorch import feed_ndarray

            size = self.image_size
            pixels = torch.empty(len(encoded), size, size, 3, dtype=torch.uint8, device=self.device)
            return feed_ndarray(images.as_tensor(), pixels, cuda_stream=torch.cuda.current_stream())
        return torch.from_numpy(np.array(images.as_tensor()))


class CpuDecoder:
    """Pillow, one sample after the other; its resize antialiases and takes a fractional crop."""

    def __init__(self, image_size: int, device: torch.device):
        self.image_size = image_size
        self.device = device

    def __call__(self, encoded: list[np.ndarray], anchors: np.ndarray, shapes: np.ndarray, keys: list[str]) -> Tensor:
        size = (self.image_size, self.image_size)
        images = []
        for data, (x, y), (w, h), key in zip(encoded, anchors, shapes, keys, strict=True):
            image = _open(data, key)
            box = (x * image.width, y * image.height, min(1, x + w) * image.width, min(1, y + h) * image.height)
            images.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=tuple(map(float, box)))))
        return torch.from_numpy(np.stack(images)).to(self.device)


def _open(data: np.ndarray, key: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow says SyntaxError of a broken header
        raise UndecodableImage(f"the image of sample {key!r} cannot be decoded; build the shards again") from error


def _name_undecodable(encoded: list[np.ndarray], keys: list[str], error: RuntimeError) -> Exception:
    """DALI fails a whole batch: find the sample, so that the user can remove it."""
    for data, key in zip(encoded, keys, strict=True):
        try:
            _open(data, key)
        except UndecodableImage as named:
            return named
    return error
