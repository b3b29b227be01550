"""Images of prompts: start noise, plain or searched, then ODE steps.  One PNG an image, and a labelled grid of all."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.noise import NoiseDraw, plain_noise
from fastgrpo.commands.output_directory import new_directory
from fastgrpo.commands.trained import load_model
from fastgrpo.files.locations import resolve_path
from fastgrpo.files.whole import write_whole
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.parts import build_rewards, read_runtime
from fastgrpo.pieces import build
from fastgrpo.prompts import load_prompts
from fastgrpo.records.grids import draw_grid, png, to_uint8
from fastgrpo.sampler import Sampler
from fastgrpo.settings import check_seed
from fastgrpo.start_noise import StartNoise
from fastgrpo.types import Prompts, Samples

_MAX_NAME = 40


def sample(config: DictConfig) -> None:
    """Run a checked ``sample`` config and print where the images are."""
    texts = _texts(config)
    check_seed(config.seed)
    batch_sizes = BatchSizes.of_runtime(read_runtime(config))
    if config.images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be at least 1, got {config.images_per_prompt}")
    algorithm: Algorithm = build(config.algorithm)
    grid = algorithm.evaluation_grid(config.num_steps)
    rewards = build_rewards(config, prompts=texts)[0] if config.search else None
    directory = new_directory(config.output)
    model, origin = load_model(config)
    sampler = Sampler(model=model, grid=grid, batch_sizes=batch_sizes)
    start_noise: Callable[[Samples], Tensor]
    if rewards is not None:
        search = StartNoise(algorithm=algorithm, rewards=rewards, sampler=sampler, seed=config.seed)
        start_noise = partial(_searched, search)
    else:
        start_noise = partial(_plain, sampler=sampler, seed=config.seed)
    images = PromptImages(sampler=sampler, start_noise=start_noise, images_per_prompt=config.images_per_prompt)
    pages, labels = [], []
    for index, (text, images_BCHW) in enumerate(zip(texts, images(texts), strict=True)):
        pixels_BHWC = to_uint8(images_BCHW)
        for number, pixels_HWC in enumerate(pixels_BHWC):
            write_whole(directory / _file_name(index, number, text), png(Image.fromarray(pixels_HWC)))
        pages.append(torch.from_numpy(pixels_BHWC))
        labels += [text] * len(pixels_BHWC)
    write_whole(directory / "grid.png", png(draw_grid(torch.cat(pages).numpy(), labels)))
    print(f"{len(labels)} images of {origin}: {directory}, all on one page in {directory / 'grid.png'}")


@dataclass(frozen=True, kw_only=True)
class PromptImages:
    """``images_per_prompt`` images [B, 3, H, W] of each text, each from its start noise."""

    sampler: Sampler
    start_noise: Callable[[Samples], Tensor]
    images_per_prompt: int

    def __call__(self, texts: list[str]) -> Iterator[Tensor]:
        """The images of one prompt after the other."""
        prompts_at_once = max(1, self.sampler.batch_sizes.sampling.value // self.images_per_prompt)
        for first in range(0, len(texts), prompts_at_once):
            part = texts[first : first + prompts_at_once]
            prompts = Prompts(part, ids=list(range(first, first + len(part))))
            samples = Samples.all_of(prompts, self.images_per_prompt)
            conditions = self.sampler.model.encode(samples.texts)
            images_BCHW = self.sampler(samples, conditions, self.start_noise(samples))
            yield from images_BCHW.split(self.images_per_prompt)


def _searched(search: StartNoise, samples: Samples) -> Tensor:
    noise = search(samples)
    if noise.num_scored == 0:
        raise ValueError("search=true, but this algorithm's noise is not searched; use algorithm/noise=elite")
    return noise.start_BCHW


def _plain(samples: Samples, *, sampler: Sampler, seed: int) -> Tensor:
    model = sampler.model
    return plain_noise(NoiseDraw(seed, samples.prompts.ids, samples.group_size, model.latent_shape, model.device))


def _texts(config: DictConfig) -> list[str]:
    if bool(config.prompt.strip()) == bool(config.prompts.path):
        raise ValueError("give either prompt='a red circle' or prompts.path=FILE")
    return [config.prompt.strip()] if config.prompt else load_prompts(resolve_path(config.prompts.path))


def _file_name(index: int, number: int, text: str) -> Path:
    words = re.sub(r"[^a-z0-9]+", "_", text.lower())[:_MAX_NAME].strip("_")
    return Path(f"{index:04d}_{number:02d}_{words}.png".replace("_.", "."))
