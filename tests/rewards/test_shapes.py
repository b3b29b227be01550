"""The verifier's reward: full for what the caption says, less for every single defect."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgrpo.rewards.shapes import ShapesReward
from fastgrpo.shapes.world import COLORS, COUNTS, RELATIONS, SHAPES, Shape, all_captions, draw, sample_scene

GRADED, STRICT = ShapesReward(), ShapesReward(strict=True)
CAPTION = "a red circle left of a blue square"
LEFT, RIGHT = Shape("red", "circle", 18.0, 32.0, 8.0), Shape("blue", "square", 46.0, 32.0, 8.0)


def test_drawn_scenes_score_one_strict_and_graded() -> None:
    generator = np.random.default_rng(0)
    # relations take turns in the list: an odd step meets both
    captions = all_captions()[::5]
    kinds = [kind for caption in captions for kind in caption.kinds]
    assert {color for color, _ in kinds} == set(COLORS)
    assert {shape for _, shape in kinds} == set(SHAPES)
    assert {caption.relation for caption in captions} == {None, *RELATIONS}
    assert {len(caption.kinds) for caption in captions if caption.relation is None} == set(COUNTS.values())
    images_BCHW = draw([sample_scene(caption, generator) for caption in captions])
    texts = [str(caption) for caption in captions]
    assert torch.equal(STRICT(images_BCHW, texts), torch.ones(len(texts)))
    assert torch.equal(GRADED(images_BCHW, texts), torch.ones(len(texts)))


@pytest.mark.parametrize(
    "scene",
    [
        pytest.param([Shape("green", "circle", 18, 32, 8), RIGHT], id="wrong color"),
        pytest.param([Shape("red", "triangle", 18, 32, 8), RIGHT], id="wrong shape"),
        pytest.param([LEFT], id="one missing"),
        pytest.param([LEFT, RIGHT, Shape("red", "circle", 18, 54, 6.5)], id="one too many"),
        pytest.param([Shape("red", "circle", 46, 32, 8), Shape("blue", "square", 18, 32, 8)], id="wrong side"),
        pytest.param([Shape("red", "circle", 32, 18, 8), Shape("blue", "square", 32, 46, 8)], id="wrong relation"),
    ],
)
def test_one_defect_fails_strict_and_lowers_graded_but_not_to_zero(scene: list[Shape]) -> None:
    images_BCHW = draw([scene])
    assert STRICT(images_BCHW, [CAPTION]).item() == 0
    assert 0.1 < GRADED(images_BCHW, [CAPTION]).item() < 0.99


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_is_told_from_its_opposite_and_from_the_other(relation: str) -> None:
    low, high = 18.0, 46.0
    places = {"left of": ((low, 32.0), (high, 32.0)), "above": ((32.0, low), (32.0, high))}
    assert places.keys() == set(RELATIONS)
    scenes = {
        (other, is_opposite): [
            Shape(color, shape, *place, 8.0)
            for (color, shape), place in zip(
                (("red", "circle"), ("blue", "square")), pair[::-1] if is_opposite else pair, strict=True
            )
        ]
        for other, pair in places.items()
        for is_opposite in (False, True)
    }
    caption = f"a red circle {relation} a blue square"
    images_BCHW = draw(list(scenes.values()))
    strict_B, graded_B = (reward(images_BCHW, [caption] * len(scenes)) for reward in (STRICT, GRADED))
    for (other, is_opposite), strict, graded in zip(scenes, strict_B.tolist(), graded_B.tolist(), strict=True):
        holds = (other, is_opposite) == (relation, False)
        assert strict == float(holds), (other, is_opposite)
        # both objects are there: half of the score is theirs, and a place on neither side gives half of the other
        assert graded == pytest.approx(1.0 if holds else 0.5 if other == relation else 0.75, abs=0.02)


@pytest.mark.parametrize(("count", "word"), [(2, "two"), (3, "three")])
def test_every_other_count_fails(count: int, word: str) -> None:
    row = [Shape("yellow", "square", x, 32.0, 7.0) for x in (12.0, 32.0, 52.0)]
    images_BCHW = draw([row[:1], row[:2], row])
    answer = STRICT(images_BCHW, [f"{word} yellow squares"] * 3)
    assert answer.tolist() == [float(n == count) for n in (1, 2, 3)]


def test_two_defects_score_below_one() -> None:
    one = draw([[Shape("green", "circle", 18, 32, 8), RIGHT]])
    two = draw([[Shape("green", "circle", 18, 32, 8), Shape("yellow", "square", 46, 32, 8)]])
    assert GRADED(two, [CAPTION]).item() < GRADED(one, [CAPTION]).item()


@pytest.mark.parametrize(
    "image_CHW",
    [
        pytest.param(draw([[]])[0], id="blank"),
        pytest.param(torch.zeros(3, 64, 64), id="black"),
        pytest.param(torch.ones(3, 64, 64), id="white"),
        pytest.param(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), id="noise"),
        pytest.param(torch.tensor(COLORS["red"])[:, None, None].expand(3, 64, 64), id="all red"),
    ],
)
def test_an_image_without_the_objects_never_passes(image_CHW: Tensor) -> None:
    texts = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    images_BCHW = image_CHW.expand(len(texts), 3, 64, 64)
    assert STRICT(images_BCHW, texts).max().item() == 0
    assert GRADED(images_BCHW, texts).max().item() < 0.9


def test_reward_reads_a_bfloat16_image_and_one_that_left_the_range() -> None:
    images_BCHW = draw([[LEFT, RIGHT]])
    assert STRICT(images_BCHW.bfloat16(), [CAPTION]).item() == 1
    assert STRICT(images_BCHW * 1.02 - 0.01, [CAPTION]).item() == 1


def test_what_the_world_cannot_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot draw 'a photo of a cat'"):
        GRADED(draw([[LEFT]]), ["a photo of a cat"])
    with pytest.raises(ValueError, match=r"verifies images \[3, 64, 64\], got \[3, 32, 32\]"):
        GRADED(torch.zeros(1, 3, 32, 32), [CAPTION])
