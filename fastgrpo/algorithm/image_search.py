"""Searches at sampling: of K start noises of an image, which is made in full, within a budget of velocities.

    best of N           all K images are made in full, and the best is taken
    best of estimates   K estimates of m steps each; the image of the best noise is made in full
    elite               rounds of estimates, each of noises from N(mean, std^2) fitted to the best of the round before
                        (the cross-entropy method, as in ``search.py``); the image of the best noise seen
    halving             K noises go some steps; the best part of them goes on from where it is, and so on to the end
                        (successive halving, arXiv:1502.07943).  An intermediate latent is judged by x_0 = x - t v, of
                        the velocity v that its next step takes anyway: to look costs no velocity, and none is lost

A search is a frozen dataclass that plans, and is called with what it may ask for, a ``Making``; it knows neither model
nor reward.  Candidate 0 of an image is its plain noise: a search of one candidate is no search.
Letters: S images being made, K candidates of each, T elites, C H W of a latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from fastgrpo.algorithm.making import Found, Making, Plan, Search, best_of, taken
from fastgrpo.algorithm.ranking import best_first
from fastgrpo.algorithm.slots import MOST_CANDIDATES, drawn
from fastgrpo_kernels import elite_weights

# noises of a round, of which at least two are fitted
_LEAST_IN_ROUND = 4


@dataclass(frozen=True)
class NoSearch:
    """Plain noise: an image is made once."""

    def plan(self, velocities: int, num_steps: int) -> Plan:
        return Plan(candidates=1, velocities=num_steps, scored=1)

    def __call__(self, making: Making) -> Found:
        return making.best(making.slots.noises(1), range(making.num_steps))


@dataclass(frozen=True)
class BestOfN:
    """As many images in full as the budget allows, the best of them: the yardstick of searches."""

    def plan(self, velocities: int, num_steps: int) -> Plan:
        num = velocities // num_steps
        return Plan(candidates=num, velocities=num * num_steps, scored=num)

    def __call__(self, making: Making) -> Found:
        num = self.plan(making.velocities, making.num_steps).candidates
        return making.best(making.slots.noises(num), range(making.num_steps))


@dataclass(frozen=True, kw_only=True)
class BestOfEstimates:
    """The image of the noise with the best estimate, of ``estimate_steps`` Euler steps each."""

    estimate_steps: int = 4

    def __post_init__(self) -> None:
        _at_least("estimate_steps", self.estimate_steps, 1)

    def plan(self, velocities: int, num_steps: int) -> Plan:
        num = _num_estimates(self.estimate_steps, velocities, num_steps)
        return _estimating(num, self.estimate_steps, num_steps)

    def __call__(self, making: Making) -> Found:
        num = self.plan(making.velocities, making.num_steps).candidates
        noise_SKCHW = making.slots.noises(num)
        if num > 1:
            noise_SKCHW = best_of(noise_SKCHW, making.estimates(noise_SKCHW, self.estimate_steps), 1)
        return making.best(noise_SKCHW, range(making.num_steps))


@dataclass(frozen=True, kw_only=True)
class Elite:
    """The image of the best noise that rounds of a cross-entropy search see: Smart-GRPO's, arXiv:2510.02654.

    What does not divide into ``rounds`` is plain noises, which are estimated first, the image's own among them.  Fewer
    rounds where the budget has not four noises for each.  ``elite_share`` of a round are fitted, with ``std_floor``.
    """

    rounds: int = 3
    elite_share: float = 0.375
    estimate_steps: int = 4
    std_floor: float = 0.05

    def __post_init__(self) -> None:
        _at_least("rounds", self.rounds, 1)
        _at_least("estimate_steps", self.estimate_steps, 1)
        if not 0 < self.elite_share <= 1:
            raise ValueError(f"search.elite_share must lie in (0, 1], got {self.elite_share}; it is a share of a round")
        if not 0 <= self.std_floor <= 1:
            raise ValueError(f"search.std_floor must lie in [0, 1], got {self.std_floor}; noise has a std of 1")

    def plan(self, velocities: int, num_steps: int) -> Plan:
        num = _num_estimates(self.estimate_steps, velocities, num_steps)
        return _estimating(num, self.estimate_steps, num_steps)

    def in_rounds(self, num: int) -> tuple[int, int, int]:
        """Of ``num`` noises: how many are plain, the rounds, and the noises of each."""
        rounds = min(self.rounds, (num - 1) // _LEAST_IN_ROUND)
        each = (num - 1) // rounds if rounds else 0
        return num - rounds * each, rounds, each

    def __call__(self, making: Making) -> Found:
        slots = making.slots
        num = self.plan(making.velocities, making.num_steps).candidates
        num_plain, rounds, each = self.in_rounds(num)
        seen_SKCHW = slots.noises(num_plain)
        if num == 1:
            return making.best(seen_SKCHW, range(making.num_steps))
        seen_SK = making.estimates(seen_SKCHW, self.estimate_steps)
        mean_SCHW = torch.zeros_like(seen_SKCHW[:, 0])
        std_SCHW = torch.ones_like(mean_SCHW)
        num_elites = max(2, round(self.elite_share * each))
        ids_SK = slots.ids(0, each)
        for number in range(1, rounds + 1):
            candidates = slots.of_round(number, (mean_SCHW, std_SCHW))
            noise_SKCHW = drawn(candidates, ids_SK)
            scores_SK = making.estimates(noise_SKCHW, self.estimate_steps)
            elites_ST = best_first(scores_SK)[:, :num_elites]
            mean_SCHW, std_SCHW = candidates.refit(
                ids_SK.gather(1, elites_ST),
                elite_weights(scores_SK.gather(1, elites_ST), "uniform"),
                momentum=0.0,
                std_floor=self.std_floor,
                project=False,
            )
            # one noise a round is kept, not all of them
            best_S1 = elites_ST[:, :1]
            seen_SKCHW = torch.cat([seen_SKCHW, taken(noise_SKCHW, best_S1)], dim=1)
            seen_SK = torch.cat([seen_SK, scores_SK.gather(1, best_S1)], dim=1)
        return making.best(best_of(seen_SKCHW, seen_SK, 1), range(making.num_steps))


@dataclass(frozen=True, kw_only=True)
class Halving:
    """``looks`` are the shares of the steps after which a share ``keep`` of the candidates goes on, at least one.

    As many candidates begin as the budget allows; what it leaves over lets more of them go on, at the last look first.
    """

    # of 102 ways the best within 20 to 64 velocities on held-out prompts of the embedded model, untrained: a comparison
    # on those flatters it
    looks: tuple[float, ...] = (0.4, 0.6, 0.8)
    keep: float = 0.65

    def __post_init__(self) -> None:
        looks = tuple(self.looks) if isinstance(self.looks, Sequence) and not isinstance(self.looks, str) else ()
        looks = (self.looks,) if isinstance(self.looks, int | float) else looks
        are_shares = all(isinstance(look, int | float) and 0 < look < 1 for look in looks)
        if not looks or not are_shares or list(looks) != sorted(set(looks)):
            raise ValueError(
                f"search.looks must rise between 0 and 1, as in [.5,.7], got {self.looks}; they are shares of steps"
            )
        if not 0 < self.keep < 1:
            raise ValueError(f"search.keep must lie between 0 and 1, got {self.keep}; search=best_of_n keeps all")
        object.__setattr__(self, "looks", looks)

    def rounds(self, velocities: int, num_steps: int) -> list[tuple[range, int]]:
        """Which steps are run by how many candidates, one round after the other."""
        ends = sorted({min(max(round(look * num_steps), 1), num_steps - 1) for look in self.looks} - {0})
        steps = [range(first, stop) for first, stop in zip([0, *ends], [*ends, num_steps], strict=True)]

        def alive(num: int) -> list[int]:
            return [max(1, round(num * self.keep**r)) for r in range(len(steps))]

        def cost(counts: Sequence[int]) -> int:
            return sum(len(part) * count for part, count in zip(steps, counts, strict=True))

        num = 1
        # no image has more candidates than have ids
        while num < MOST_CANDIDATES and cost(alive(num + 1)) <= velocities:
            num += 1
        counts = alive(num)
        for r in reversed(range(1, len(steps))):
            while counts[r] < counts[r - 1] and cost(counts) + len(steps[r]) <= velocities:
                counts[r] += 1
        return list(zip(steps, counts, strict=True))

    def plan(self, velocities: int, num_steps: int) -> Plan:
        rounds = self.rounds(velocities, num_steps)
        counts = [count for _, count in rounds]
        looked = [count for count, later in pairwise(counts) if later < count]
        return Plan(
            candidates=counts[0],
            velocities=sum(len(steps) * count for steps, count in rounds),
            scored=sum(looked) + counts[-1],
        )

    def __call__(self, making: Making) -> Found:
        rounds = self.rounds(making.velocities, making.num_steps)
        x_SKCHW = making.slots.noises(rounds[0][1])
        for (steps, count), (_, later) in pairwise(rounds):
            if later == count:
                x_SKCHW = making.run(x_SKCHW, steps)
                continue
            x_SKCHW = making.run(x_SKCHW, steps[:-1])
            x_SKCHW, scores_SK = making.look(x_SKCHW, steps[-1])
            x_SKCHW = best_of(x_SKCHW, scores_SK, later)
        return making.best(x_SKCHW, rounds[-1][0])


# of ``search=true``: what finds most on the embedded model, untrained and trained
DEFAULT_SEARCH: Search = BestOfN()


def planned(search: Search, *, budget: int, num_steps: int, cost: int = 1) -> Plan:
    """What ``search`` does within ``budget`` network evaluations, of which a velocity takes ``cost``.

    ValueError for a budget that is too small for one plain image.
    """
    if num_steps * cost > budget:
        guided = ", two a step since it is guided," if cost == 2 else ""
        raise ValueError(
            f"budget={budget} is too small: one image of {num_steps} steps{guided} takes {num_steps * cost} network "
            f"evaluations; raise it to at least {num_steps * cost}, or lower num_steps"
        )
    return search.plan(budget // cost, num_steps)


def _num_estimates(estimate_steps: int, velocities: int, num_steps: int) -> int:
    if estimate_steps > num_steps:
        raise ValueError(
            f"search.estimate_steps must be at most num_steps = {num_steps}, got {estimate_steps}; an estimate is to "
            "cost less than an image"
        )
    return max(1, (velocities - num_steps) // estimate_steps)


def _estimating(num: int, estimate_steps: int, num_steps: int) -> Plan:
    """``num`` estimates and an image; one alone need not be estimated."""
    num_estimated = num if num > 1 else 0
    return Plan(candidates=num, velocities=num_steps + num_estimated * estimate_steps, scored=num_estimated + 1)


def _at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"search.{field} must be at least {least}, got {value}; search=none does not search")
