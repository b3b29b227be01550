"""An algorithm is six choices; Flow-GRPO, Smart-GRPO, MixGRPO and DanceGRPO are recipes of them: configs/algorithm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from fastgrpo.algorithm.advantage import GroupAdvantage
from fastgrpo.algorithm.dynamics import Dynamics
from fastgrpo.algorithm.noise import DECISION_STREAM, STEP_STREAM, NoiseProposal
from fastgrpo.algorithm.objective import ClippedSurrogate
from fastgrpo.algorithm.schedule import FluxSchedule, LinearSchedule, SD3Schedule
from fastgrpo.algorithm.search import BestOfK, EliteSearch, RandomSearch

# each step has a stream of noise of its own, between those of the searches and the next
MAX_STEPS = DECISION_STREAM - STEP_STREAM
# a window that is drawn has been everywhere by then
_CHECKED_ITERATIONS = 1000
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """schedule: the grid of t.  noise: what start noise the policy learns from.  dynamics: the stochastic step.
    timesteps: (num_steps, iteration, seed) -> the stochastic, trained steps.  advantage, objective: rewards -> loss."""

    schedule: FluxSchedule | LinearSchedule | SD3Schedule
    noise: NoiseProposal
    dynamics: Dynamics
    timesteps: Callable[[int, int, int], tuple[int, ...]]
    advantage: GroupAdvantage
    objective: ClippedSurrogate

    @property
    def grid(self) -> tuple[float, ...]:
        """The times t_0 = 1 ... t_N = 0 of a rollout."""
        return self.schedule()

    def evaluation_grid(self, num_steps: int) -> tuple[float, ...]:
        """The same schedule in another number of steps."""
        return replace(self.schedule, num_steps=num_steps)()

    def estimate_grid(self, num_steps: int) -> tuple[float, ...]:
        """As many real steps with the same shift: SD3's own grid in few steps would spend one of them on .009 -> 0."""
        return LinearSchedule(num_steps, self.schedule.shift)()

    def check(self, *, evaluation_steps: int, group_size: int, iterations: int, seed: int) -> None:
        """Evaluate all that can be known before a model is there; ValueError for what could not be trained.

        That is every grid, the trained steps of the first thousand iterations, their dynamics, and whether a search
        finds noises enough for a group.
        """
        num_steps = self.schedule.num_steps
        if num_steps > MAX_STEPS:
            raise ValueError(f"algorithm.schedule.num_steps must be at most {MAX_STEPS}, got {num_steps}; 10 is usual")
        if evaluation_steps < 1:
            raise ValueError(f"evaluate.num_steps must be at least 1, got {evaluation_steps}; 40 is Flow-GRPO's")
        _check_falling(self.grid)
        _check_falling(self.evaluation_grid(evaluation_steps))
        self._check_search(group_size)
        chosen = [self._checked_steps(iteration, seed) for iteration in range(min(iterations, _CHECKED_ITERATIONS))]
        for step in sorted({step for steps in chosen for step in steps}):
            self._check_dynamics(step)

    def _check_search(self, group_size: int) -> None:
        if not isinstance(self.noise, BestOfK | EliteSearch | RandomSearch):
            return
        if self.noise.estimate_steps > self.schedule.num_steps:
            raise ValueError(
                f"algorithm.noise.estimate_steps must be at most algorithm.schedule.num_steps = "
                f"{self.schedule.num_steps}, got {self.noise.estimate_steps}; an estimate is to cost less than an image"
            )
        _check_falling(self.estimate_grid(self.noise.estimate_steps))
        if not isinstance(self.noise, BestOfK):
            self.noise.check_group(group_size)

    def _checked_steps(self, iteration: int, seed: int) -> tuple[int, ...]:
        num_steps = self.schedule.num_steps
        steps = self.timesteps(num_steps, iteration, seed)
        if not steps or list(steps) != [step for step in range(num_steps - 1) if step in steps]:
            raise ValueError(
                f"algorithm.timesteps chose the steps {steps} in iteration {iteration}; they must ascend and lie in "
                f"[0, {num_steps - 2}]: the last of algorithm.schedule.num_steps = {num_steps} is never trained"
            )
        return steps

    def _check_dynamics(self, step: int) -> None:
        where = f"on step {step}, from t = {self.grid[step]:.4g} to {self.grid[step + 1]:.4g}, which is trained"
        try:
            coefficients = self.dynamics(self.grid, step)
        except ArithmeticError as error:
            raise ValueError(
                f"algorithm.dynamics fails {where} ({type(error).__name__}); use a noise_level between .1 and 1"
            ) from error
        if coefficients.std == 0:
            raise ValueError(f"algorithm.dynamics adds no noise {where}; use algorithm/dynamics=flow_sde")
        numbers = (coefficients.c_x, coefficients.c_v, coefficients.std, coefficients.kl_weight)
        if coefficients.std < 0 or not all(abs(number) <= _LARGEST for number in numbers):
            raise ValueError(
                f"algorithm.dynamics gives c_x, c_v, std, kl_weight = {numbers} {where}; use a noise_level between .1 "
                "and 1"
            )


def _check_falling(grid: Sequence[float]) -> None:
    if (grid[0], grid[-1]) != (1.0, 0.0) or not all(t > t_next for t, t_next in pairwise(grid)):
        times = ", ".join(f"{t:.6g}" for t in grid)
        raise ValueError(f"algorithm.schedule must fall from 1 to 0 and gives {times}; use a shift between 1 and 10")
