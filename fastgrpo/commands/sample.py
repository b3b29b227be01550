"""Images of prompts: start noise, plain, learned or searched, then ODE steps.  A PNG an image, and a grid of all."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.noise import START_STREAM, NoiseDraw, Starts
from fastgrpo.commands.output_directory import new_directory
from fastgrpo.commands.proposal import load_starts
from fastgrpo.commands.trained import load_model
from fastgrpo.files.whole import write_whole
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.parts import build_rewards, read_prompts, read_runtime
from fastgrpo.pieces import build
from fastgrpo.records.grids import draw_grid, png, to_uint8
from fastgrpo.resolution import places_by_resolution
from fastgrpo.sampler import Sampler
from fastgrpo.settings import check_seed
from fastgrpo.start_noise import StartNoise
from fastgrpo.types import Prompt, Prompts, Samples

_MAX_NAME = 40


def sample(config: DictConfig) -> None:
    """Run a checked ``sample`` config and print where the images are."""
    prompts = _prompts(config)
    check_seed(config.seed)
    batch_sizes = BatchSizes.of_runtime(read_runtime(config))
    if config.images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be at least 1, got {config.images_per_prompt}")
    if config.search and config.proposal not in ("auto", "none"):
        raise ValueError(f"search=true finds start noise of its own, got proposal={config.proposal}; use proposal=none")
    algorithm: Algorithm = build(config.algorithm)
    grid = algorithm.evaluation_grid(config.num_steps)
    rewards = build_rewards(config, prompts=[prompt.text for prompt in prompts])[0] if config.search else None
    directory = new_directory(config.output)
    model, origin = load_model(config)
    sampler = Sampler(model=model, grid=grid, batch_sizes=batch_sizes)
    start_noise: Callable[[Samples], Tensor]
    if rewards is not None:
        search = StartNoise(algorithm=algorithm, rewards=rewards, sampler=sampler, seed=config.seed)
        start_noise = partial(_searched, search)
    else:
        starts, noise = load_starts(config, model, prompts[0].text)
        start_noise = partial(_drawn, sampler=sampler, seed=config.seed, starts=starts)
        origin = f"{origin}, {noise}" if noise else origin
    images = PromptImages(sampler=sampler, start_noise=start_noise, images_per_prompt=config.images_per_prompt)
    pages: dict[int, np.ndarray] = {}
    for index, images_BCHW in images(prompts):
        pages[index] = to_uint8(images_BCHW)
        for number, pixels_HWC in enumerate(pages[index]):
            write_whole(directory / _file_name(index, number, prompts[index].text), png(Image.fromarray(pixels_HWC)))
    labels = [prompt.text for prompt in prompts for _ in range(config.images_per_prompt)]
    pixels = [pixels_HWC for index in sorted(pages) for pixels_HWC in pages[index]]
    write_whole(directory / "grid.png", png(draw_grid(pixels, labels)))
    print(f"{len(labels)} images of {origin}: {directory}, all on one page in {directory / 'grid.png'}")


@dataclass(frozen=True, kw_only=True)
class PromptImages:
    """``images_per_prompt`` images [B, 3, H, W] of each prompt, each from its start noise."""

    sampler: Sampler
    start_noise: Callable[[Samples], Tensor]
    images_per_prompt: int

    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Tensor]]:
        """The place of each prompt and its images, one resolution after the other."""
        at_once = max(1, self.sampler.batch_sizes.sampling.value // self.images_per_prompt)
        for resolution, places in places_by_resolution(prompt.resolution for prompt in prompts).items():
            for first in range(0, len(places), at_once):
                ids = places[first : first + at_once]
                part = Prompts([prompts[place].text for place in ids], ids, resolution)
                samples = Samples.all_of(part, self.images_per_prompt)
                conditions = self.sampler.model.encode(samples.texts)
                images_BCHW = self.sampler(samples, conditions, self.start_noise(samples))
                yield from zip(ids, images_BCHW.split(self.images_per_prompt), strict=True)


def _searched(search: StartNoise, samples: Samples) -> Tensor:
    noise = search(samples)
    if noise.num_scored == 0:
        raise ValueError("search=true, but this algorithm's noise is not searched; use algorithm/noise=elite")
    return noise.start_BCHW


def _drawn(samples: Samples, *, sampler: Sampler, seed: int, starts: Starts) -> Tensor:
    model, prompts = sampler.model, samples.prompts
    shape = model.latent_shape_of(prompts.resolution)
    draw = NoiseDraw(seed, prompts.ids, samples.group_size, shape, model.device)
    return starts(draw, START_STREAM, model.encode(samples.texts))


def _prompts(config: DictConfig) -> list[Prompt]:
    if bool(config.prompt.strip()) == bool(config.prompts.path):
        raise ValueError("give either prompt='a red circle' or prompts.path=FILE")
    return [Prompt(config.prompt.strip())] if config.prompt else read_prompts(config, "path")


def _file_name(index: int, number: int, text: str) -> Path:
    words = re.sub(r"[^a-z0-9]+", "_", text.lower())[:_MAX_NAME].strip("_")
    return Path(f"{index:04d}_{number:02d}_{words}.png".replace("_.", "."))
