"""How much of a reward does the start noise decide, once stochastic steps have followed?  On the base model.

    python -m benchmarks.noise_influence

Z start noises a prompt, E trajectories from each under a recipe's dynamics and window; the variance of the final graded
reward within a prompt is split in two (one-way analysis of variance):

    share = variance between start noises / (that + variance between trajectories of one start noise)

Only the second part can be credited to the trained steps; only the first can be found by a search over start noise.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import table, write_report
from benchmarks.search_ablation import Judge
from fastgrpo.algorithm.dynamics import CPS, ODE, DanceSDE, Dynamics, FlowSDE
from fastgrpo.algorithm.noise import START_STREAM, rank_correlation
from fastgrpo.rollout import StepRollout
from fastgrpo.sampler import Sampler
from fastgrpo.types import Noise, Prompts, Samples

# name, dynamics, stochastic steps of 10
CASES: tuple[tuple[str, Dynamics, tuple[int, ...]], ...] = (
    ("ODE", ODE(), ()),
    ("flow_grpo: FlowSDE .7, steps 0-8", FlowSDE(0.7), tuple(range(9))),
    ("flow_grpo_fast: CPS .8, steps 0-2", CPS(0.8), (0, 1, 2)),
    ("flow_grpo_fast: CPS .8, steps 2-4", CPS(0.8), (2, 3, 4)),
    ("CPS .5, steps 0-2", CPS(0.5), (0, 1, 2)),
    ("CPS .3, steps 0-2", CPS(0.3), (0, 1, 2)),
    ("CPS .8, step 4", CPS(0.8), (4,)),
    ("FlowSDE .7, steps 2-4", FlowSDE(0.7), (2, 3, 4)),
    ("dance_grpo: DanceSDE .3, steps 0-8", DanceSDE(0.3), tuple(range(9))),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="of the held-out ones")
    parser.add_argument("--noises", type=int, default=8, help="Z")
    parser.add_argument("--trajectories", type=int, default=4, help="E")
    parser.add_argument("--estimate-steps", type=int, default=4)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    judge = Judge(arguments.overrides)
    judge.prompts = Prompts(judge.prompts.texts[: arguments.prompts], judge.prompts.ids[: arguments.prompts])
    judge.conditions = judge.conditions[: arguments.prompts]
    start_PZCHW = judge.draw(0, arguments.noises)(START_STREAM, arguments.noises)
    estimates_PZ = judge.estimate(start_PZCHW, arguments.estimate_steps)
    rows, data = [], {}
    for name, dynamics, steps in CASES:
        start_BCHW = start_PZCHW.repeat_interleave(arguments.trajectories, dim=1).flatten(0, 1)
        reward_PZE = _rewards(judge, dynamics, steps, start_BCHW).unflatten(1, (arguments.noises, -1))
        facts = {
            "reward": reward_PZE.mean().item(),
            "share": start_noise_share(reward_PZE) if steps else 1.0,
            "rank_correlation": rank_correlation(estimates_PZ, reward_PZE[:, :, 0]),
        }
        print(name, facts, flush=True)
        rows.append([name, *(f"{value:.2f}" for value in facts.values())])
        data[name] = facts
    _report(rows, data, arguments)


def start_noise_share(reward_PZE: Tensor) -> float:
    """Share of the variance within a prompt that lies between start noises; variances are pooled over prompts."""
    within = reward_PZE.var(dim=2).mean()
    between = reward_PZE.mean(dim=2).var(dim=1).mean() - within / reward_PZE.shape[2]
    return (between.clamp_min(0) / (between.clamp_min(0) + within)).item()


def _rewards(judge: Judge, dynamics: Dynamics, steps: tuple[int, ...], start_BCHW: Tensor) -> Tensor:
    sampler = Sampler(model=judge.model, grid=judge.algorithm.grid, batch_sizes=judge.batch_sizes)
    rollout = StepRollout(sampler=sampler, dynamics=dynamics, timesteps=lambda *_: steps, seed=0)
    samples = Samples.all_of(judge.prompts, len(start_BCHW) // len(judge.prompts))
    conditions = judge.conditions.repeat(samples.group_size)
    images_BCHW = rollout(samples, conditions, Noise(start_BCHW, metrics={}, num_scored=0), 0).images_BCHW
    return judge.rewards(images_BCHW, judge.prompts.texts).named["shapes"]


def _report(rows: list[list[str]], data: dict[str, Any], arguments: argparse.Namespace) -> None:
    body = (
        f"{arguments.prompts} held-out prompts, {arguments.noises} start noises each, {arguments.trajectories} "
        "trajectories from each.  Share: of the variance of the graded reward within a prompt, what lies between start "
        f"noises.  Rank correlation: of a start noise's estimate in {arguments.estimate_steps} steps with the reward "
        "of one trajectory from it.\n\n"
        + table(["dynamics and stochastic steps", "mean reward", "start noise's share", "rank correlation"], rows)
    )
    settings = {key: value for key, value in vars(arguments).items() if key != "overrides"}
    path = write_report(
        "noise_influence",
        title="What the start noise decides",
        body=body,
        data={"arguments": settings, "overrides": arguments.overrides, "cases": data},
    )
    print(path.read_text())


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
