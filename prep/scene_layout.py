"""Where the objects of a scene go, so that how its groups stand to each other is seen at first glance.

Lengths are in shorter sides of the picture until `frame` turns them into pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from posmask.prep.scene_world import Group, Scene

# A small object alone stays below four big ones, so that the word does not depend on the count.
BIG = {1: 0.52, 2: 0.44, 3: 0.36, 4: 0.35}
SMALL = {1: 0.33, 2: 0.29, 3: 0.24, 4: 0.23}
ROWS = {1: (1,), 2: (2,), 3: (3,), 4: (2, 2)}
SPACING = 1.12  # centres of neighbours, in diameters
ALONE_ZOOM = 1.25  # a group alone has the room to be larger
MARGIN = 0.05  # room for a mark around a group; kept where there is none, so that the size of an object tells no action


def polar(angle: float, radius: float, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
    """The point `radius` from (x, y) in the direction `angle` (in turns, 0 = up, clockwise)."""
    return x + radius * math.sin(2 * math.pi * angle), y - radius * math.cos(2 * math.pi * angle)


@dataclass(frozen=True)
class Cluster:
    """Where a group's objects go: centres around (0, 0) and their diameter.

    `apart`: another group stands among them, so that each object needs a mark of its own.
    """

    diameter: float
    centres: tuple[tuple[float, float], ...]
    apart: bool = False

    def marks(self) -> Iterator[tuple[float, float, float, float]]:
        """(x, y, half width, half height) of each mark of the group."""
        if not self.apart:
            yield 0, 0, *self.half
        for x, y in self.centres if self.apart else ():
            yield x, y, 0.75 * self.diameter, 0.75 * self.diameter

    @property
    def half(self) -> tuple[float, float]:
        """Half of the width and height, with the room for marks."""
        reach = self.diameter / 2 + MARGIN
        return max(abs(x) for x, _ in self.centres) + reach, max(abs(y) for _, y in self.centres) + reach


def _diameter(group: Group) -> float:
    return (BIG if group.size == "big" else SMALL)[group.count]


def _block(group: Group, tall: bool = False) -> Cluster:
    step = SPACING * _diameter(group)
    rows = ROWS[group.count]
    centres = []
    for r, num_columns in enumerate(rows):
        for c in range(num_columns):
            point = ((c - (num_columns - 1) / 2) * step, (r - (len(rows) - 1) / 2) * step)
            centres.append(point[::-1] if tall else point)
    return Cluster(_diameter(group), tuple(centres))


def _ring_of(group: Group, inner: Cluster, upright: bool) -> Cluster:
    """The objects of `group` evenly around `inner`: two at its sides (or ends, if `upright`), more in a circle."""
    diameter, n = _diameter(group), group.count
    clearance = diameter / 2 + 0.02
    if n == 2:
        reach = inner.half[1 if upright else 0] + clearance - MARGIN / 2
        ends = ((0.0, -reach), (0.0, reach)) if upright else ((-reach, 0.0), (reach, 0.0))
        return Cluster(diameter, ends, apart=True)
    core = max(math.hypot(x, y) for x, y in inner.centres) + inner.diameter / 2
    reach = core + MARGIN / 2 + clearance
    return Cluster(diameter, tuple(polar(k / n, reach, 0, 0) for k in range(n)), apart=True)


def _arrange(scene: Scene, rng: random.Random) -> list[tuple[Cluster, float, float]]:
    """(cluster, x, y) of each group around a common origin."""
    tall = rng.random() < 0.5
    if len(scene.groups) == 1:
        return [(_block(scene.groups[0], tall), 0, 0)]
    a, b = scene.groups
    if scene.layout in ("column", "row"):
        along = 1 if scene.layout == "column" else 0
        clusters = [_block(group, tall=scene.layout == "row") for group in (a, b)]
        distance = clusters[0].half[along] + clusters[1].half[along] - MARGIN / 2
        ends = ((0, -distance / 2), (0, distance / 2)) if along else ((-distance / 2, 0), (distance / 2, 0))
        return [(cluster, *end) for cluster, end in zip(clusters, ends, strict=True)]
    if b.count == 1:
        # Two fifths of the nearest objects are hidden: enough to see who is behind, and each one can still be counted.
        behind, front = _block(a, tall=False), _block(b)
        distance = behind.half[1] + front.half[1] - 2 * MARGIN - 0.4 * min(behind.diameter, front.diameter)
        side = rng.choice((-0.12, 0.12))
        return [(behind, -side / 2, -distance / 2), (front, side / 2, distance / 2)]
    inner = _block(a, tall=tall)
    return [(inner, 0, 0), (_ring_of(b, inner, upright=not tall), 0, 0)]


def frame(scene: Scene, width: int, height: int, rng: random.Random) -> list[tuple[Cluster, float, float, float]]:
    """(cluster, x, y, scale) of each group in pixels, `scale` pixels per unit; all of it inside the picture."""
    arranged = _arrange(scene, rng)
    left = min(x - cluster.half[0] for cluster, x, _ in arranged)
    right = max(x + cluster.half[0] for cluster, x, _ in arranged)
    top = min(y - cluster.half[1] for cluster, _, y in arranged)
    bottom = max(y + cluster.half[1] for cluster, _, y in arranged)
    zoom = ALONE_ZOOM if len(scene.groups) == 1 else 1
    scale = min(zoom * min(width, height), width / (right - left), height / (bottom - top))
    slack_x, slack_y = width - scale * (right - left), height - scale * (bottom - top)
    share_x, share_y = 0.3 + 0.4 * rng.random(), 0.3 + 0.4 * rng.random()
    if scene.layout in ("left", "right"):
        share_x = 0.15 * rng.random() + (0.85 if scene.layout == "right" else 0)
    if scene.layout in ("top", "bottom"):
        share_y = 0.15 * rng.random() + (0.85 if scene.layout == "bottom" else 0)
    origin_x, origin_y = slack_x * share_x - scale * left, slack_y * share_y - scale * top
    return [(cluster, origin_x + scale * x, origin_y + scale * y, scale) for cluster, x, y in arranged]
