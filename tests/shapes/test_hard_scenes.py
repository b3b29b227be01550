"""Scenes of many objects under the verifier: true ones pass, one thing wrong fails, and few objects score as ever."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from fastgrpo.shapes.verifier import find_objects, verify
from fastgrpo.shapes.world import COLORS, SHAPES, Caption, Shape, all_captions, draw, parse_caption, sample_scene
from tests.shapes import permuted

SENTENCES = (
    "four red circles",
    "five blue triangles",
    "a red circle above three blue squares",
    "two red circles left of three blue squares",
    "two yellow triangles above two green triangles",
    "three red circles left of three blue circles",
    "red circle left of blue square above green triangle",
    "two red circles left of blue square above green triangle",
    "two red circles above blue square above two green squares",
    # the two ends of a chain may be of one kind
    "red circle left of blue square left of red circle",
)


def image_of(scene: list[Shape]) -> np.ndarray:
    return draw([scene])[0].permute(1, 2, 0).numpy()


def scenes(text: str, number: int) -> list[list[Shape]]:
    generator = np.random.default_rng(len(text))
    return [sample_scene(parse_caption(text), generator) for _ in range(number)]


@pytest.mark.parametrize("text", SENTENCES)
def test_true_scenes_pass(text: str) -> None:
    for scene in scenes(text, 3):
        assert verify(image_of(scene), parse_caption(text)) == (1.0, 1.0)


@pytest.mark.parametrize("text", SENTENCES)
def test_one_thing_wrong_fails_and_lowers_graded(text: str) -> None:
    caption = parse_caption(text)
    (scene,) = scenes(text, 1)
    for i, item in enumerate(scene):
        color = next(c for c in COLORS if all(c != other for other, _ in caption.kinds))
        shape = SHAPES[(SHAPES.index(item.shape) + 1) % 3]
        for wrong in (replace(item, color=color), replace(item, shape=shape), None):
            changed = [*scene[:i], *([wrong] if wrong else []), *scene[i + 1 :]]
            graded, strict = verify(image_of(changed), caption)
            assert strict == 0
            assert 0.3 < graded < 0.99


@pytest.mark.parametrize("text", [text for text in SENTENCES if parse_caption(text).relations])
def test_each_relation_counts(text: str) -> None:
    caption = parse_caption(text)
    (scene,) = scenes(text, 1)
    # mirrored, what was left of is right of; colors and shapes stay
    for relation in set(caption.relations):
        over = {"left of": "x", "above": "y"}[relation]
        mirrored = [replace(item, **{over: 64.0 - getattr(item, over)}) for item in scene]
        graded, strict = verify(image_of(mirrored), caption)
        if caption == Caption(caption.kinds[::-1], *caption.relations):
            # a chain of one relation between ends of one kind is its own mirror image
            assert strict == 1
            continue
        assert strict == 0
        assert graded < 1


def test_a_relation_of_groups_is_that_of_every_pair() -> None:
    caption = parse_caption("a red circle left of two blue squares")
    red, right = Shape("red", "circle", 32.0, 12.0, 7.0), Shape("blue", "square", 54.0, 30.0, 7.0)

    def scored(x: float) -> tuple[float, float]:
        return verify(image_of([red, right, Shape("blue", "square", x, 52.0, 7.0)]), caption)

    assert scored(52.0) == (1.0, 1.0)
    # one pair of two holds, the other not at all, and half way: the objects are half of the score
    assert scored(12.0) == (pytest.approx(0.5 + 0.5 * 0.5), 0.0)
    assert scored(32.0) == (pytest.approx(0.5 + 0.5 * 0.75, abs=0.01), 0.0)


def test_a_chain_is_two_relations_of_neighbours() -> None:
    caption = parse_caption("red circle left of blue square above green triangle")
    red, blue = Shape("red", "circle", 12.0, 20.0, 7.0), Shape("blue", "square", 32.0, 20.0, 7.0)

    def scored(*scene: Shape) -> tuple[float, float]:
        return verify(image_of(list(scene)), caption)

    # how the first lies to the third is not said
    assert scored(red, blue, Shape("green", "triangle", 32.0, 50.0, 7.0)) == (1.0, 1.0)
    assert scored(red, blue, Shape("green", "triangle", 12.0, 50.0, 7.0)) == (1.0, 1.0)
    below = [replace(item, y=50.0) for item in (red, blue)]
    assert scored(*below, Shape("green", "triangle", 32.0, 20.0, 7.0)) == (pytest.approx(0.75), 0.0)
    # of a missing one no relation holds: two of three objects and one of two relations
    assert scored(red, blue) == (pytest.approx(2 / 3 * 0.75), 0.0)


def test_more_of_the_caption_scores_more() -> None:
    text = "two red circles left of three blue squares"
    (scene,) = scenes(text, 1)
    graded = [verify(image_of(scene[:number]), parse_caption(text))[0] for number in range(1, 6)]
    assert graded == sorted(graded)
    assert len(set(graded)) == 5
    extra = [verify(image_of([*scene[:3], *more]), parse_caption(text))[1] for more in ([], scene[3:])]
    assert extra == [0.0, 1.0]


def test_few_objects_score_bit_for_bit_as_ever() -> None:
    generator, captions = np.random.default_rng(0), all_captions()
    for _ in range(200):
        # up to four scenes on top of each other, more or less noisy
        chosen = [captions[i] for i in generator.integers(len(captions), size=generator.integers(1, 5))]
        image = image_of([item for caption in chosen for item in sample_scene(caption, generator)])
        image = image + generator.choice([0.0, 0.05, 0.15, 0.3]) * generator.standard_normal(image.shape)
        image = np.clip(image, 0, 1).astype(np.float32)
        for caption in (chosen[0], *(captions[i] for i in generator.integers(len(captions), size=2))):
            assert verify(image, caption) == permuted.verify(image, caption)


def test_groups_are_matched_as_well_as_any_order_of_objects_could_be() -> None:
    caption, generator = parse_caption("two red circles left of two blue squares"), np.random.default_rng(5)
    others = [parse_caption(text) for text in SENTENCES]
    for number in generator.integers(len(others), size=12):
        image = image_of(sample_scene(others[number], generator))
        found = find_objects(image)
        places = [*found, *[None] * 4]
        best = max(
            _by_hand([places[i] for i in order], caption, len(found)) for order in permutations(range(len(places)), 4)
        )
        graded, strict = verify(image, caption)
        assert strict == 0
        assert graded == pytest.approx(best, abs=1e-12)


def _by_hand(items: list, caption: Caption, num_found: int) -> float:
    matches = [permuted._match(item, kind)[0] for item, kind in zip(items, caption.kinds, strict=True)]
    relation = sum(permuted._relation(caption.relation, [items[i], items[j]]) for i in (0, 1) for j in (2, 3)) / 4
    return sum(matches) / max(num_found, 4) * (0.5 + 0.5 * relation)
