"""JPEG bytes to square uint8 images: DALI on a GPU, torchvision on a CPU, either on demand.

Both take the crop of each sample as shares of the image, so that it follows the sample and not a generator's state.
They differ by a few grey levels; a run uses one of them throughout. On a CPU torchvision is the faster one
(benchmarks/bench_loader.py).
"""

from __future__ import annotations

import importlib.util
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

log = logging.getLogger("posmask")


class BadSample(ValueError):
    """A sample that nothing can be learned from; `what` names it, and the message adds the remedy."""

    def __init__(self, what: str):
        super().__init__(
            f"{what}; build the shards again (pretrain.py leaves it out with --on-bad-sample skip)"
        )
        self.what = what


class UndecodableImage(BadSample):
    """A sample whose image the decoder does not read; `index` is its place in the batch."""

    def __init__(self, key: str, index: int):
        super().__init__(f"the image of sample {key!r} cannot be decoded")
        self.index = index


class Decoder(Protocol):
    def __call__(self, encoded: list[np.ndarray], anchors: np.ndarray, shapes: np.ndarray, keys: list[str]) -> Tensor:
        """encoded: B arrays of JPEG bytes; anchors, shapes (B, 2) fp32: the crop's (x, y) and (width, height) as shares
        of the image; keys: names for errors. Returns (B, S, S, 3) uint8. Raises UndecodableImage.
        """


def make_decoder(decode: str, image_size: int, max_images: int, device: torch.device) -> Decoder:
    """`decode` is dali, cpu, or auto: DALI on a GPU (where it is not installed, cpu with a warning), else cpu."""
    if decode == "auto" and device.type == "cuda" and importlib.util.find_spec("nvidia.dali") is None:
        log.warning("--decode auto: nvidia-dali is not installed, decoding with torchvision on the CPU")
        decode = "cpu"
    if decode == "dali" or (decode == "auto" and device.type == "cuda"):
        return DaliDecoder(image_size, max_images, device, num_cores())
    return CpuDecoder(image_size, device, num_cores())


def num_cores() -> int:
    """The cores of this rank: its share of those that the ranks of this machine may use."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class DaliDecoder:
    """DALI's decoder, crop and antialiased resize; `mixed` on a GPU, CPU operators without one."""

    def __init__(self, image_size: int, max_images: int, device: torch.device, num_threads: int = 2):
        self.device, self.image_size, self.max_images, self.num_threads = device, image_size, max_images, num_threads
        self.on_gpu = device.type == "cuda"
        self._build()

    def _build(self) -> None:
        from nvidia.dali import fn, pipeline_def, types

        @pipeline_def(batch_size=self.max_images, num_threads=self.num_threads, prefetch_queue_depth=1)
        def decode(where: str):
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            anchor = fn.external_source(name="anchor", dtype=types.FLOAT, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.FLOAT, ndim=1)
            image = fn.decoders.image_slice(
                encoded, anchor, shape, device=where, axis_names="WH", output_type=types.RGB,
                normalized_anchor=True, normalized_shape=True,
            )  # fmt: skip
            return fn.resize(image, size=[self.image_size] * 2, antialias=True, interp_type=types.INTERP_LINEAR)

        on = "mixed" if self.on_gpu else "cpu"
        self.pipeline = decode(on, device_id=self.device.index if self.on_gpu else None)
        self.pipeline.build()

    def __call__(self, encoded: list[np.ndarray], anchors: np.ndarray, shapes: np.ndarray, keys: list[str]) -> Tensor:
        self.pipeline.feed_input("encoded", encoded)
        self.pipeline.feed_input("anchor", list(anchors))
        self.pipeline.feed_input("shape", list(shapes))
        try:
            (images,) = self.pipeline.run()
        except RuntimeError as error:
            self._build()  # DALI calls a pipeline that has failed no longer valid
            if len(encoded) == 1:
                raise UndecodableImage(keys[0], 0) from error
            self._find_undecodable(encoded, keys)
            raise
        # DALI owns its output until the next run, so it is copied out; on a GPU, on the current stream.
        if self.on_gpu:
            from nvidia.dali.plugin.pytorch import feed_ndarray

            size = self.image_size
            pixels = torch.empty(len(encoded), size, size, 3, dtype=torch.uint8, device=self.device)
            return feed_ndarray(images.as_tensor(), pixels, cuda_stream=torch.cuda.current_stream())
        return torch.from_numpy(np.array(images.as_tensor()))

    def _find_undecodable(self, encoded: list[np.ndarray], keys: list[str]) -> None:
        """DALI fails a whole batch: raises UndecodableImage for the first that fails alone."""
        for index, (data, key) in enumerate(zip(encoded, keys, strict=True)):
            try:
                self([data], np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32), [key])
            except UndecodableImage as error:
                raise UndecodableImage(key, index) from error


class CpuDecoder:
    """torchvision: libjpeg-turbo, and torch's antialiased resize of uint8 into the sample's place in the batch."""

    def __init__(self, image_size: int, device: torch.device, num_threads: int = 1):
        self.image_size = image_size
        self.device = device
        self.num_threads = num_threads
        self.map = map
        if num_threads > 1:
            # Each thread works on samples of its own; torch would start a team of threads in every one.
            self.map = ThreadPoolExecutor(num_threads, "decoder", torch.set_num_threads, (1,)).map

    def __call__(self, encoded: list[np.ndarray], anchors: np.ndarray, shapes: np.ndarray, keys: list[str]) -> Tensor:
        size = self.image_size
        pixels = torch.empty(len(encoded), size, size, 3, dtype=torch.uint8)
        places = pixels.permute(0, 3, 1, 2).split(1)
        # Python's numbers: numpy's cost more than the decoding of a small image.
        crops = list(zip(anchors.tolist(), shapes.tolist(), strict=True))

        @torch.inference_mode()  # of each thread; without it none may write to what was made in that mode
        def decode_every_nth(first: int) -> None:
            for index in range(first, len(encoded), self.num_threads):
                try:
                    image = decode_jpeg(torch.from_numpy(encoded[index]), ImageReadMode.RGB)
                except RuntimeError as error:
                    raise UndecodableImage(keys[index], index) from error
                self._resize(image, *crops[index], places[index])

        # One call for each thread and not for each sample: handing over costs as much as decoding a small image.
        for _ in self.map(decode_every_nth, range(self.num_threads)):
            pass
        return pixels.to(self.device)

    def _resize(self, image: Tensor, anchor: list[float], shape: list[float], place: Tensor) -> None:
        """Fills `place` (1, 3, S, S) with the crop of `image` (3, height, width), both channels last in memory."""
        height, width = image.shape[1:]
        (x, y), (w, h) = anchor, shape
        left, right = round(x * width), round((x + w) * width)
        top, bottom = round(y * height), round((y + h) * height)
        image = image[None, :, top : max(bottom, top + 1), left : max(right, left + 1)]
        # F.interpolate(mode="bilinear", antialias=True), which cannot write to where the result belongs.
        torch.ops.aten._upsample_bilinear2d_aa.out(image, [self.image_size] * 2, False, None, None, out=place)
