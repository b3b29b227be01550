"""An algorithm is six choices; Flow-GRPO, Smart-GRPO, MixGRPO and DanceGRPO are recipes of them: configs/algorithm."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from fastgrpo.algorithm.advantage import GroupAdvantage
from fastgrpo.algorithm.dynamics import Dynamics
from fastgrpo.algorithm.noise import NoiseProposal
from fastgrpo.algorithm.objective import ClippedSurrogate
from fastgrpo.algorithm.schedule import FluxSchedule, LinearSchedule, SD3Schedule


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
