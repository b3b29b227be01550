"""The drawn world of the embedded model: captions, scenes and images of colored shapes.

A scene follows from its caption, which is one of a few sentences:

    a red circle                            one object
    three green triangles                   a count of 2 or 3 equal objects
    a red circle left of a blue square      two objects and a relation

These are ``all_captions``, which the shipped model was made from.  It has never seen harder ones, of up to 6 objects:

    five green triangles                                        a count of 4 or 5
    two red circles left of three blue squares                  two groups and a relation
    two red circles left of blue square above green triangle    a chain: three groups, two relations, no articles

A relation between groups holds when it holds, by the centroids, for every object of the one with every object of the
other.  A chain says that the first group lies so to the second, and the second so to the third.

Every random choice is a function of a seeded generator.  Letters: B images, H = W = ``IMAGE_SIZE`` pixels.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

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
# words that the shipped model's tokenizer spells in four pieces each
LARGE_COUNTS = {"four": 4, "five": 5}
MAX_OBJECTS = 6

# radii are those of the circle of equal area, so that no shape is larger than another
_RADIUS = (6.5, 8.5)
_RELATION_DISTANCE = (22.0, 30.0)
_RELATION_OFFSET = 5.0
_GAP = 3.0
_MARGIN = 2.0
# six objects of the usual sizes hardly fit the frame; these cover 95 pixels and more
_SMALL_RADIUS = (5.5, 6.5)
_STEP_BETWEEN_GROUPS = 9.0
# farthest point of each shape from its centroid, in radii of the circle of equal area
_EXTENT = {"circle": 1.0, "square": 1.2533, "triangle": 1.5552}

_WORDS = {**COUNTS, **LARGE_COUNTS}
_GROUP = re.compile(rf"(?:({'|'.join(_WORDS)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(s?)")
_RELATION = re.compile(rf" ({'|'.join(RELATIONS)}) ")


@dataclass(frozen=True)
class Caption:
    """What a scene must show: the (color, shape) of each object, and how groups of them lie to each other.

    ``relation`` is that of the first group to the second, ``then`` that of the second to the third.
    """

    kinds: tuple[tuple[str, str], ...]
    relation: str | None = None
    then: str | None = None

    @property
    def relations(self) -> tuple[str, ...]:
        return tuple(relation for relation in (self.relation, self.then) if relation is not None)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Objects of each group: equal neighbours in ``kinds``, unless there are no more objects than groups."""
        if len(self.kinds) == len(self.relations) + 1:
            return (1,) * len(self.kinds)
        return tuple(len(list(group)) for _, group in groupby(self.kinds))

    @property
    def form(self) -> str:
        """What a caption asks for, apart from colors and shapes: as ``left of``, ``two groups of 5 objects``."""
        number = len(self.kinds)
        if self.relation is None:
            return "one object" if number == 1 else f"{number} equal objects"
        if number == 2:
            return self.relation
        return f"{'chain' if self.then else 'two groups'} of {number} objects"

    def __str__(self) -> str:
        words, start = [], 0
        for size, relation in zip(self.sizes, (*self.relations, None), strict=True):
            count = next(word for word, number in _WORDS.items() if number == size)
            # a chain with articles is too long for the shipped model
            words += [] if self.then is not None and size == 1 else [count]
            words += [*self.kinds[start][:1], self.kinds[start][1] + ("s" if size > 1 else "")]
            words += [relation] if relation is not None else []
            start += size
        return " ".join(words)


def parse_caption(text: str) -> Caption:
    """The caption that ``text`` says; ValueError for a sentence this world does not speak."""
    parts = _RELATION.split(text)
    groups = [_GROUP.fullmatch(part) for part in parts[::2]]
    if len(groups) <= 3 and all(groups):
        kinds = [((match[2], match[3]),) * _WORDS[match[1] or "a"] for match in groups if match]
        caption = Caption(sum(kinds, ()), *parts[1::2])
        # what reads otherwise when it is said again has a wrong article or plural, or groups that nothing tells apart
        if len(caption.kinds) <= MAX_OBJECTS and len(caption.sizes) == len(groups) and str(caption) == text:
            return caption
    raise ValueError(
        f"the shapes world cannot draw {text!r}; write 'a red circle', 'three green triangles', "
        "'a red circle left of a blue square', 'two red circles left of three blue squares' or "
        f"'red circle left of blue square above green triangle' with colors {', '.join(COLORS)}, shapes "
        f"{', '.join(SHAPES)}, relations {', '.join(RELATIONS)}, at most {MAX_OBJECTS} objects, and groups beside each "
        "other of different kinds"
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
    if len(caption.kinds) > 3 or len(caption.relations) > 1 or (caption.relation and len(caption.kinds) > 2):
        return _sample_many(caption, generator)
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


def _sample_many(caption: Caption, generator: np.random.Generator) -> list[Shape]:
    """One object after the other, where it lies right to those there; all anew where one finds no place."""
    group_of = [group for group, size in enumerate(caption.sizes) for _ in range(size)]
    while True:
        scene: list[Shape] = []
        for (color, shape), group in zip(caption.kinds, group_of, strict=True):
            for _ in range(50):
                radius = generator.uniform(*(_SMALL_RADIUS if len(caption.kinds) > 3 else _RADIUS))
                reach = _EXTENT[shape] * radius + _MARGIN
                x, y = generator.uniform(reach, IMAGE_SIZE - reach, size=2)
                new = Shape(color, shape, float(x), float(y), float(radius))
                if all(
                    _apart(old, new) and _in_order(old, new, caption.relations[of:group])
                    for old, of in zip(scene, group_of, strict=False)
                ):
                    scene.append(new)
                    break
        if len(scene) == len(caption.kinds):
            return scene


def _apart(first: Shape, second: Shape) -> bool:
    between = np.hypot(first.x - second.x, first.y - second.y)
    return bool(between >= 1.27 * (first.radius + second.radius) + _GAP)


def _in_order(first: Shape, second: Shape, relations: tuple[str, ...]) -> bool:
    """Whether the second lies right to the first, of the same group, of the one before, or of one farther away."""
    if len(relations) != 1:
        return True
    step = second.x - first.x if relations == ("left of",) else second.y - first.y
    return step >= _STEP_BETWEEN_GROUPS


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
