"""Images of prompts: from plain or learned noise, or the best that a search finds.  A PNG an image, and a grid.

Letters: P prompts, G images of each.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.making import Search
from fastgrpo.commands.output_directory import new_directory
from fastgrpo.commands.proposal import starts_of, wanted_proposal
from fastgrpo.commands.searching import account, begun_search, in_words, wanted_search
from fastgrpo.commands.trained import load_model
from fastgrpo.files.whole import write_whole
from fastgrpo.given import NOTHING, Given
from fastgrpo.image_search import plain
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.parts import build_rewards, read_prompts, read_runtime
from fastgrpo.pieces import build
from fastgrpo.prompt_images import PromptImages
from fastgrpo.proposal.network import ProposalNetwork
from fastgrpo.records.grids import draw_grid, png, to_uint8
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.search_portion import Cost
from fastgrpo.settings import check_seed
from fastgrpo.types import Prompt

_MAX_NAME = 40


def sample(config: DictConfig) -> None:
    """Run a checked ``sample`` config and print where the images are."""
    sampling = Sampling.read(config)
    directory = new_directory(config.output)
    texts = [prompt.text for prompt in sampling.prompts]
    pixels: dict[int, np.ndarray] = {}
    scores: dict[int, list[float]] = {}

    def write(index: int, images_GCHW: Tensor, scores_G: Tensor) -> None:
        pixels[index], scores[index] = to_uint8(images_GCHW), scores_G.tolist()
        write_images(directory, index, texts[index], pixels[index])

    made = sampling(write)
    said = f", {in_words(made.search)}" if made.search else ""
    places = range(len(texts))
    page = draw_page(texts, [pixels[i] for i in places], [scores[i] for i in places] if made.search else None)
    write_whole(directory / "grid.png", png(page))
    num_images = len(texts) * config.images_per_prompt
    print(f"{num_images} images of {made.model}{said}: {directory}, all on one page in {directory / 'grid.png'}")


def write_images(directory: Path, index: int, text: str, pixels_GHWC: np.ndarray) -> None:
    """The images of one prompt, a PNG each."""
    for number, pixels_HWC in enumerate(pixels_GHWC):
        write_whole(directory / _file_name(index, number, text), png(Image.fromarray(pixels_HWC)))


def draw_page(
    texts: Sequence[str], pixels: Sequence[np.ndarray], scores: Sequence[Sequence[float]] | None
) -> Image.Image:
    """The images of each prompt, uint8 [G, H, W, 3], on one page, with what a search scored each."""
    labels = [text for text, pixels_GHWC in zip(texts, pixels, strict=True) for _ in pixels_GHWC]
    scored = None if scores is None else [score for scores_G in scores for score in scores_G]
    return draw_grid([pixels_HWC for pixels_GHWC in pixels for pixels_HWC in pixels_GHWC], labels, scores=scored)


@dataclass(frozen=True)
class Origin:
    """In words what images are of, and what was searched for, by which method and at what cost; None for no search."""

    model: str
    search: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a config asks for, with all read but its model, which is loaded when this is called."""

    config: DictConfig
    prompts: list[Prompt]
    algorithm: Algorithm
    grid: Sequence[float]
    batch_sizes: BatchSizes
    search: Search | None
    rewards: Rewards | None
    proposal: ProposalNetwork | None

    @classmethod
    def read(cls, config: DictConfig, given: Given = NOTHING) -> "Sampling":
        """Of a checked ``sample`` config; prompts that are given take the place of its own."""
        prompts = _prompts(config, given)
        check_seed(config.seed)
        batch_sizes = BatchSizes.of_runtime(read_runtime(config))
        if config.images_per_prompt < 1:
            raise ValueError(f"images_per_prompt must be at least 1, got {config.images_per_prompt}")
        algorithm: Algorithm = build(config.algorithm)
        search = wanted_search(config, config.num_steps)
        return cls(
            config=config,
            prompts=prompts,
            algorithm=algorithm,
            grid=algorithm.evaluation_grid(config.num_steps),
            batch_sizes=batch_sizes,
            search=search,
            rewards=build_rewards(config, prompts, given)[0] if search else None,
            proposal=wanted_proposal(config),
        )

    def __call__(self, take: Callable[[int, Tensor, Tensor], None]) -> Origin:
        """Make the images; ``take`` is given a prompt's place, its images [G, 3, H, W] in [0, 1] and their scores [G].

        Scores are what was searched for, and NaN where nothing was.
        """
        config, num_images = self.config, len(self.prompts) * self.config.images_per_prompt
        model, origin = load_model(config)
        sampler = Sampler(model=model, grid=self.grid, batch_sizes=self.batch_sizes)
        searched_for, cost = None, Cost()
        with ExitStack() as bar:
            starts, noise = starts_of(self.proposal, config, model, self.prompts[0].text)
            make = plain(sampler, starts)
            if self.search and self.rewards:
                begun = begun_search(self.search, config, sampler, self.rewards, self.algorithm, num_images)
                make = search = bar.enter_context(begun)
            count = config.images_per_prompt
            images = PromptImages(sampler=sampler, make=make, images_per_prompt=count, seed=config.seed)
            for places, searched in images(self.prompts):
                cost += searched.cost
                made = zip(places, searched.images_BCHW.split(count), searched.scores_B.split(count), strict=True)
                for index, images_GCHW, scores_G in made:
                    take(index, images_GCHW, scores_G)
            if self.search:
                searched_for = account(search, cost, num_images)
        return Origin(f"{origin}, {noise}" if noise else origin, searched_for)


def _prompts(config: DictConfig, given: Given) -> list[Prompt]:
    if given.path is not None:
        return read_prompts(config, "path", given)
    if bool(config.prompt.strip()) == bool(config.prompts.path):
        raise ValueError("give either prompt='a red circle' or prompts.path=FILE")
    return [Prompt(config.prompt.strip())] if config.prompt else read_prompts(config, "path")


def _file_name(index: int, number: int, text: str) -> Path:
    words = re.sub(r"[^a-z0-9]+", "_", text.lower())[:_MAX_NAME].strip("_")
    return Path(f"{index:04d}_{number:02d}_{words}.png".replace("_.", "."))
