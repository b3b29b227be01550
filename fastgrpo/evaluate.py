"""Evaluation: held-out prompts, plain N(0, I) noise, ODE steps, EMA weights.  Never the search: it is for learning.

The same prompts and noise each time, so that two evaluations of a run differ by the weights alone; the images are
spread over the ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgrpo.algorithm.noise import EVALUATION_STREAM, NoiseDraw
from fastgrpo.distributed.spread import Spread
from fastgrpo.distributed.world import World
from fastgrpo.memory.batches import BatchSizes, even
from fastgrpo.models.adapter import FlowModel
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.types import Prompts, Samples


@dataclass(frozen=True)
class EvaluationResult:
    """Each named reward: of all images, [P, G] in ``scores``, and its mean; one image of each of the first few prompts.

    ``verified`` says of each of those whether it is right, where a reward is a verdict: 0 or 1 for every image.  The
    images, and ``texts`` and ``verified`` of them, are there on the first rank alone.
    """

    scores: dict[str, Tensor]
    means: dict[str, float]
    num_images: int
    texts: list[str]
    images_BCHW: Tensor
    verified: list[bool] | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """``images_per_prompt`` images of each text on ``grid``; ``num_shown`` of them, of distinct prompts, are kept."""

    model: FlowModel
    rewards: Rewards
    texts: Sequence[str]
    images_per_prompt: int
    grid: Sequence[float]
    batch_sizes: BatchSizes
    seed: int
    num_shown: int = 32
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise ValueError(f"evaluate.images_per_prompt must be at least 1, got {self.images_per_prompt}")

    @torch.no_grad()
    def __call__(self) -> EvaluationResult:
        num_images = len(self.texts) * self.images_per_prompt
        spread = Spread.evenly(num_images, self.world.size)
        own = spread.rows[self.world.rank]
        shown: dict[str, Tensor] = {}
        rewards_BR = self.world.gather(
            lambda: self._rewards(own, spread.most, shown)[: len(own)], spread, len(self.rewards.all), "evaluation"
        )
        rewards = self.rewards.of_groups(rewards_BR, self.images_per_prompt)
        scores = {name: scores_PG.cpu() for name, scores_PG in rewards.named.items()}
        images = self.world.to_first(shown, "images to show")
        images_BCHW = torch.stack([images[name] for name in sorted(images, key=int)]) if images else torch.empty(0)
        verdict = next((s_PG == 1 for s_PG in scores.values() if bool(((s_PG == 0) | (s_PG == 1)).all())), None)
        return EvaluationResult(
            scores=scores,
            means={name: scores_PG.mean().item() for name, scores_PG in scores.items()},
            num_images=num_images,
            texts=list(self.texts[: len(images_BCHW)]),
            images_BCHW=images_BCHW,
            verified=verdict[: len(images_BCHW), 0].tolist() if verdict is not None else None,
        )

    def _rewards(self, own: tuple[int, ...], most: int, shown: dict[str, Tensor]) -> Tensor:
        """Rewards [b, R] of this rank's images, of which the first of some prompts are put into ``shown``."""
        sampler = Sampler(model=self.model, grid=self.grid, batch_sizes=self.batch_sizes)
        # ranks keep step, so one with fewer images makes one more, which is thrown away
        rows = (*own, *(own or (0,)) * (most - len(own)))
        awaited = self.rewards.begin(self._samples(rows, len(rows)).texts)
        # without what is lossy: an evaluation judges the policy alone
        with self.model.gathered(), self.model.sampling():
            for samples in self._portions(rows):
                draw = NoiseDraw(
                    self.seed,
                    samples.prompts.ids,
                    self.images_per_prompt,
                    self.model.latent_shape,
                    self.model.device,
                    rows=samples.rows,
                )
                conditions = self.model.encode(samples.texts)
                images_BCHW = sampler(samples, conditions, draw.starts(EVALUATION_STREAM), awaited.add)
                for row, image_CHW in zip(samples.rows, images_BCHW, strict=True):
                    prompt, place = divmod(row, self.images_per_prompt)
                    if place == 0 and prompt < self.num_shown and row in own:
                        shown[str(prompt)] = image_CHW.cpu()
        return awaited.collect()

    def _portions(self, rows: tuple[int, ...]) -> Iterator[Samples]:
        """A few at a time: a full-size evaluation does not fit a GPU's memory as images."""
        first = 0
        while first < len(rows):
            size = even(len(rows), self.batch_sizes.sampling.value)
            # the last ones are filled up: a shape of their own would be compiled on its own
            yield self._samples(rows[first : first + size], most=size)
            first += size

    def _samples(self, rows: tuple[int, ...], most: int) -> Samples:
        return Samples(Prompts(list(self.texts), list(range(len(self.texts)))), self.images_per_prompt, rows, most)
