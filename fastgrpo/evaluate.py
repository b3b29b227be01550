"""Evaluation: held-out prompts, plain N(0, I) noise, ODE steps, EMA weights.  Never the search: it is for learning.

The same prompts and noise each time, so that two evaluations of a run differ by the weights alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.algorithm.dynamics import ODE
from fastgrpo.algorithm.noise import EVALUATION_STREAM, NoiseDraw
from fastgrpo.batches import BatchSizes
from fastgrpo.models.adapter import FlowModel
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.rollout import Rollout
from fastgrpo.types import Prompts


@dataclass(frozen=True)
class EvaluationResult:
    """Each named reward: of all images, [P, G] in ``scores``, and its mean; one image of each of the first few prompts.

    ``verified`` says of each of those whether it is right, where a reward is a verdict: 0 or 1 for every image.
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

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise ValueError(f"evaluate.images_per_prompt must be at least 1, got {self.images_per_prompt}")

    @torch.no_grad()
    def __call__(self) -> EvaluationResult:
        rollout = Rollout(
            model=self.model, grid=self.grid, dynamics=ODE(), batch_sizes=self.batch_sizes, seed=self.seed
        )
        awaited = self.rewards.begin(list(self.texts), self.images_per_prompt)
        shown: list[Tensor] = []
        # a few prompts at a time: a full-size evaluation does not fit a GPU's memory as images
        prompts_at_once = max(1, self.batch_sizes.sampling.value // self.images_per_prompt)
        # without what is lossy: an evaluation judges the policy alone
        with self.model.sampling():
            for first in range(0, len(self.texts), prompts_at_once):
                texts = list(self.texts[first : first + prompts_at_once])
                ids = list(range(first, first + len(texts)))
                draw = NoiseDraw(self.seed, ids, self.images_per_prompt, self.model.latent_shape, self.model.device)
                start_BCHW = draw(EVALUATION_STREAM, self.images_per_prompt).flatten(0, 1)
                images_BCHW = rollout(
                    Prompts(texts, ids), self.model.encode(texts), start_BCHW, (), awaited.add
                ).images_BCHW
                shown.append(images_BCHW[:: self.images_per_prompt][: max(0, self.num_shown - first)].cpu())
        scores = {name: scores_PG.cpu() for name, scores_PG in awaited.collect().named.items()}
        verdict = next((s_PG == 1 for s_PG in scores.values() if bool(((s_PG == 0) | (s_PG == 1)).all())), None)
        images_BCHW = torch.cat(shown)
        return EvaluationResult(
            scores=scores,
            means={name: scores_PG.mean().item() for name, scores_PG in scores.items()},
            num_images=len(self.texts) * self.images_per_prompt,
            texts=list(self.texts[: len(images_BCHW)]),
            images_BCHW=images_BCHW,
            verified=verdict[: len(images_BCHW), 0].tolist() if verdict is not None else None,
        )
