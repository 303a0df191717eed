"""Turn whatever image a source has into what the shards hold: a baseline RGB JPEG, upright, in size, decodable.

The loader's decoders cannot skip a bad sample, so every image is fully decoded here and a broken one is refused.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps

# Naming the formats keeps rarely used decoders, and their ways of failing, away from foreign files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
Image.init()  # open() with named formats doesn't load their plugins itself
MIN_SIDE = 8  # pixels; anything smaller is a tracking pixel or a spacer, not a picture
ORIENTATION = 0x0112  # EXIF tag
# What PIL's decoders raise on damaged files of these formats.
DAMAGED = (OSError, SyntaxError, ValueError, struct.error, zlib.error)


class BrokenImage(ValueError):
    """An image that cannot be used; the message is a reason fit for counting, so it names no file."""


@dataclass(frozen=True)
class Jpeg:
    """An encoded image and its size in pixels."""

    data: bytes
    width: int
    height: int


def normalise(data: bytes, max_short_side: int, quality: int) -> Jpeg:
    """The image in `data` as a baseline RGB JPEG, upright and with a short side of at most `max_short_side` pixels.

    The bytes are kept when they are that already. Otherwise: EXIF orientation applied and all metadata dropped,
    transparency laid over white, 16 bits reduced to 8, everything else converted to RGB, downscaled with an
    antialiasing filter, encoded at `quality`. Raises BrokenImage with the reason.
    """
    if not data:
        raise BrokenImage("empty file")
    with _refused():
        return _normalise(Image.open(io.BytesIO(data), formats=FORMATS), data, max_short_side, quality)


def check_jpeg(data: bytes) -> None:
    """Raise BrokenImage unless `data` is what `normalise` makes, and decodes to the end."""
    if not is_plain_jpeg(data):
        raise BrokenImage("no baseline RGB JPEG")
    with _refused():
        Image.open(io.BytesIO(data), formats=("JPEG",)).load()


@contextmanager
def _refused() -> Iterator[None]:
    """Turns what PIL raises on foreign bytes into BrokenImage; a bomb is refused before its pixels are unpacked."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except BrokenImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenImage(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise BrokenImage("not an image") from None
    except DAMAGED:
        raise BrokenImage("damaged or truncated image") from None


def _normalise(image: Image.Image, data: bytes, max_short_side: int, quality: int) -> Jpeg:
    if min(image.size) < MIN_SIDE:
        raise BrokenImage(f"a side of less than {MIN_SIDE} pixels")
    upright = image.getexif().get(ORIENTATION, 1) == 1
    if upright and min(image.size) <= max_short_side and is_plain_jpeg(data):
        image.load()
        return Jpeg(data, *image.size)
    if image.format == "JPEG":
        # Let the JPEG decoder halve the size while at least twice the final size is left for the filter.
        image.draft(None, tuple(2 * side for side in _fit(image.size, max_short_side)))
    image.load()
    image = _to_rgb(ImageOps.exif_transpose(image))
    if (size := _fit(image.size, max_short_side)) != image.size:
        # A triangle filter, antialiased when it shrinks, as training pipelines use; bicubic takes 1.7 times as long.
        image = image.resize(size, Image.Resampling.BILINEAR)
    image.info.clear()  # the encoder would copy comments from it
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Jpeg(buffer.getvalue(), *image.size)


def _fit(size: tuple[int, int], max_short_side: int) -> tuple[int, int]:
    """`size` shrunk, never enlarged, to a short side of `max_short_side`."""
    scale = min(1.0, max_short_side / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenImage("floating-point pixels")
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip at 255 instead of scaling
        image = image.convert("I")
        if image.getextrema()[1] > 255:
            image = image.point(lambda value: value * (1 / 257))
        return image.convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def is_plain_jpeg(data: bytes) -> bool:
    """Whether `data` is one complete baseline (SOF0), 8-bit, three-component YCbCr JPEG, judged by its headers.

    Marker layout: ITU-T T.81, annex B; the colour transform byte: Adobe technical note 5116.
    """
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return False
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        body = data[at + 4 : at + 2 + length]
        if marker == 0xEE and body.startswith(b"Adobe") and body[11:12] != b"\x01":
            return False  # stored as RGB, not YCbCr: decoders disagree
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker == 0xC0 and body[0:1] == b"\x08" and body[5:6] == b"\x03"
        at += 2 + length
    return False
