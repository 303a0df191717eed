"""Draw a scene as a small anti-aliased picture.

Nouns differ in outline alone, so that colour, texture and size are free; an action is a mark around its whole group,
large enough to survive 64 pixels. Shapes are drawn once as large masks and scaled down to where they are used.
Coordinates of shapes are fractions of their own box, x to the right, y downwards.
"""

from __future__ import annotations

import functools
import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from posmask.prep.scene_layout import Cluster, frame, polar
from posmask.prep.scene_world import Group, Scene

MASK_SIZE = 192  # pixels of a mask before scaling: at least 4 x the largest use
OUTLINE = 12  # of these pixels, about one pixel at the usual size of an object
MIN_SIDE, MAX_SIDE, MAX_ASPECT = 64, 112, 1.2
JPEG_QUALITY = 90

RGB = {
    "black": (24, 24, 24), "blue": (36, 72, 232), "green": (24, 158, 48), "pink": (255, 132, 196),
    "purple": (136, 36, 190), "red": (222, 26, 26), "white": (252, 252, 252), "yellow": (252, 224, 30),
}  # fmt: skip
INK = (38, 38, 38)
BACKGROUNDS = ((202, 214, 204), (222, 212, 194), (198, 210, 224), (206, 206, 206), (216, 206, 218))


class Pen:
    """Draws white on a black mask in fractions of the mask; `hole` draws black."""

    def __init__(self, inset: int = 0) -> None:
        self.image = Image.new("L", (MASK_SIZE, MASK_SIZE))
        self._draw = ImageDraw.Draw(self.image)
        self._inset = inset

    def _scale(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        span = MASK_SIZE - 1 - 2 * self._inset
        return [(self._inset + x * span, self._inset + y * span) for x, y in points]

    def polygon(self, *points: tuple[float, float], fill: int = 255) -> None:
        self._draw.polygon(self._scale(list(points)), fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: int = 255) -> None:
        self._draw.rectangle([*self._scale([(x0, y0), (x1, y1)])], fill=fill)

    def disc(self, x: float, y: float, rx: float, ry: float | None = None, fill: int = 255) -> None:
        ry = rx if ry is None else ry
        self._draw.ellipse([*self._scale([(x - rx, y - ry), (x + rx, y + ry)])], fill=fill)

    def line(self, *points: tuple[float, float], width: float) -> None:
        self._draw.line(self._scale(list(points)), fill=255, width=round(width * MASK_SIZE), joint="curve")


def burst(num_points: int, outer: float, inner: float) -> list[tuple[float, float]]:
    return [polar(k / (2 * num_points), inner if k % 2 else outer) for k in range(2 * num_points)]


def _ball(pen: Pen) -> None:
    pen.disc(0.5, 0.5, 0.5)


def _boat(pen: Pen) -> None:
    pen.polygon((0, 0.68), (1, 0.68), (0.8, 1), (0.2, 1))
    pen.box(0.42, 0, 0.5, 0.7)
    pen.polygon((0.5, 0), (0.98, 0.58), (0.5, 0.58))


def _box(pen: Pen) -> None:
    pen.box(0.04, 0.04, 0.96, 0.96)


def _car(pen: Pen) -> None:
    pen.box(0, 0.5, 1, 0.74)
    pen.polygon((0.12, 0.52), (0.28, 0.22), (0.66, 0.22), (0.84, 0.52))
    pen.disc(0.22, 0.76, 0.14)
    pen.disc(0.78, 0.76, 0.14)


def _cross(pen: Pen) -> None:
    pen.box(0.34, 0, 0.66, 1)
    pen.box(0, 0.34, 1, 0.66)


def _cup(pen: Pen) -> None:
    pen.disc(0.72, 0.42, 0.28)
    pen.disc(0.72, 0.42, 0.15, fill=0)
    pen.polygon((0, 0.06), (0.7, 0.06), (0.6, 0.96), (0.1, 0.96))


def _heart(pen: Pen) -> None:
    pen.disc(0.26, 0.28, 0.26)
    pen.disc(0.74, 0.28, 0.26)
    pen.polygon((0.03, 0.4), (0.5, 0.3), (0.97, 0.4), (0.5, 1))


def _house(pen: Pen) -> None:
    pen.polygon((0, 0.5), (0.5, 0), (1, 0.5))
    pen.box(0.16, 0.45, 0.84, 1)
    pen.box(0.4, 0.64, 0.6, 1, fill=0)


def _moon(pen: Pen) -> None:
    pen.disc(0.5, 0.5, 0.5)
    pen.disc(0.76, 0.4, 0.42, fill=0)


def _ring(pen: Pen) -> None:
    pen.disc(0.5, 0.5, 0.5)
    pen.disc(0.5, 0.5, 0.27, fill=0)


def _star(pen: Pen) -> None:
    pen.polygon(*burst(5, 0.53, 0.21))


def _tree(pen: Pen) -> None:
    pen.box(0.41, 0.7, 0.59, 1)
    pen.polygon((0.5, 0), (0.86, 0.46), (0.14, 0.46))
    pen.polygon((0.5, 0.2), (1, 0.8), (0, 0.8))


OUTLINES: dict[str, Callable[[Pen], None]] = {
    "ball": _ball, "boat": _boat, "box": _box, "car": _car, "cross": _cross, "cup": _cup,
    "heart": _heart, "house": _house, "moon": _moon, "ring": _ring, "star": _star, "tree": _tree,
}  # fmt: skip


# A mark is drawn in the group's box widened by MARGIN of scene_layout.py, so its objects fill about 0.15..0.85.
# `strength` is 0 for "slowly", 2 for "quickly", 1 where no manner is said.


def _flames(pen: Pen, strength: int, low: float) -> None:
    top, num_tongues = 0.42 - 0.21 * strength, 4
    for k in range(num_tongues):
        x0, x1 = k / num_tongues, (k + 1) / num_tongues
        height = top + (0.14 if k % 2 else 0)
        pen.polygon((x0, 1), (x0 + 0.02, 0.75), ((x0 + x1) / 2, height + low), (x1 - 0.02, 0.75), (x1, 1))
    pen.box(0, 0.75, 1, 1)


def _blink(pen: Pen, strength: int) -> None:
    pen.polygon(*burst((6, 10, 16)[strength], 0.7, 0.42))


def _fall(pen: Pen, strength: int) -> None:
    for k in range(2 + strength):
        x = 0.02 + 0.06 * k
        for side in (x, 1 - x):
            pen.line((side, 0), (side, 0.45 + 0.2 * strength - 0.1 * k), width=0.03)
    pen.polygon((0.3, 0.86), (0.7, 0.86), (0.5, 1))


def _wings(pen: Pen, strength: int) -> None:
    reach = (0.3, 0.15, 0)[strength]
    for mirror in (False, True):
        wing = [(0.28, 0.62), (0.0, reach), (0.0, 0.45 + reach / 2), (0.05, 0.6), (0.12, 0.7)]
        pen.polygon(*((1 - x, y) if mirror else (x, y) for x, y in wing))


def _ice(pen: Pen, strength: int) -> None:
    pen.box(0.02, (0.5, 0.25, 0)[strength], 0.98, 1)


def _puddle(pen: Pen, strength: int) -> None:
    pen.disc(0.5, 0.89, 0.5, 0.11)
    for k in range(2 + 2 * strength):
        x = 0.5 + (k + 0.5 - (2 + 2 * strength) / 2) * 0.16
        pen.line((x, 0.66 + 0.06 * (k % 2)), (x, 0.9), width=0.07)


def _notes(pen: Pen, strength: int) -> None:
    for x, y in ((0.74, 0.02), (0.0, 0.06), (0.7, 0.55))[: strength + 1]:
        pen.line((x + 0.16, y + 0.28), (x + 0.16, y), (x + 0.29, y + 0.1), width=0.05)
        pen.disc(x + 0.1, y + 0.3, 0.085, 0.07)


def _spin(pen: Pen, strength: int) -> None:
    num_arrows = 2 + strength
    for k in range(num_arrows):
        start, end = k / num_arrows, (k + 0.62) / num_arrows
        pen.line(*(polar(start + (end - start) * t / 8, 0.46) for t in range(9)), width=0.05)
        pen.polygon(polar(end, 0.36), polar(end, 0.56), polar(end + 0.06, 0.46))


def _waves(pen: Pen, strength: int) -> None:
    level, height, num_crests = 0.74, 0.03 + 0.04 * strength, 2 + 2 * strength
    crest = [(t / 48, level - height * math.cos(2 * math.pi * num_crests * t / 48)) for t in range(49)]
    pen.polygon((0, 1), *crest, (1, 1))


@dataclass(frozen=True)
class Layer:
    """One paint of an action: over or under the objects, in a colour (None: that of the objects), 0..255 opaque."""

    draw: Callable[[Pen, int], None]
    over: bool
    rgb: tuple[int, int, int] | None
    opacity: int = 255
    outlined: bool = False


MARKS: dict[str, tuple[Layer, ...]] = {
    "blinking": (Layer(_blink, False, (255, 240, 130), outlined=True),),
    "burning": (
        Layer(functools.partial(_flames, low=0.0), False, (240, 96, 10)),
        Layer(functools.partial(_flames, low=0.3), False, (255, 190, 40)),
    ),
    "falling": (Layer(_fall, True, INK),),
    "flying": (Layer(_wings, True, (240, 240, 255), outlined=True),),
    "freezing": (
        Layer(_ice, False, (150, 235, 250), outlined=True),
        Layer(_ice, True, (190, 245, 255), opacity=40),
    ),
    "melting": (Layer(_puddle, True, None, outlined=True),),
    "singing": (Layer(_notes, True, INK),),
    "spinning": (Layer(_spin, True, (0, 128, 128)),),
    "swimming": (Layer(_waves, True, (30, 130, 200), opacity=190),),
}


def _grown(mask: Image.Image, num_pixels: int) -> Image.Image:
    return mask.filter(ImageFilter.MaxFilter(2 * num_pixels + 1))


@functools.lru_cache(maxsize=1)
def _object_masks() -> dict[tuple[str, str], Image.Image]:
    """Masks by (noun, layer): the body, the body grown by an outline, and the body's part of each texture."""
    stripes, dots = Pen(), Pen()
    for k in range(-3, 7):
        stripes.polygon((k / 3, 0), (k / 3 + 0.11, 0), (k / 3 - 0.39, 1), (k / 3 - 0.5, 1))
    for row in range(4):
        for column in range(4):
            dots.disc((column + 0.25 + 0.5 * (row % 2)) / 3.5, (row + 0.5) / 4, 0.072)
    masks = {}
    for noun, outline in OUTLINES.items():
        pen = Pen(inset=OUTLINE)
        outline(pen)
        masks[noun, "body"] = pen.image
        masks[noun, "outline"] = _grown(pen.image, OUTLINE)
        masks[noun, "stripy"] = ImageChops.multiply(pen.image, stripes.image)
        masks[noun, "dotted"] = ImageChops.multiply(pen.image, dots.image)
    return masks


@functools.lru_cache(maxsize=8192)
def _object_mask(noun: str, layer: str, num_pixels: int) -> Image.Image:
    return _object_masks()[noun, layer].resize((num_pixels, num_pixels), Image.Resampling.BILINEAR)


@functools.lru_cache(maxsize=128)
def _full_mark(verb: str, layer: int, strength: int, outline: int) -> Image.Image:
    pen, paint = Pen(), MARKS[verb][layer]
    paint.draw(pen, strength)
    mask = _grown(pen.image, outline) if outline else pen.image
    return mask if paint.opacity == 255 else mask.point(lambda value: value * paint.opacity // 255)


@functools.lru_cache(maxsize=8192)
def _mark(verb: str, layer: int, strength: int, outline: int, width: int, height: int) -> Image.Image:
    return _full_mark(verb, layer, strength, outline).resize((width, height), Image.Resampling.BILINEAR)


def _background(width: int, height: int, rng: random.Random) -> Image.Image:
    top, bottom = (tuple(v + rng.randint(-12, 12) for v in rng.choice(BACKGROUNDS)) for _ in range(2))
    ramp = Image.new("L", (1, 2))
    ramp.putpixel((0, 1), 255)
    mask = ramp.resize((1, height), Image.Resampling.BILINEAR).resize((width, height))
    return Image.composite(Image.new("RGB", (width, height), bottom), Image.new("RGB", (width, height), top), mask)


def _paint_marks(
    canvas: Image.Image, group: Group, cluster: Cluster, x: float, y: float, scale: float, over: bool
) -> None:
    strength = {"slowly": 0, None: 1, "quickly": 2}[group.manner]
    for index, layer in enumerate(MARKS[group.verb]):
        for dx, dy, half_x, half_y in cluster.marks() if layer.over == over else ():
            extent = (max(6, round(2 * scale * half_x)), max(6, round(2 * scale * half_y)))
            corner = (round(x + scale * dx - extent[0] / 2), round(y + scale * dy - extent[1] / 2))
            if layer.outlined:
                canvas.paste(INK, corner, _mark(group.verb, index, strength, 4, *extent))
            canvas.paste(layer.rgb or RGB[group.color], corner, _mark(group.verb, index, strength, 0, *extent))


def _paint_objects(canvas: Image.Image, group: Group, cluster: Cluster, x: float, y: float, scale: float) -> None:
    num_pixels = max(5, round(scale * cluster.diameter))
    light = group.color in ("pink", "white", "yellow")
    for dx, dy in cluster.centres:
        corner = (round(x + scale * dx - num_pixels / 2), round(y + scale * dy - num_pixels / 2))
        canvas.paste(INK, corner, _object_mask(group.noun, "outline", num_pixels))
        canvas.paste(RGB[group.color], corner, _object_mask(group.noun, "body", num_pixels))
        if group.texture:
            ink = INK if light else RGB["white"]
            canvas.paste(ink, corner, _object_mask(group.noun, group.texture, num_pixels))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The RGB picture of `scene`, 64 to 112 pixels a side; `rng` decides what no caption tells (size, tint, place)."""
    width = rng.randint(MIN_SIDE, MAX_SIDE)
    height = rng.randint(max(MIN_SIDE, math.ceil(width / MAX_ASPECT)), min(MAX_SIDE, int(width * MAX_ASPECT)))
    canvas = _background(width, height, rng)
    for group, placed in zip(scene.groups, frame(scene, width, height, rng), strict=True):
        if group.verb:
            _paint_marks(canvas, group, *placed, over=False)
        _paint_objects(canvas, group, *placed)
        if group.verb:
            _paint_marks(canvas, group, *placed, over=True)
    return canvas


def encode(picture: Image.Image) -> bytes:
    """Baseline JPEG without colour subsampling: at this size it would smear one object's colour into the next."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
