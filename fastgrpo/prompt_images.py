"""Images of prompts, plain or searched: what ``fastgrpo sample`` writes, and as a function.

Letters: P prompts, G images of each, B images of some prompts, prompt by prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.image_search import DEFAULT_SEARCH
from fastgrpo.algorithm.making import Search
from fastgrpo.algorithm.noise import NoiseDraw
from fastgrpo.image_search import ImageSearch, Searched
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.adapter import FlowModel
from fastgrpo.resolution import places_by_resolution
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.search_portion import Cost, watched_by_nobody
from fastgrpo.types import Prompt, Prompts, Samples, as_prompts


@dataclass(frozen=True)
class SearchedPrompts:
    """Of each prompt its images, float32 [G, 3, height, width] in [0, 1], and what was searched for, [P, G]."""

    images: list[Tensor]
    scores_PG: Tensor
    cost: Cost


def search_images(
    model: FlowModel,
    prompts: Sequence[str | Prompt],
    rewards: Rewards,
    *,
    algorithm: Algorithm,
    search: Search = DEFAULT_SEARCH,
    budget: int = 64,
    images_per_prompt: int = 1,
    num_steps: int = 10,
    seed: int = 42,
    batch_sizes: BatchSizes | None = None,
    watch: Callable[[int], None] = watched_by_nobody,
) -> SearchedPrompts:
    """Images of prompts, each the best that ``search`` finds by the weighted sum of ``rewards``.

    model: of ``fastgrpo.parts.build_model``, or a run's of ``fastgrpo.commands.trained.load_model``.
    algorithm: its schedule alone is of use, for the times of images and of estimates.
    search: of ``fastgrpo.algorithm.image_search``, or one of your own.
    budget: network evaluations an image; with two branches of guidance a velocity takes two.
    batch_sizes: images at a time; None is 16.  What is found does not depend on it but for rounding.
    watch: told of network evaluations as they are made.

    ValueError for a budget too small for one image, RewardError for a reward that fails or answers NaN.
    """
    if images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be at least 1, got {images_per_prompt}")
    asked = as_prompts(prompts)
    sampler = Sampler(
        model=model, grid=algorithm.evaluation_grid(num_steps), batch_sizes=batch_sizes or BatchSizes.of(16)
    )
    searching = ImageSearch(
        sampler=sampler,
        rewards=rewards,
        search=search,
        budget=budget,
        estimate_grid=algorithm.estimate_grid,
        watch=watch,
    )
    make = PromptImages(sampler=sampler, make=searching, images_per_prompt=images_per_prompt, seed=seed)
    images: dict[int, Tensor] = {}
    scores: dict[int, Tensor] = {}
    cost = Cost()
    for places, searched in make(asked):
        images |= zip(places, searched.images_BCHW.split(images_per_prompt), strict=True)
        scores |= zip(places, searched.scores_B.split(images_per_prompt), strict=True)
        cost += searched.cost
    in_order = range(len(asked))
    scores_PG = torch.stack([scores[place] for place in in_order]) if asked else torch.empty(0, images_per_prompt)
    return SearchedPrompts([images[place] for place in in_order], scores_PG, cost)


@dataclass(frozen=True, kw_only=True)
class PromptImages:
    """``images_per_prompt`` images of each prompt, by the places of some prompts at a time.

    make: images of samples whose noise is ``draw``, as ``ImageSearch``, or ``plain(sampler)``.
    """

    sampler: Sampler
    make: Callable[[Samples, NoiseDraw], Searched]
    images_per_prompt: int
    seed: int

    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[tuple[list[int], Searched]]:
        """Those of some prompts at a time, of one resolution after the other."""
        at_once = max(1, self.sampler.batch_sizes.sampling.value // self.images_per_prompt)
        for resolution, places in places_by_resolution(prompt.resolution for prompt in prompts).items():
            for first in range(0, len(places), at_once):
                ids = places[first : first + at_once]
                part = Prompts([prompts[place] for place in ids], ids, resolution)
                samples = Samples.all_of(part, self.images_per_prompt)
                model = self.sampler.model
                shape = model.latent_shape_of(resolution)
                yield ids, self.make(samples, NoiseDraw(self.seed, ids, samples.group_size, shape, model.device))
