"""Every kind of image becomes an upright baseline RGB JPEG in size, or a reason."""

import io

import numpy as np
import pytest
from PIL import Image

from posmask.prep.images import BrokenImage, is_plain_jpeg, normalise


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(jpeg):
    image = Image.open(io.BytesIO(jpeg.data))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert image.size == (jpeg.width, jpeg.height)
    return np.asarray(image).astype(int)


def halves(mode="RGB", left="red", right="blue", size=(40, 20)):
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def mean(pixels, side):
    """Mean colour of the inner part of one half, clear of the compressed edge."""
    width = pixels.shape[1]
    part = pixels[:, : width // 4] if side == "left" else pixels[:, -(width // 4) :]
    return part.reshape(-1, 3).mean(0)


def test_plain_jpeg_in_size_is_kept_byte_for_byte():
    data = encode(halves(), "JPEG", quality=80)
    assert is_plain_jpeg(data)
    jpeg = normalise(data, 256, 90)
    assert jpeg.data == data
    assert (jpeg.width, jpeg.height) == (40, 20)


@pytest.mark.parametrize(
    "data",
    [
        encode(halves(), "JPEG", progressive=True),
        encode(halves("CMYK"), "JPEG"),
        encode(halves("L", 200, 10), "JPEG"),
        encode(halves(), "JPEG", keep_rgb=True),
        encode(halves(), "JPEG") + b"appended",
        encode(halves()),
    ],
    ids=["progressive", "cmyk", "grey", "rgb-inside", "trailing-bytes", "png"],
)
def test_other_encodings_are_rewritten_as_plain_jpegs(data):
    assert not is_plain_jpeg(data)
    jpeg = normalise(data, 256, 95)
    assert is_plain_jpeg(jpeg.data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    for side in ("left", "right"):
        np.testing.assert_allclose(mean(decode(jpeg), side), mean(expected, side), atol=4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_modes(mode):
    grey = np.zeros((20, 40), np.uint16)
    grey[:, :20] = 255
    if mode == "I;16":
        image = Image.fromarray(grey * np.uint16(257))
    else:
        image = Image.fromarray(grey.astype(np.uint8)).convert(mode)
    pixels = decode(normalise(encode(image), 256, 95))
    assert mean(pixels, "left").min() > 250
    assert mean(pixels, "right").max() < 5


def test_sixteen_bits_are_scaled_not_clipped():
    image = Image.fromarray(np.full((20, 20), 0x8000, np.uint16))
    assert abs(decode(normalise(encode(image), 256, 95)).mean() - 128) < 2


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_becomes_white(mode):
    image = halves("RGBA", left=(0, 0, 0, 0), right=(0, 0, 255, 255))
    data = encode(image) if mode == "RGBA" else encode(image.quantize(4))
    pixels = decode(normalise(data, 256, 95))
    assert mean(pixels, "left").min() > 250
    assert mean(pixels, "right")[2] > 240


@pytest.mark.parametrize(
    ("orientation", "size", "left_is"), [(1, (40, 20), "red"), (3, (40, 20), "blue"), (6, (20, 40), None)]
)
def test_exif_orientation_is_applied_and_removed(orientation, size, left_is):
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = normalise(encode(halves(), "JPEG", exif=exif, quality=95), 256, 95)
    assert (jpeg.width, jpeg.height) == size
    assert Image.open(io.BytesIO(jpeg.data)).getexif().get(0x0112, 1) == 1
    if left_is:
        red, _, blue = mean(decode(jpeg), "left")
        assert (red > blue) == (left_is == "red")
    else:  # turned clockwise: the left half comes to the top
        assert decode(jpeg)[:10, :, 0].mean() > 200


@pytest.mark.parametrize(
    ("size", "expected"), [((1000, 500), (128, 64)), ((500, 1000), (64, 128)), ((90, 63), (90, 63))]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_short_side_is_limited_and_never_enlarged(size, expected, kind):
    jpeg = normalise(encode(Image.new("RGB", size, "green"), kind), 64, 90)
    assert (jpeg.width, jpeg.height) == expected


def test_downscaling_is_antialiased():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = decode(normalise(encode(Image.fromarray(stripes)), 64, 95))
    assert abs(pixels.mean() - 127.5) < 3
    assert pixels.std() < 5  # picking pixels would keep stripes or lose one colour


def jpeg_of_noise():
    return encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not an image"),
        (jpeg_of_noise()[:900], "damaged or truncated image"),
        (encode(Image.new("RGB", (64, 64), "red"))[:60], "damaged or truncated image"),
        (encode(Image.new("RGB", (1, 1))), "a side of less than 8 pixels"),
        (encode(Image.new("F", (20, 20)), "TIFF"), "floating-point pixels"),
        (encode(Image.new("1", (20_000, 10_000))), "more than 89478485 pixels"),
        (encode(Image.new("1", (10_000, 10_000))), "more than 89478485 pixels"),
    ],
    ids=["empty", "html", "truncated", "png", "one-pixel", "float", "bomb", "small-bomb"],
)
def test_what_cannot_be_used_has_a_reason(data, reason):
    with pytest.raises(BrokenImage) as error:
        normalise(data, 256, 90)
    assert str(error.value) == reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_damage_anywhere_gives_a_picture_or_a_reason(kind):
    rng = np.random.default_rng(0)
    data = np.frombuffer(encode(halves(), kind), np.uint8)
    num_refused = 0
    for _ in range(60):
        damaged = data[: rng.integers(1, len(data)) if rng.random() < 0.3 else None].copy()
        damaged[rng.integers(0, len(damaged), 3)] = rng.integers(0, 256, 3)
        try:
            decode(normalise(damaged.tobytes(), 16, 90))
        except BrokenImage:
            num_refused += 1
    assert num_refused > 5
