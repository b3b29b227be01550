"""Evaluation: held-out prompts, plain N(0, I) noise, ODE steps, EMA weights.

In training neither a search nor learned noise; ``fastgrpo evaluate`` may be given either.
The same prompts and noise each time, so that two evaluations of a run differ by the weights alone.  Images are made one
resolution after the other, those of each spread over the ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fastgrpo.algorithm.noise import EVALUATION_STREAM, NoiseDraw, Starts, plain_starts
from fastgrpo.distributed.spread import Spread, pieces
from fastgrpo.distributed.world import World
from fastgrpo.image_search import ImageSearch, plain
from fastgrpo.memory.batches import BatchSizes, even
from fastgrpo.models.adapter import FlowModel
from fastgrpo.resolution import places_by_resolution
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.search_portion import Cost
from fastgrpo.types import Prompt, Prompts, Samples


@dataclass(frozen=True)
class EvaluationResult:
    """Each named reward: of all images, [P, G] in ``scores``, and its mean; one image of each of the first few prompts.

    ``verified`` says of each of those whether it is right, where a reward is a verdict: 0 or 1 for every image.  The
    images, [3, H, W] each, and ``texts`` and ``verified`` of them, are there on the first rank alone.  ``cost`` is what
    this rank's images took.
    """

    scores: dict[str, Tensor]
    means: dict[str, float]
    num_images: int
    texts: list[str]
    images: list[Tensor]
    verified: list[bool] | None
    cost: Cost = field(default_factory=Cost)


def statistics(scores_PG: Tensor) -> dict[str, float | None]:
    """The mean, and its standard error over prompts, None of one prompt: images of one prompt are not independent."""
    means_P = scores_PG.double().mean(dim=1)
    error = means_P.std().item() / len(means_P) ** 0.5 if len(means_P) > 1 else None
    return {"mean": means_P.mean().item(), "standard_error": error}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """``images_per_prompt`` images of each prompt on ``grid``; ``num_shown`` of them, of distinct prompts, are kept.

    A ``search``, with a sampler of the same grid, finds each image; each rank searches for its own.
    """

    model: FlowModel
    rewards: Rewards
    prompts: Sequence[Prompt]
    images_per_prompt: int
    grid: Sequence[float]
    batch_sizes: BatchSizes
    seed: int
    num_shown: int = 32
    starts: Starts = plain_starts
    world: World = field(default_factory=World)
    search: ImageSearch | None = None

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise ValueError(f"evaluate.images_per_prompt must be at least 1, got {self.images_per_prompt}")

    @torch.no_grad()
    def __call__(self) -> EvaluationResult:
        spread = Spread.of_shares(self._shares, self.world.size)
        shown: dict[str, Tensor] = {}
        costs: list[Cost] = []
        rewards_BR = self.world.gather(lambda: self._rewards(shown, costs), spread, len(self.rewards.all), "evaluation")
        rewards = self.rewards.of_groups(rewards_BR, self.images_per_prompt)
        scores = {name: scores_PG.cpu() for name, scores_PG in rewards.named.items()}
        found = self.world.to_first(shown, "images to show")
        images = [found[name] for name in sorted(found, key=int)]
        verdict = next((s_PG == 1 for s_PG in scores.values() if bool(((s_PG == 0) | (s_PG == 1)).all())), None)
        return EvaluationResult(
            scores=scores,
            means={name: scores_PG.mean().item() for name, scores_PG in scores.items()},
            num_images=len(rewards_BR),
            texts=self.texts[: len(images)],
            images=images,
            verified=verdict[: len(images), 0].tolist() if verdict is not None else None,
            cost=sum(costs, Cost()),
        )

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @cached_property
    def _shares(self) -> list[list[int]]:
        """The rows of each resolution: of P * G images, prompt by prompt."""
        return [
            [prompt * self.images_per_prompt + place for prompt in found for place in range(self.images_per_prompt)]
            for found in places_by_resolution(prompt.resolution for prompt in self.prompts).values()
        ]

    def _rewards(self, shown: dict[str, Tensor], costs: list[Cost]) -> Tensor:
        """Rewards [b, R] of this rank's images, of which the first of some prompts are put into ``shown``."""
        sampler = Sampler(model=self.model, grid=self.grid, batch_sizes=self.batch_sizes)
        make = plain(sampler, self.starts) if self.search is None else self.search
        own, made = self._spread()
        awaited = self.rewards.begin([prompt for rows in made for prompt in self._samples(rows, len(rows)).asked])
        # without what is lossy: an evaluation judges the policy alone
        with self.model.gathered(), self.model.sampling():
            for samples in (samples for rows in made for samples in self._portions(rows)):
                draw = NoiseDraw(
                    self.seed,
                    samples.prompts.ids,
                    self.images_per_prompt,
                    self.model.latent_shape_of(samples.prompts.resolution),
                    self.model.device,
                    rows=samples.rows,
                )
                made_here = make(samples, draw, EVALUATION_STREAM, awaited.add)
                costs.append(made_here.cost)
                for row, image_CHW in zip(samples.rows, made_here.images_BCHW, strict=True):
                    prompt, place = divmod(row, self.images_per_prompt)
                    if place == 0 and prompt < self.num_shown and any(row in rows for rows in own):
                        shown[str(prompt)] = image_CHW.cpu()
        parts = awaited.collect().split([len(rows) for rows in made])
        return torch.cat([part_BR[: len(rows)] for part_BR, rows in zip(parts, own, strict=True)])

    def _spread(self) -> tuple[list[Sequence[int]], list[tuple[int, ...]]]:
        """This rank's rows of each resolution, and those that it makes.

        Ranks keep step: one with fewer rows than others makes one more, which is thrown away.
        """
        by_rank = pieces(self._shares, self.world.size)
        own = by_rank[self.world.rank]
        most = [max(map(len, of_ranks)) for of_ranks in zip(*by_rank, strict=True)]
        made = [(*rows, *share[: n - len(rows)]) for rows, share, n in zip(own, self._shares, most, strict=True)]
        return own, made

    def _portions(self, rows: tuple[int, ...]) -> Iterator[Samples]:
        """A few at a time: a full-size evaluation does not fit a GPU's memory as images."""
        first = 0
        while first < len(rows):
            size = even(len(rows), self.batch_sizes.sampling.value)
            # the last ones are filled up: a shape of their own would be compiled on its own
            yield self._samples(rows[first : first + size], most=size)
            first += size

    def _samples(self, rows: tuple[int, ...], most: int) -> Samples:
        # all are of one resolution
        resolution = self.prompts[rows[0] // self.images_per_prompt].resolution
        prompts = Prompts(self.prompts, list(range(len(self.prompts))), resolution)
        return Samples(prompts, self.images_per_prompt, rows, most)
