"""Procedural scenes: a closed grammar of captions, and the 64x64 picture that each caption describes.

Everything is deterministic: ``(seed, index)`` names one scene and one picture. A scene is in the held-out split
when a checksum of its canonical caption says so, hence no picture of a held-out composition is ever trained on.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SIDE = 64
COLOURS = {
    "red": (222, 36, 36),
    "green": (34, 160, 60),
    "blue": (36, 60, 220),
    "yellow": (245, 215, 40),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 8.0, "large": 12.0}  # radius in pixels
TEXTURES = ("plain", "striped")
LAYOUTS = ("single", "row", "column")  # one object, two side by side, two stacked

COLOUR_NAMES = tuple(COLOURS)
SIZE_NAMES = tuple(SIZES)
RELATIONS = {"row": ("left of", "right of"), "column": ("above", "below")}  # (first to second, second to first)
SLOTS = {"single": ((32, 32),), "row": ((17, 32), (47, 32)), "column": ((32, 17), (32, 47))}  # centres (x, y)
JITTER = 2.0  # pixels, uniform, each axis
STRIPE = 8  # pixels, height of one stripe

# One column of a label row each; a missing second object is labelled -1.
ATTRIBUTES = {
    "layout": LAYOUTS,
    "ground": COLOUR_NAMES,
    "texture": TEXTURES,
    "size_1": SIZE_NAMES,
    "colour_1": COLOUR_NAMES,
    "shape_1": SHAPES,
    "size_2": SIZE_NAMES,
    "colour_2": COLOUR_NAMES,
    "shape_2": SHAPES,
}
WORDS = (
    "a", *SIZE_NAMES, *COLOUR_NAMES, *SHAPES, "left", "right", "of", "above", "below", "on", *TEXTURES, "background"
)  # fmt: skip

_THING = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"{_THING}(?: (left of|right of|above|below) {_THING})?"
    rf" on a ({'|'.join(TEXTURES)}) ({'|'.join(COLOURS)}) background"
)


@dataclass(frozen=True)
class Thing:
    """One object."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects in canonical order (left to right, top to bottom) on a background."""

    layout: str
    things: tuple[Thing, ...]
    texture: str
    ground: str

    def caption(self, swapped: bool = False) -> str:
        """The caption; ``swapped`` names the second object first and turns the relation round."""
        ground = f"on a {self.texture} {self.ground} background"
        if self.layout == "single":
            return f"{self.things[0]} {ground}"
        first, second = self.things[::-1] if swapped else self.things
        return f"{first} {RELATIONS[self.layout][swapped]} {second} {ground}"

    @property
    def held_out(self) -> bool:
        """True for one composition in twenty, whatever the seed."""
        return zlib.crc32(self.caption().encode()) % 20 == 0

    def labels(self) -> np.ndarray:
        """Class indices in the order of ATTRIBUTES, int64 ``[9]``."""
        row = [LAYOUTS.index(self.layout), COLOUR_NAMES.index(self.ground), TEXTURES.index(self.texture)]
        for thing in self.things:
            row += [SIZE_NAMES.index(thing.size), COLOUR_NAMES.index(thing.colour), SHAPES.index(thing.shape)]
        return np.array(row + [-1] * (len(ATTRIBUTES) - len(row)))


def from_labels(labels: np.ndarray) -> Scene:
    """The scene that a row of class indices names; a reading of ``single`` ignores the second object."""
    names = [classes[label] for classes, label in zip(ATTRIBUTES.values(), labels, strict=True)]
    things = (Thing(*names[3:6]), Thing(*names[6:9]))
    return Scene(names[0], things[:1] if names[0] == "single" else things, names[2], names[1])


def parse(caption: str) -> Scene | None:
    """The scene a caption of the grammar describes, in canonical order, or None for any other text."""
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        return None
    size, colour, shape, relation, size_2, colour_2, shape_2, texture, ground = match.groups()
    first = Thing(size, colour, shape)
    if relation is None:
        return Scene("single", (first,), texture, ground)
    layout = next(layout for layout, pair in RELATIONS.items() if relation in pair)
    things = (first, Thing(size_2, colour_2, shape_2))
    return Scene(layout, things[::-1] if relation == RELATIONS[layout][1] else things, texture, ground)


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene: 80 % have two objects; no object has the colour of the background."""
    layout = LAYOUTS[rng.choice(3, p=(0.2, 0.4, 0.4))]
    ground = COLOUR_NAMES[rng.integers(len(COLOUR_NAMES))]
    colours = [name for name in COLOUR_NAMES if name != ground]
    things = tuple(
        Thing(SIZE_NAMES[rng.integers(2)], colours[rng.integers(len(colours))], SHAPES[rng.integers(len(SHAPES))])
        for _ in SLOTS[layout]
    )
    return Scene(layout, things, TEXTURES[rng.integers(2)], ground)


def redrawn(scene: Scene, share: float, rng: np.random.Generator) -> Scene:
    """``scene`` with every attribute drawn anew with the probability ``share``, as in captions that nobody checked.

    The number of objects stays; no object has the colour of the background.
    """

    def draw(value: str, values: tuple[str, ...]) -> str:
        return values[rng.integers(len(values))] if rng.random() < share else value

    while True:
        layout = draw(scene.layout, LAYOUTS[1:]) if len(scene.things) == 2 else scene.layout
        things = [
            Thing(draw(thing.size, SIZE_NAMES), draw(thing.colour, COLOUR_NAMES), draw(thing.shape, SHAPES))
            for thing in scene.things
        ]
        if rng.random() < share / 2:  # the order is drawn anew, hence the other way round half of the time
            things.reverse()
        texture, ground = draw(scene.texture, TEXTURES), draw(scene.ground, COLOUR_NAMES)
        if all(thing.colour != ground for thing in things):
            return Scene(layout, tuple(things), texture, ground)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to the outline (negative inside); y points down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.88 * radius
    if shape == "triangle":  # equilateral, point up, its bounding box about centred
        inner, y = 0.62 * radius, y - 0.3 * radius
        return np.maximum(y, 0.866 * abs(x) - 0.5 * y) - inner
    arm = 0.34 * radius
    return np.minimum(
        np.maximum(abs(x) - radius, abs(y) - arm), np.maximum(abs(x) - arm, abs(y) - radius)
    )  # a cross: two bars


def coverage(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """How much of each pixel each object covers, float64 ``[objects, 64, 64]`` in 0..1; ``rng`` jitters the places."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    masks = []
    for thing, (cx, cy) in zip(scene.things, SLOTS[scene.layout], strict=True):
        dx, dy = rng.uniform(-JITTER, JITTER, 2)
        masks.append(np.clip(0.5 - _distance(thing.shape, x - cx - dx, y - cy - dy, SIZES[thing.size]), 0, 1))
    return np.stack(masks)


def paint(scene: Scene, masks: np.ndarray) -> np.ndarray:
    """Compose the picture, uint8 ``[64, 64, 3]``, from the ``masks`` of ``coverage``."""
    ground = np.array(COLOURS[scene.ground], float)
    picture = np.broadcast_to(ground, (SIDE, SIDE, 3)).copy()
    if scene.texture == "striped":  # every other stripe darker, or lighter where the ground is black
        picture[np.arange(SIDE) // STRIPE % 2 == 1] = 0.62 * ground + (85 if scene.ground == "black" else 0)
    for thing, mask in zip(scene.things, masks, strict=True):
        picture += mask[..., None] * (np.array(COLOURS[thing.colour], float) - picture)
    return picture.round().astype(np.uint8)


def example(seed: int, index: int, held_out: bool = False) -> tuple[Scene, np.ndarray, np.ndarray]:
    """Scene, picture uint8 ``[64, 64, 3]`` and coverage of one index of the training or the held-out split."""
    rng = np.random.default_rng((seed, index, held_out))
    while (scene := draw_scene(rng)).held_out != held_out:
        pass
    masks = coverage(scene, rng)
    return scene, paint(scene, masks), masks


def examples(seed: int, count: int, held_out: bool = False) -> Iterator[tuple[Scene, np.ndarray, np.ndarray]]:
    """The first ``count`` examples of a split."""
    return (example(seed, index, held_out) for index in range(count))


def matched(wanted: Scene, seen: Scene) -> tuple[list[tuple[Thing, Thing | None]], bool]:
    """Each wanted object with the seen one that it fits, under the better of the two ways to match, and the relation.

    The relation is right when the objects stand as wanted: side by side, stacked or alone, and the right way round.
    """
    things = [*seen.things, *[None] * (len(wanted.things) - len(seen.things))]
    straight = list(zip(wanted.things, things, strict=False)), wanted.layout == seen.layout
    crossed = list(zip(wanted.things, things[::-1], strict=False)), False
    return max(straight, crossed, key=lambda match: sum(map(_agreement, match[0])) + match[1])


def _agreement(pair: tuple[Thing, Thing | None]) -> int:
    """How many attributes of two objects agree, 0 to 3."""
    a, b = pair
    return 0 if b is None else (a.size == b.size) + (a.colour == b.colour) + (a.shape == b.shape)


def agreements(wanted: Scene, seen: Scene | None) -> dict[str, list[bool]]:
    """Whether each attribute of ``wanted`` is seen, by its kind, the objects matched as by ``matched``.

    Two objects have nine attributes (size, colour, shape of each; relation; ground colour and texture), one has six
    (the relation is then "alone").
    """
    pairs, relation = matched(wanted, seen) if seen is not None else ([(thing, None) for thing in wanted.things], False)
    of_things = {
        kind: [other is not None and getattr(thing, kind) == getattr(other, kind) for thing, other in pairs]
        for kind in ("size", "colour", "shape")
    }
    return of_things | {
        "relation": [relation],
        "ground": [seen is not None and wanted.ground == seen.ground],
        "texture": [seen is not None and wanted.texture == seen.texture],
    }


def adherence(wanted: Scene, seen: Scene | None) -> float:
    """Share of the attributes of ``agreements`` that are seen; ``None`` sees nothing."""
    hits = [hit for kind in agreements(wanted, seen).values() for hit in kind]
    return sum(hits) / len(hits)
