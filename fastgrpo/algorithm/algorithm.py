"""An algorithm is six choices; Flow-GRPO, Smart-GRPO, MixGRPO and DanceGRPO are recipes of them: configs/algorithm."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from fastgrpo.algorithm.advantage import GroupAdvantage
from fastgrpo.algorithm.dynamics import ODE, Dynamics
from fastgrpo.algorithm.noise import DECISION_STREAM, STEP_STREAM, NoiseProposal, SharedNoise
from fastgrpo.algorithm.objective.images import ImageObjective, check_contract
from fastgrpo.algorithm.objective.steps import StepObjective
from fastgrpo.algorithm.retries import Retries
from fastgrpo.algorithm.schedule import GivenTimes, LinearSchedule, OfResolution, SD3Schedule
from fastgrpo.algorithm.search import BestOfK, EliteSearch, RandomSearch
from fastgrpo.algorithm.step_search import StepSearch
from fastgrpo.algorithm.timesteps import DrawnTimes, Timesteps

# each step has a stream of noise of its own, between those of the searches and the next
MAX_STEPS = DECISION_STREAM - STEP_STREAM
# a window that is drawn has been everywhere by then
_CHECKED_ITERATIONS = 1000
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """schedule: the grid of t.  noise: what start noise the policy learns from.  dynamics: the stochastic step, or ODE.
    timesteps: the stochastic, trained steps, or the times at which images are noised again.  advantage, objective:
    rewards -> loss; the objective's ``signal`` is what it learns from, ``steps`` or ``images``."""

    schedule: GivenTimes | LinearSchedule | OfResolution | SD3Schedule
    noise: NoiseProposal
    dynamics: Dynamics
    timesteps: Timesteps | DrawnTimes
    advantage: GroupAdvantage
    objective: StepObjective | ImageObjective

    @property
    def learns_from_images(self) -> bool:
        """Whether the objective's signal is images: the rollout is deterministic then."""
        return self.objective.signal == "images"

    @property
    def steps(self) -> Timesteps:
        """``timesteps`` of an objective that learns from steps."""
        assert not isinstance(self.timesteps, DrawnTimes), "images are noised again at drawn times, not in steps"
        return self.timesteps

    @property
    def times(self) -> DrawnTimes:
        """``timesteps`` of an objective that learns from images."""
        assert isinstance(self.timesteps, DrawnTimes), "steps are those of the schedule, not drawn"
        return self.timesteps

    @property
    def step_objective(self) -> StepObjective:
        assert self.objective.signal == "steps"
        return self.objective

    @property
    def image_objective(self) -> ImageObjective:
        assert self.objective.signal == "images"
        return self.objective

    @property
    def grid(self) -> tuple[float, ...]:
        """The times t_0 = 1 ... t_N = 0 of a rollout."""
        return self.schedule()

    @property
    def images_at_once(self) -> int:
        """That are held of a sample at most: the one kept so far, and the newest."""
        return 2 if isinstance(self.noise, Retries) else 1

    @property
    def usual_updates(self) -> int:
        """Passes over a rollout: of new draws each, images bear several; a second of the same steps is off-policy."""
        return 6 if self.learns_from_images else 1

    def kept(self, num_updates: int, *, two_branches: bool) -> tuple[int, int]:
        """Latents, in float32, and velocities, in the model's type, that an iteration keeps of a sample for updates.

        two_branches: whether guidance has a branch without text.
        """
        if self.learns_from_images:
            # x_0, and the old policy's velocity at each draw
            return 1, num_updates * self.times.per_image
        # x, x_next and perhaps the mean of each trained step, and its unconditional branch
        num_steps = len(self.steps(len(self.grid) - 1, 0, 0))
        latents = (2 + self.step_objective.needs_distance) * num_steps
        # the noise that was found for one, and its search's mean and std
        return latents + 3 * isinstance(self.noise, StepSearch), two_branches * num_steps

    def evaluation_grid(self, num_steps: int) -> tuple[float, ...]:
        """The same schedule in another number of steps."""
        return self.schedule.evaluated(num_steps)

    def estimate_grid(self, num_steps: int, start: float = 1.0) -> tuple[float, ...]:
        """As many real steps with the same shift: SD3's own grid in few steps would spend one of them on .009 -> 0.

        Before the shift they are even from ``start`` to 0.
        """
        if start == 1.0:
            return LinearSchedule(num_steps, self.schedule.shift)()
        shift = self.schedule.shift
        u = start / (shift - (shift - 1.0) * start)
        evenly = (u * (1.0 - i / num_steps) for i in range(1, num_steps + 1))
        return (start, *(shift * u_i / (1.0 + (shift - 1.0) * u_i) for u_i in evenly))

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
        self._check_signal()
        if self.learns_from_images:
            return
        chosen = [self._checked_steps(iteration, seed) for iteration in range(min(iterations, _CHECKED_ITERATIONS))]
        self._check_step_search(min(map(len, chosen)), max(map(len, chosen)))
        for step in sorted({step for steps in chosen for step in steps}):
            self._check_dynamics(step)

    def _check_signal(self) -> None:
        name, draws = type(self.objective).__name__, isinstance(self.timesteps, DrawnTimes)
        if (signal := getattr(self.objective, "signal", None)) not in ("steps", "images"):
            raise ValueError(f"algorithm.objective {name} must have signal 'steps' or 'images', got {signal!r}")
        if self.learns_from_images and not isinstance(self.dynamics, ODE):
            raise ValueError(
                f"algorithm.dynamics is {type(self.dynamics).__name__}, but algorithm.objective {name} learns from "
                "images alone and needs no noise on the way to them; use algorithm/dynamics=ode"
            )
        if self.learns_from_images:
            check_contract(self.image_objective)
        if self.learns_from_images and not draws:
            raise ValueError(
                f"algorithm.timesteps is {type(self.timesteps).__name__}, but algorithm.objective {name} learns from "
                "images, noised again at drawn times, and no step would be trained; use algorithm/timesteps=drawn"
            )
        if self.learns_from_images and isinstance(self.noise, StepSearch):
            raise ValueError(
                f"algorithm.noise.target=step searches the noise of a stochastic step, but algorithm.objective {name} "
                "learns from images, whose rollout has none; use algorithm/noise=gaussian"
            )
        if self.learns_from_images and self._shares_starts:
            raise ValueError(
                f"algorithm.noise gives all samples of a group one start noise, but algorithm.objective {name} learns "
                "from images, which are then all the same and none better than another; use algorithm/noise=gaussian"
            )
        if draws and not self.learns_from_images:
            raise ValueError(
                f"algorithm.timesteps draws times for images, but algorithm.objective {name} learns from stochastic "
                "steps of the rollout; use algorithm/timesteps=all_but_last, or algorithm/objective=nft"
            )

    @property
    def _shares_starts(self) -> bool:
        """Whether a group, or each that is searched, starts from one noise."""
        if isinstance(self.noise, BestOfK | EliteSearch | RandomSearch):
            return self.noise.start in ("mean", "shared")
        return isinstance(self.noise, SharedNoise)

    def _check_step_search(self, fewest_steps: int, most_steps: int) -> None:
        """What the search of a step's noise needs of the steps that are trained."""
        search = self.noise
        if not isinstance(search, StepSearch):
            return
        if search.correction != "none" and max(map(len, self.step_objective.chunks(most_steps))) > 1:
            raise ValueError(
                f"algorithm.noise.correction={search.correction} changes the advantage of one step, but "
                "algorithm.objective has one ratio for several; use algorithm.objective.chunk_sizes=[1]"
            )
        if search.gives_one_noise and fewest_steps == 1:
            raise ValueError(
                "algorithm.noise.take=mean gives a group that starts from one noise one noise in the only stochastic "
                "step, and its images are all the same; use take=elites, or train more steps"
            )

    def _check_search(self, group_size: int) -> None:
        if not isinstance(self.noise, BestOfK | EliteSearch | RandomSearch | Retries | StepSearch):
            return
        if isinstance(self.noise, Retries) and self.noise.candidates == 1:
            return
        if self.noise.estimate_steps > self.schedule.num_steps:
            raise ValueError(
                f"algorithm.noise.estimate_steps must be at most algorithm.schedule.num_steps = "
                f"{self.schedule.num_steps}, got {self.noise.estimate_steps}; an estimate is to cost less than an image"
            )
        _check_falling(self.estimate_grid(self.noise.estimate_steps))
        if isinstance(self.noise, EliteSearch | RandomSearch | StepSearch):
            self.noise.check_group(group_size)

    def _checked_steps(self, iteration: int, seed: int) -> tuple[int, ...]:
        num_steps = self.schedule.num_steps
        steps = self.steps(num_steps, iteration, seed)
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
