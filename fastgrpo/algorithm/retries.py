"""A search by whole images: groups are made again from new noises, and each sample keeps one of its images.

Nothing is estimated: what is searched is what is trained on.  A group without any success has nothing to compare, so
all that its images cost has taught nothing; made again, it may have one.  Which image a sample keeps is decided within
the sample, so that ranks need not send each other latents, and nothing depends on how many there are.
Letters: P prompts, S of them that are made again, G samples of a prompt, K candidates, B samples of this rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, arange

from fastgrpo.algorithm.noise import SEARCH_STREAM, START_STREAM, Candidates, NoiseDraw, Score, plain_noise
from fastgrpo.algorithm.search import MAX_ROUNDS, scores_of
from fastgrpo.on_device import on_device
from fastgrpo.types import Noise


@dataclass(frozen=True, kw_only=True)
class Retries:
    """Plain noise first; some groups are then made again, up to ``tries`` times.

    where       ``no_success``: the groups whose rewards are all the same and at most ``success``; ``below``: those
                whose rewards are all at most ``success``, the same or not; ``everywhere``: all groups
    keep        ``best``: each sample its best image; ``contrast``: the first half of a group the best, the other half
                the worst.  Of equal ones the first is kept
    candidates  noises that each sample of a group which is made again chooses from, by the reward of an estimate of
                their images in ``estimate_steps`` steps; 1 is plain noise

    ``success`` is a value of the total reward.  Rewards that are a verdict, 0 or 1, are the same where nothing
    succeeded; learned ones never are, and cost nothing by ``no_success``.
    """

    tries: int = 3
    where: Literal["no_success", "below", "everywhere"] = "no_success"
    success: float = 0.0
    keep: Literal["best", "contrast"] = "best"
    candidates: int = 1
    estimate_steps: int = 4

    def __post_init__(self) -> None:
        for field in ("tries", "candidates", "estimate_steps"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"algorithm.noise.{field} must be at least 1, got {getattr(self, field)}; use "
                    "algorithm/noise=gaussian for no search"
                )
        if self.tries > MAX_ROUNDS:
            raise ValueError(f"algorithm.noise.tries must be at most {MAX_ROUNDS}, got {self.tries}; 1 to 7 are usual")
        if not math.isfinite(self.success):
            raise ValueError(f"algorithm.noise.success must be finite, got {self.success}; 0 suits rewards of 0 or 1")
        for field, choices in (("where", ("no_success", "below", "everywhere")), ("keep", ("best", "contrast"))):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"algorithm.noise.{field} must be one of {', '.join(choices)}, got {getattr(self, field)!r}"
                )

    def __call__(self, draw: NoiseDraw, score: Score) -> Noise:
        return Noise(plain_noise(draw), metrics={}, num_scored=0)

    def groups(self, total_PG: Tensor) -> list[int]:
        """The places of the prompts whose groups, of these rewards, are to be made again; the host waits for them."""
        if self.where == "everywhere":
            return list(range(len(total_PG)))
        is_below_P = total_PG.max(dim=1).values <= self.success
        if self.where == "no_success":
            is_below_P &= (total_PG == total_PG[:, :1]).all(dim=1)
        return [place for place, is_below in enumerate(is_below_P.tolist()) if is_below]

    def row(self, row: int, group_size: int, attempt: int) -> int:
        """Of a sample in groups of ``group_size``, the number of one of its attempts among those of all attempts."""
        prompt, place = divmod(row, group_size)
        return (prompt * (self.tries + 1) + attempt) * group_size + place

    def again(self, draw: NoiseDraw, score: Score, groups: Sequence[int], attempt: int) -> Noise:
        """Start noises of ``draw.rows``, which are of the given groups, for attempt 1 and those that follow.

        The draw is that of groups of (tries + 1) * G samples, of which attempt a makes those from a * G on.
        """
        if self.candidates == 1:
            return Noise(draw.starts(START_STREAM), metrics={}, num_scored=0)
        group_size = draw.group_size // (self.tries + 1)
        candidates = Candidates(draw, SEARCH_STREAM + attempt - 1, group_size * self.candidates, groups)
        scores_SGK = scores_of(score, candidates, self.estimate_steps).unflatten(1, (group_size, self.candidates))
        best_SG = scores_SGK.argmax(dim=2)
        best_SG = best_SG + self.candidates * arange(group_size, device=best_SG.device)
        place = {prompt: s for s, prompt in enumerate(groups)}
        prompts_B = on_device([place[row // draw.group_size] for row in draw.own_rows], draw.device)
        picked_B = best_SG[prompts_B, draw.places_B % group_size]
        return Noise(candidates.at(prompts_B, picked_B), metrics={}, num_scored=scores_SGK.numel())

    def prefers(self, new_SG: Tensor, old_SG: Tensor) -> Tensor:
        """Where a sample keeps the new image in place of the old one, bool [S, G], by their rewards."""
        if self.keep == "best":
            return new_SG > old_SG
        is_best_G = arange(new_SG.shape[1], device=new_SG.device) < (new_SG.shape[1] + 1) // 2
        return (is_best_G & (new_SG > old_SG)) | (~is_best_G & (new_SG < old_SG))
