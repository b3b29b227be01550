"""Height and width of an image in pixels, as a config or a row of a prompt file has them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# of one prompt file: each is compiled for on its own, and has its own CUDA graphs
MAX_RESOLUTIONS = 8


class Resolution(NamedTuple):
    """Of an image, not of its latent."""

    height: int
    width: int

    @classmethod
    def read(cls, value: object, what: str) -> "Resolution":
        """Of a whole number, which is a square, or [height, width]; ValueError on ``what`` for anything else."""
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        sides = list(value) if is_list else [value, value]  # type: ignore[call-overload]
        if len(sides) != 2 or any(type(side) is not int for side in sides):
            raise ValueError(f"{what} must be a whole number or [height, width], got {value!r}")
        return cls(*sides)

    @property
    def area(self) -> int:
        """Pixels."""
        return self.height * self.width

    def __str__(self) -> str:
        return str(self.height) if self.height == self.width else f"[{self.height}, {self.width}]"


def places_by_resolution(resolutions: Iterable[Resolution | None]) -> dict[Resolution | None, list[int]]:
    """Where each of them stands, in the order in which they are first met."""
    places: dict[Resolution | None, list[int]] = {}
    for place, resolution in enumerate(resolutions):
        places.setdefault(resolution, []).append(place)
    return places
