"""Which images a pipeline can draw, told from its configs before a weight is loaded.

pixels in a row = tokens in a row * latent pixels of a token * pixels of a latent pixel
"""

from dataclasses import dataclass

from fastgrpo.resolution import Resolution


@dataclass(frozen=True)
class ImageSizes:
    """Heights and widths in pixels: multiples of ``step``, up to ``largest`` where there are positions for no more."""

    step: int
    largest: int | None = None

    @classmethod
    def of(cls, *, patch: int, pixels: int, most_tokens: int | None) -> "ImageSizes":
        """``patch`` latent pixels of ``pixels`` each are one token, of which at most ``most_tokens`` are in a row."""
        step = patch * pixels
        return cls(step, None if most_tokens is None else step * most_tokens)

    def check(self, resolution: Resolution, what: str) -> None:
        """ValueError, which begins with ``what``, for a resolution that cannot be drawn."""
        if self.largest is not None and max(resolution) > self.largest:
            raise ValueError(
                f"{what}: height and width must be at most {self.largest}; this model has no more positions"
            )
        if odd := [side for side in dict.fromkeys(resolution) if side < self.step or side % self.step]:
            nearest = ", ".join(map(self._nearest, odd))
            raise ValueError(f"{what}: height and width must be multiples of {self.step}; {nearest}")

    def _nearest(self, side: int) -> str:
        below = side // self.step * self.step
        if below < self.step:
            return f"{self.step} is the nearest to {side}"
        return f"{below} and {below + self.step} are the nearest to {side}"
