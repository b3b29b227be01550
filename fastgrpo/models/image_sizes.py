"""Which images a pipeline can draw, told from its configs before a weight is loaded.

pixels in a row = tokens in a row * latent pixels of a token * pixels of a latent pixel
"""

from dataclasses import dataclass


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

    def check(self, resolution: int) -> None:
        """ValueError for a ``model.resolution`` that cannot be drawn."""
        if resolution < self.step or resolution % self.step:
            raise ValueError(f"model.resolution must be a positive multiple of {self.step}, got {resolution}")
        if self.largest is not None and resolution > self.largest:
            raise ValueError(
                f"model.resolution must be at most {self.largest}, got {resolution}; it has positions for no more"
            )
