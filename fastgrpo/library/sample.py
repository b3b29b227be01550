"""``fastgrpo.sample``: images of prompts in memory.  Letters: P prompts, G images of each, H W pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastgrpo.commands.output_directory import new_directory
from fastgrpo.commands.sample import Sampling, draw_page, write_images
from fastgrpo.files.whole import write_whole
from fastgrpo.given import Given, Row
from fastgrpo.library.process import as_before
from fastgrpo.library.settings import Directory, RewardFunction, config_with
from fastgrpo.records.grids import png, to_uint8

_REFUSED = {
    "output": "images are returned; sample(...).save(DIRECTORY) writes them",
    "prompt": "prompts are the first argument; leave this out",
    "prompts.path": "prompts are the first argument; leave this out",
}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Sampled:
    """P prompts, and of each its images, float32 [G, 3, H, W] in [0, 1] on the CPU.  A notebook shows the first ones.

    scores_PG: the weighted sum of rewards that a search maximized, None where nothing was searched.
    origin: in words, which weights made them.  search: its method, settings and cost, as ``evaluation.json`` has them.
    """

    prompts: list[str]
    images: list[Tensor]
    scores_PG: Tensor | None
    origin: str
    search: dict[str, Any] | None

    @property
    def images_BCHW(self) -> Tensor:
        """All images, prompt by prompt; ValueError where they are of several sizes."""
        if len({image.shape for image in self.images}) > 1:
            raise ValueError("these images are of several sizes; take them from .images, a tensor a prompt")
        return torch.cat(self.images)

    def save(self, directory: Directory) -> Path:
        """Write a PNG an image and ``grid.png``, as the command does; ValueError unless the directory is empty."""
        path = new_directory(str(Path(directory)))
        for index, (text, images_GCHW) in enumerate(zip(self.prompts, self.images, strict=True)):
            write_images(path, index, text, to_uint8(images_GCHW))
        write_whole(path / "grid.png", png(self.grid()))
        return path

    def grid(self) -> Image.Image:
        """All images on one page, each above its prompt, with its score where a search chose it."""
        scores = None if self.scores_PG is None else self.scores_PG.tolist()
        return draw_page(self.prompts, [to_uint8(images_GCHW) for images_GCHW in self.images], scores)

    def __repr__(self) -> str:
        return f"{sum(map(len, self.images))} images of {len(self.prompts)} prompts, of {self.origin}"

    def _repr_png_(self) -> bytes:
        return png(self.grid())


def sample(
    prompts: str | Sequence[Row],
    *settings: str,
    run: Directory | None = None,
    reward: RewardFunction | None = None,
) -> Sampled:
    """Images of prompts, from the base model or from a run's averaged weights; nothing is written.

        images = fastgrpo.sample(["a red circle", "three green triangles"], "images_per_prompt=2", run="outputs/nft")
        images.images_BCHW.shape  # [4, 3, 64, 64], in [0, 1]
        images.save("outputs/circles")

    prompts: a text, or a list of texts or of mappings as a .jsonl file has them, ``{"prompt": ...}`` and more.
    settings: those of ``fastgrpo sample``, as ``"num_steps=4"``, ``"model=sd35_medium"`` or ``"search=true"``.
    run: of ``fastgrpo.train`` or ``fastgrpo.load``, or the path of a run directory or of a ``checkpoints/step_*``.
    reward: what a search maximizes, as in ``fastgrpo.train``.

    ValueError for whatever is wrong with the arguments, RewardError for a reward that fails in a search.
    """
    given = Given(reward=reward, path=[prompts] if isinstance(prompts, str) else list(prompts))
    if not given.path:
        raise ValueError("there is no prompt to sample; give a text, or a list of them")
    images: dict[int, Tensor] = {}
    scores: dict[int, Tensor] = {}

    def take(index: int, images_GCHW: Tensor, scores_G: Tensor) -> None:
        images[index], scores[index] = images_GCHW.cpu(), scores_G.cpu()

    with as_before():
        sampling = Sampling.read(config_with("sample", settings, run=run, given=given, refused=_REFUSED), given)
        made = sampling(take)
    places = range(len(sampling.prompts))
    return Sampled(
        prompts=[prompt.text for prompt in sampling.prompts],
        images=[images[place] for place in places],
        scores_PG=torch.stack([scores[place] for place in places]) if made.search else None,
        origin=made.model,
        search=made.search,
    )
