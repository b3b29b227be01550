"""Whether an image shows the text in its prompt's quotes, read by rapidocr on the CPU.

    reward = max(0, 1 - distance(read, wanted) / length(wanted))         and 1 if wanted is contained in read

distance is Levenshtein's: how many letters to insert, delete or replace.  Case, spaces, the width of a letter (a
full-width comma) and, unless they are wanted, accents do not count.

The formula is Flow-GRPO's (arXiv:2505.05470 and its code), which differs in this: it takes the first quoted part alone,
where here all parts are joined in their order; it knows straight quotes only; accents count; its PaddleOCR orders what
it found by the boxes' tops, which a slight slope reverses, where here lines are found along the slope; and where
reading fails it answers 0, where here the error is raised.

Letters: B images, N boxes, H W C of an image.
"""

import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.rewards.pixels import to_bytes

_NEEDS = ("rapidocr", "onnxruntime", "rapidfuzz")
_QUOTES = re.compile('[“”„‟"]')
# of European writing; the marks that other writing decomposes into are letters of it
_ACCENTS = re.compile("[\u0300-\u036f]")
# a reader cannot tell them apart
_PLAIN_APOSTROPHES = str.maketrans("‘’`´", "''''")


@dataclass(frozen=True, kw_only=True)
class Ocr:
    """Rewards [B] in [0, 1] of images in [0, 1].

    Wanted is what stands in double quotes, straight or curly, in the prompt; single ones are apostrophes.  A prompt
    without them raises ValueError.  ``contained`` gives full marks to a wanted text with others around it, as
    Flow-GRPO does; without it every further letter costs.  ``threads`` images are read side by side, each on one core.
    Text is searched with an image's long side at ``search_side`` pixels; smaller images are enlarged to it, and larger
    ones are read at their own size.  The reader misses or confuses accented letters: ask for plain ones.
    """

    contained: bool = True
    # of no score, so no part of the name that golden scores are recorded under
    threads: int = field(default=4, repr=False)
    # 736 takes twice as long and found no more in 512 x 512; above, letters of 200 pixels are found in halves
    search_side: int = 512

    in_thread: ClassVar[bool] = True
    golden_set: ClassVar[str] = "texts"
    # rapidocr's engine; it may be called from several threads at once
    reader: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key, least in (("threads", 1), ("search_side", 32)):
            if getattr(self, key) < least:
                raise ValueError(f"reward.terms.ocr.{key} must be at least {least}, got {getattr(self, key)}")
        if missing := [name for name in _NEEDS if find_spec(name) is None]:
            raise ValueError(f"the ocr reward needs {', '.join(missing)}; pip install 'fastgrpo[ocr]'")
        object.__setattr__(self, "reader", _load_reader(self.search_side))

    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        # bad prompts are told before anything is read
        wanted = [wanted_text(prompt) for prompt in prompts]
        read = self.read(images_BCHW)
        return torch.tensor([self._grade(*pair) for pair in zip(read, wanted, strict=True)], dtype=torch.float32)

    def check_prompt(self, prompt: str) -> None:
        """ValueError for a prompt that wants no text."""
        wanted_text(prompt)

    def read(self, images_BCHW: Tensor) -> list[str]:
        """What stands in each image, in reading order and without spaces between its parts."""
        if not images_BCHW.isfinite().all():
            raise ValueError("images have values that are not finite, which no byte can show; see where they come from")
        enlarge = self.search_side / max(images_BCHW.shape[2:])
        if enlarge > 1:
            images_BCHW = F.interpolate(images_BCHW.float(), scale_factor=enlarge, mode="bicubic")
        # crops of several images in one batch take longer than one image at a time, and would depend on each other
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._read_one, to_bytes(images_BCHW)))

    def _read_one(self, pixels_HWC: np.ndarray) -> str:
        # the networks know images as blue, green, red
        found = self.reader(np.ascontiguousarray(pixels_HWC[..., ::-1]))
        return "" if found.txts is None else "".join(found.txts[box] for box in reading_order(found.boxes))

    def _grade(self, read: str, wanted: str) -> float:
        from rapidfuzz.distance import Levenshtein

        read = _plain(read)
        # the reader sees accents on capitals that have none
        if wanted == _without_accents(wanted):
            read = _without_accents(read)
        if self.contained and wanted in read:
            return 1.0
        return max(0.0, 1.0 - Levenshtein.distance(read, wanted) / len(wanted))


def wanted_text(prompt: str) -> str:
    """The letters in the prompt's double quotes, several parts joined in order; ValueError if there are none."""
    parts = _QUOTES.split(prompt)
    # every second part is between two marks
    wanted, is_odd = _plain("".join(parts[1::2])), len(parts) % 2 == 0
    if is_odd or not wanted:
        found = "an odd number of quotation marks" if is_odd else "no text in quotation marks"
        raise ValueError(
            f"{prompt!r} has {found}; the ocr reward reads what stands between pairs of double quotes, as in: "
            'a sign that says "OPEN"'
        )
    return wanted


def reading_order(boxes_N42: np.ndarray) -> list[int]:
    """Rows of the boxes line by line, each from left to right; corners are clockwise from the top left.

    Lines run along the mean slope of the boxes' edges.  Two boxes stand on one line if their centers are less than half
    the taller one's height apart.
    """
    along_N2 = boxes_N42[:, 1] - boxes_N42[:, 0]
    slope = along_N2[:, 1].sum() / max(along_N2[:, 0].sum(), 1)
    centers_N2 = boxes_N42.mean(axis=1)
    down_N = centers_N2[:, 1] - slope * centers_N2[:, 0]
    height_N = np.linalg.norm(boxes_N42[:, 3:] - boxes_N42[:, :1], axis=2).mean(axis=1)
    lines: list[list[int]] = []
    for box in np.argsort(down_N, kind="stable").tolist():
        above = lines[-1][-1] if lines else None
        if above is not None and down_N[box] - down_N[above] < max(height_N[box], height_N[above]) / 2:
            lines[-1].append(box)
        else:
            lines.append([box])
    return [box for line in lines for box in sorted(line, key=lambda one: centers_N2[one, 0])]


def _plain(text: str) -> str:
    """In lower case, without spaces, one form for each letter."""
    return "".join(unicodedata.normalize("NFKC", text.translate(_PLAIN_APOSTROPHES)).lower().split())


def _without_accents(text: str) -> str:
    return unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", text)))


def _load_reader(search_side: int) -> Any:
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            # it tells of every image without text
            "Global.log_level": "error",
            # turning letters that stand on their head would praise them
            "Global.use_cls": False,
            "Det.limit_side_len": search_side,
            # shrinks larger images, for the search alone
            "Det.limit_type": "max",
            # two cores are 1.8 times as fast with one image each, and 1.06 times with one image on both
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
