"""The drawn world of the embedded model: captions, scenes and images of colored shapes.

A caption is one of three sentences, and everything else follows from it:

    a red circle                            one object
    three green triangles                   a count of 2 or 3 equal objects
    a red circle left of a blue square      two objects and a relation

Every random choice is a function of a seeded generator.  Letters: B images, H = W = ``IMAGE_SIZE`` pixels.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IMAGE_SIZE = 64
BACKGROUND = (0.10, 0.10, 0.13)
COLORS = {
    "red": (0.90, 0.22, 0.21),
    "green": (0.26, 0.74, 0.30),
    "blue": (0.20, 0.42, 0.93),
    "yellow": (0.98, 0.83, 0.20),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "above")
COUNTS = {"a": 1, "two": 2, "three": 3}

# radii are those of the circle of equal area, so that no shape is larger than another
_RADIUS = (6.5, 8.5)
_RELATION_DISTANCE = (22.0, 30.0)
_RELATION_OFFSET = 5.0
_GAP = 3.0
_MARGIN = 2.0
# farthest point of each shape from its centroid, in radii of the circle of equal area
_EXTENT = {"circle": 1.0, "square": 1.2533, "triangle": 1.5552}

_KIND = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_ONE_KIND = re.compile(rf"({'|'.join(COUNTS)}) {_KIND}(s?)")
_TWO_KINDS = re.compile(rf"a {_KIND} ({'|'.join(RELATIONS)}) a {_KIND}")


@dataclass(frozen=True)
class Caption:
    """What a scene must show: the (color, shape) of each object and, of two, how the first lies to the second."""

    kinds: tuple[tuple[str, str], ...]
    relation: str | None = None

    def __str__(self) -> str:
        if self.relation is not None:
            first, second = (" ".join(kind) for kind in self.kinds)
            return f"a {first} {self.relation} a {second}"
        word = next(word for word, count in COUNTS.items() if count == len(self.kinds))
        return f"{word} {' '.join(self.kinds[0])}{'s' if len(self.kinds) > 1 else ''}"


def parse_caption(text: str) -> Caption:
    """The caption that ``text`` says; ValueError for a sentence this world does not speak."""
    if match := _TWO_KINDS.fullmatch(text):
        color, shape, relation, color2, shape2 = match.groups()
        return Caption(((color, shape), (color2, shape2)), relation)
    if (match := _ONE_KIND.fullmatch(text)) and (match[4] == "s") == (match[1] != "a"):
        return Caption(((match[2], match[3]),) * COUNTS[match[1]])
    raise ValueError(
        f"the shapes world cannot draw {text!r}; write 'a red circle', 'three green triangles' or "
        f"'a red circle left of a blue square' with colors {', '.join(COLORS)}, shapes {', '.join(SHAPES)}, "
        f"relations {', '.join(RELATIONS)}"
    )


def all_captions() -> list[Caption]:
    """Every caption of the world: 36 of one kind, 264 of two different kinds."""
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    one = [Caption((kind,) * count) for kind in kinds for count in COUNTS.values()]
    two = [Caption((a, b), relation) for a in kinds for b in kinds if a != b for relation in RELATIONS]
    return one + two


@dataclass(frozen=True)
class Shape:
    """One drawn object: centroid (x right, y down) and radius of the circle of equal area, in pixels."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


def sample_scene(caption: Caption, generator: np.random.Generator) -> list[Shape]:
    """A random scene that ``caption`` describes: shapes inside the frame, apart from each other."""
    while True:
        radii = generator.uniform(*_RADIUS, size=len(caption.kinds))
        reach = np.array([_EXTENT[shape] * r for (_, shape), r in zip(caption.kinds, radii, strict=True)])
        low, high = reach + _MARGIN, IMAGE_SIZE - reach - _MARGIN
        xy = generator.uniform(low[:, None], high[:, None], size=(len(radii), 2))
        if caption.relation is not None:
            step = np.array([generator.uniform(*_RELATION_DISTANCE), generator.uniform(-1, 1) * _RELATION_OFFSET])
            xy[1] = xy[0] + (step if caption.relation == "left of" else step[::-1])
        inside = (xy >= low[:, None]).all() and (xy <= high[:, None]).all()
        apart = all(
            np.hypot(*(xy[i] - xy[j])) >= 1.27 * (radii[i] + radii[j]) + _GAP for i in range(len(xy)) for j in range(i)
        )
        if inside and apart:
            return [
                Shape(color, shape, float(x), float(y), float(r))
                for (color, shape), (x, y), r in zip(caption.kinds, xy, radii, strict=True)
            ]


def draw(scenes: Sequence[Sequence[Shape]]) -> Tensor:
    """Antialiased images [B, 3, H, W] in [0, 1], drawn from signed distances."""
    images = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    images[:] = BACKGROUND
    for image, scene in zip(images, scenes, strict=True):
        for item in scene:
            cover = coverage(item.shape, item.x, item.y, item.radius)[..., None]
            image += cover * (np.array(COLORS[item.color], dtype=np.float32) - image)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Share of each pixel [H, W] that the shape covers."""
    pixels = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    dx, dy = pixels[None, :] - x, pixels[:, None] - y
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - radius * 0.8862
    else:
        # equilateral, point up: three half planes at the inradius from the centroid
        inradius = radius * 0.7776
        distance = np.maximum(dy, abs(dx) * 0.8660 - dy * 0.5) - inradius
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)
