"""Pictures of words, whose ocr reward follows from their spelling.

Fonts, sizes, colors and backgrounds are drawn from a seed; the fonts are Pillow's own and, where they are found, those
of the system.  Letters: B images, C H W.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

SIZE = 512
VIEWS = ("as drawn", "blurred", "JPEG", "autoencoder")
# fmt: off
_WORDS = [
    "open", "market", "the", "garden", "bakery", "summer", "sale", "fresh", "coffee", "midnight", "river",
    "welcome", "home", "danger", "exit", "jazz", "night", "parking", "magic", "library", "quiet", "harbor", "north",
    "station", "thunder", "yellow", "paper", "dream", "winter", "museum", "hotel",
]
# fmt: on
# no letter that looks like another one in some font or case
_LETTERS = "abdeghkmnprstw"
_FONTS = ("", *sorted(map(str, Path("/usr/share/fonts/truetype").glob("*/*Sans*.ttf"))))


@dataclass(frozen=True)
class Sample:
    """A picture, its prompt, and the reward that follows from its spelling."""

    kind: str
    prompt: str
    picture: Image.Image
    expected: float


def samples(seed: int) -> list[Sample]:
    """One picture of each kind, for a phrase of two or three words."""
    generator = np.random.default_rng(seed)
    words = [str(word) for word in generator.choice(_WORDS, size=generator.integers(2, 4), replace=False)]
    words = [str(generator.choice([word, word.upper(), word.capitalize()])) for word in words]
    phrase, length = " ".join(words), len("".join(words))
    prompt = f'a shop window with the words "{phrase}"'
    dropped = int(generator.integers(len(words)))
    kept = words[:dropped] + words[dropped + 1 :]
    style = Style.draw(generator)
    noise = Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    return [
        Sample("exact", prompt, style.write(words), 1.0),
        Sample("one wrong letter", prompt, style.write(misspelled(words, 1, generator)), 1 - 1 / length),
        Sample("two wrong letters", prompt, style.write(misspelled(words, 2, generator)), 1 - 2 / length),
        Sample("missing word", prompt, style.write(kept), 1 - len(words[dropped]) / length),
        Sample("noise", prompt, noise, 0.0),
        Sample("blank", prompt, style.write([]), 0.0),
    ]


def misspelled(words: list[str], num_wrong: int, generator: np.random.Generator) -> list[str]:
    """The words with so many letters replaced by others: that is their edit distance too."""
    letters = list(" ".join(words))
    places = [place for place, letter in enumerate(letters) if letter != " "]
    for place in generator.choice(places, size=num_wrong, replace=False):
        other = str(generator.choice([letter for letter in _LETTERS if letter != letters[place].lower()]))
        letters[place] = other.upper() if letters[place].isupper() else other
    return "".join(letters).split(" ")


@dataclass(frozen=True)
class Style:
    """How a phrase is written, one word a line."""

    font: str
    points: int
    ink: tuple[int, int, int]
    paper: tuple[int, int, int]
    # of the paper: noise as a standard deviation of bytes, and the change from top to bottom
    grain: float
    shade: float
    degrees: float

    @classmethod
    def draw(cls, generator: np.random.Generator) -> "Style":
        dark, bright = generator.integers(0, 90, 3).tolist(), generator.integers(165, 256, 3).tolist()
        ink, paper = (dark, bright) if generator.random() < 0.5 else (bright, dark)
        return cls(
            font=str(generator.choice(_FONTS)),
            points=int(generator.choice([24, 36, 48, 64, 80])),
            ink=tuple(ink),
            paper=tuple(paper),
            grain=float(generator.choice([0.0, 8.0, 16.0])),
            shade=float(generator.uniform(-40, 40)),
            degrees=float(generator.uniform(-4, 4)),
        )

    def write(self, words: list[str]) -> Image.Image:
        """A picture [SIZE, SIZE] of the words, or of the paper alone."""
        shade_H11 = np.linspace(-self.shade / 2, self.shade / 2, SIZE).reshape(-1, 1, 1)
        grain_HWC = self.grain * np.random.default_rng(len("".join(words))).standard_normal((SIZE, SIZE, 3))
        paper_HWC = (np.array(self.paper) + shade_H11 + grain_HWC).clip(0, 255).astype(np.uint8)
        mask = Image.new("L", (SIZE, SIZE))
        font = ImageFont.truetype(self.font, self.points) if self.font else ImageFont.load_default(self.points)
        middle = (SIZE / 2, SIZE / 2)
        ImageDraw.Draw(mask).multiline_text(middle, "\n".join(words), fill=255, font=font, anchor="mm", align="center")
        picture = Image.fromarray(paper_HWC)
        picture.paste(self.ink, mask=mask.rotate(self.degrees, Image.Resampling.BICUBIC))
        return picture


def seen(picture: Image.Image, view: str) -> Image.Image:
    """The picture after what a view does to it."""
    if view == "blurred":
        return picture.filter(ImageFilter.GaussianBlur(1.5))
    if view == "JPEG":
        file = BytesIO()
        picture.save(file, format="JPEG", quality=30)
        return Image.open(file).convert("RGB")
    return decoded(picture) if view == "autoencoder" else picture


@torch.no_grad()
def decoded(picture: Image.Image) -> Image.Image:
    """Encoded and decoded by the embedded model's autoencoder."""
    vae = _autoencoder()
    latent_BCHW = vae.encode(2 * to_images([picture]) - 1).latent_dist.mean
    image_CHW = (vae.decode(latent_BCHW).sample[0] / 2 + 0.5).clamp(0, 1)
    return Image.fromarray((image_CHW * 255).round().byte().permute(1, 2, 0).numpy())


@cache
def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(str(files("fastgrpo.shapes") / "checkpoint" / "vae"), local_files_only=True)


def to_images(pictures: list[Image.Image]) -> Tensor:
    """Images [B, 3, H, W] in [0, 1]."""
    pixels_BHWC = torch.from_numpy(np.stack([np.array(picture) for picture in pictures]))
    return pixels_BHWC.permute(0, 3, 1, 2).float() / 255
