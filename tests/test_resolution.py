"""What a resolution may be, and which are the nearest that a model draws."""

import re

import pytest
from omegaconf import OmegaConf

from fastgrpo.models.image_sizes import ImageSizes
from fastgrpo.resolution import Resolution, places_by_resolution


@pytest.mark.parametrize(
    ("value", "expected", "shown"),
    [
        (64, (64, 64), "64"),
        ([64, 96], (64, 96), "[64, 96]"),
        ((96, 64), (96, 64), "[96, 64]"),
        ([64, 64], (64, 64), "64"),
        (OmegaConf.create([64, 96]), (64, 96), "[64, 96]"),
    ],
    ids=str,
)
def test_a_number_is_a_square_and_two_are_height_and_width(
    value: object, expected: tuple[int, int], shown: str
) -> None:
    resolution = Resolution.read(value, "model.resolution")
    assert (resolution.height, resolution.width) == expected
    assert str(resolution) == shown
    assert resolution.area == expected[0] * expected[1]


@pytest.mark.parametrize(
    "value", [None, True, 64.0, "64", "ab", [], [64], [64, 64, 64], [64, 96.0], [64, True]], ids=str
)
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(
        ValueError, match=r"^model\.resolution must be a whole number or \[height, width\], got"
    ) as raised:
        Resolution.read(value, "model.resolution")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((500, 768), "it: height and width must be multiples of 16; 496 and 512 are the nearest to 500"),
        ((768, 500), "it: height and width must be multiples of 16; 496 and 512 are the nearest to 500"),
        ((500, 500), "it: height and width must be multiples of 16; 496 and 512 are the nearest to 500"),
        (
            (511, 17),
            "it: height and width must be multiples of 16; 496 and 512 are the nearest to 511, 16 and 32 are the "
            "nearest to 17",
        ),
        ((15, 16), "it: height and width must be multiples of 16; 16 is the nearest to 15"),
        ((-32, 16), "it: height and width must be multiples of 16; 16 is the nearest to -32"),
        ((16, 1025), "it: height and width must be at most 1024; this model has no more positions"),
    ],
)
def test_the_nearest_that_fit_are_named(sides: tuple[int, int], message: str) -> None:
    sizes = ImageSizes.of(patch=2, pixels=8, most_tokens=64)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sizes.check(Resolution(*sides), "it")
    sizes.check(Resolution(16, 1024), "it")


def test_places_are_found_by_resolution_in_the_order_of_first_sight() -> None:
    wide = Resolution(1, 2)
    assert list(places_by_resolution([wide, None, wide, Resolution(2, 1)]).items()) == [
        (wide, [0, 2]),
        (None, [1]),
        (Resolution(2, 1), [3]),
    ]
