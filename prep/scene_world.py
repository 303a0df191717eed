"""What a drawn scene holds: its vocabulary, its groups of equal objects, and how groups stand to each other.

All factors of a group are drawn independently, so that no word of a caption tells another one without the picture.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import astuple, dataclass

NOUNS = ("ball", "boat", "box", "car", "cross", "cup", "heart", "house", "moon", "ring", "star", "tree")
PLURALS = {noun: noun + ("es" if noun[-1] in "sx" else "s") for noun in NOUNS}
COLORS = ("black", "blue", "green", "pink", "purple", "red", "white", "yellow")
SIZES = ("big", "small")
TEXTURES = ("dotted", "stripy")
VERBS = ("blinking", "burning", "falling", "flying", "freezing", "melting", "singing", "spinning", "swimming")
MANNERS = ("quickly", "slowly")
NUMBERS = ("zero", "one", "two", "three", "four")
MAX_COUNT = 4

COUNT_WEIGHTS = (3, 1, 1, 1)  # of 1..4: single objects are easiest to name, and each larger count is as likely
PLACES = ("left", "right", "top", "bottom", "centre")
# column: the first group is above the second. row: the first is left of the second.
# nested: the first is behind, between or among the second's one, two or more objects.
LAYOUTS = ("column", "row", "nested")
LAYOUT_WEIGHTS = (36, 28, 36)
ALONE_SHARE = 0.28
VERB_SHARE = 0.8


@dataclass(frozen=True)
class Group:
    """`count` equal objects drawn side by side. A factor that is None is absent and is never mentioned."""

    noun: str
    color: str
    size: str
    count: int
    texture: str | None = None
    verb: str | None = None
    manner: str | None = None


@dataclass(frozen=True)
class Scene:
    """One or two groups. `layout` is one of LAYOUTS for two groups and one of PLACES for a group alone."""

    groups: tuple[Group, ...]
    layout: str

    def __post_init__(self) -> None:
        assert self.layout in (PLACES if len(self.groups) == 1 else LAYOUTS), self

    @property
    def places(self) -> tuple[str, ...]:
        """Where the centre of each group lies, one of PLACES for each group."""
        two = {"column": ("top", "bottom"), "row": ("left", "right"), "nested": ("centre", "centre")}
        return two[self.layout] if len(self.groups) == 2 else (self.layout,)

    @property
    def num_objects(self) -> int:
        return sum(group.count for group in self.groups)


def relations(scene: Scene, i: int, j: int) -> tuple[str, ...]:
    """The prepositions P for which "group i is P group j" is true; the first one is the usual word."""
    if scene.layout == "column":
        return ("above", "over") if i < j else ("below", "under")
    if scene.layout == "row":
        return ("beside",)
    outer = scene.groups[1].count
    if i < j:
        return (("behind",), ("between",), ("among",))[min(outer, 3) - 1]
    return ("around",) if outer >= 3 else ()


def content_class(scene: Scene, num_classes: int) -> int:
    """A class in [0, num_classes) that depends on what is in the scene and on nothing else (blake2b of the content)."""
    content = repr((scene.layout, [astuple(group) for group in scene.groups]))
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little") % num_classes


def sample_group(rng: random.Random) -> Group:
    """One group, each factor drawn on its own; a texture in a third of the groups, an action in four of five."""
    verb = rng.choice(VERBS) if rng.random() < VERB_SHARE else None
    return Group(
        noun=rng.choice(NOUNS),
        color=rng.choice(COLORS),
        size=rng.choice(SIZES),
        count=rng.choices(range(1, MAX_COUNT + 1), COUNT_WEIGHTS)[0],
        texture=rng.choice((None, None, None, None, *TEXTURES)),
        verb=verb,
        manner=rng.choice((None, *MANNERS)) if verb else None,
    )


def sample_scene(rng: random.Random) -> Scene:
    """A scene of two groups (seven of ten) or one; two groups never share both noun and colour."""
    if rng.random() < ALONE_SHARE:
        return Scene((sample_group(rng),), rng.choice(PLACES))
    while True:
        a, b = sample_group(rng), sample_group(rng)
        if (a.noun, a.color) != (b.noun, b.color):
            return Scene((a, b), rng.choices(LAYOUTS, LAYOUT_WEIGHTS)[0])
