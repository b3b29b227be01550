"""Images of prompts: from plain or learned noise, or the best that a search finds.  A PNG an image, and a grid."""

import re
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from PIL import Image

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.commands.output_directory import new_directory
from fastgrpo.commands.proposal import starts_of, wanted_proposal
from fastgrpo.commands.searching import account, begun_search, in_words, wanted_search
from fastgrpo.commands.trained import load_model
from fastgrpo.files.whole import write_whole
from fastgrpo.image_search import plain
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.parts import build_rewards, read_prompts, read_runtime
from fastgrpo.pieces import build
from fastgrpo.prompt_images import PromptImages
from fastgrpo.records.grids import draw_grid, png, to_uint8
from fastgrpo.sampler import Sampler
from fastgrpo.search_portion import Cost
from fastgrpo.settings import check_seed
from fastgrpo.types import Prompt

_MAX_NAME = 40


def sample(config: DictConfig) -> None:
    """Run a checked ``sample`` config and print where the images are."""
    prompts = _prompts(config)
    check_seed(config.seed)
    batch_sizes = BatchSizes.of_runtime(read_runtime(config))
    if config.images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be at least 1, got {config.images_per_prompt}")
    algorithm: Algorithm = build(config.algorithm)
    grid = algorithm.evaluation_grid(config.num_steps)
    search = wanted_search(config, config.num_steps)
    rewards = build_rewards(config, prompts=prompts)[0] if search else None
    proposal = wanted_proposal(config)
    directory = new_directory(config.output)
    model, origin = load_model(config)
    sampler = Sampler(model=model, grid=grid, batch_sizes=batch_sizes)
    labels = [prompt.text for prompt in prompts for _ in range(config.images_per_prompt)]
    pages: dict[int, np.ndarray] = {}
    said, cost = "", Cost()
    with ExitStack() as bar:
        starts, noise = starts_of(proposal, config, model, prompts[0].text)
        origin = f"{origin}, {noise}" if noise else origin
        make = plain(sampler, starts)
        if search and rewards:
            make = begun = bar.enter_context(begun_search(search, config, sampler, rewards, algorithm, len(labels)))
        images = PromptImages(sampler=sampler, make=make, images_per_prompt=config.images_per_prompt, seed=config.seed)
        for places, searched in images(prompts):
            cost += searched.cost
            of_prompts = searched.images_BCHW.split(config.images_per_prompt)
            for index, images_GCHW in zip(places, of_prompts, strict=True):
                pages[index] = to_uint8(images_GCHW)
                for number, pixels_HWC in enumerate(pages[index]):
                    name = _file_name(index, number, prompts[index].text)
                    write_whole(directory / name, png(Image.fromarray(pixels_HWC)))
        if search:
            said = f", {in_words(account(begun, cost, len(labels)))}"
    pixels = [pixels_HWC for index in sorted(pages) for pixels_HWC in pages[index]]
    write_whole(directory / "grid.png", png(draw_grid(pixels, labels)))
    print(f"{len(labels)} images of {origin}{said}: {directory}, all on one page in {directory / 'grid.png'}")


def _prompts(config: DictConfig) -> list[Prompt]:
    if bool(config.prompt.strip()) == bool(config.prompts.path):
        raise ValueError("give either prompt='a red circle' or prompts.path=FILE")
    return [Prompt(config.prompt.strip())] if config.prompt else read_prompts(config, "path")


def _file_name(index: int, number: int, text: str) -> Path:
    words = re.sub(r"[^a-z0-9]+", "_", text.lower())[:_MAX_NAME].strip("_")
    return Path(f"{index:04d}_{number:02d}_{words}.png".replace("_.", "."))
