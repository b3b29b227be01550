"""How long the variants of a case take, one after the other in every round, and what preprocessing takes of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.timing import Clock, Quartiles, quartiles
from benchmarks.rewards.case import Case
from fastgrpo.rewards.networks.network_reward import NetworkReward
from fastgrpo.rewards.reward import Reward

# of the baseline's largest score: a wrong picture or text is off by more
_TOLERANCES = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Timing:
    """Seconds a batch."""

    whole: Quartiles
    # None where it cannot be told from the rest
    preprocessing: Quartiles | None
    # of the baseline's largest score
    difference: float
    # memory of one batch beyond its images, on a GPU
    peak_bytes: int


@dataclass(frozen=True)
class Result:
    reward: str
    model: str
    shape: tuple[int, ...]
    baseline: str
    timings: dict[str, Timing] = field(default_factory=dict)
    # why there are no timings of a variant
    refused: dict[str, str] = field(default_factory=dict)

    def images_per_second(self, variant: str) -> Quartiles:
        seconds, batch = self.timings[variant].whole, self.shape[0]
        return Quartiles(batch / seconds.median, batch / seconds.upper, batch / seconds.lower)

    def times_faster(self, variant: str, than: str) -> float:
        return self.timings[than].whole.median / self.timings[variant].whole.median

    def preprocessing_share(self, variant: str) -> float | None:
        timing = self.timings[variant]
        return None if timing.preprocessing is None else timing.preprocessing.median / timing.whole.median


def run_case(case: Case, clock: Clock, repeats: int) -> Result:
    """Build every variant, compare its scores with the baseline's, and time those that could be built and agree."""
    rewards: dict[str, Reward] = {}
    differences: dict[str, float] = {}
    refused: dict[str, str] = {}
    expected_B: Tensor | None = None
    for name in sorted(case.variants, key=lambda name: name != case.baseline):
        try:
            reward = case.variants[name]()
            # the first call compiles
            score_B = reward(case.images_BCHW, case.prompts).float().cpu()
            expected_B = score_B if name == case.baseline else expected_B
            assert expected_B is not None, f"{case.baseline} is the baseline and has no scores"
            differences[name] = _difference(name, reward, score_B, expected_B)
            rewards[name] = reward
        except (ValueError, RuntimeError, NotImplementedError) as error:
            if name == case.baseline:
                raise
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    timings = _time(case, rewards, differences, clock, repeats)
    return Result(case.reward, case.model, tuple(case.images_BCHW.shape), case.baseline, timings, refused)


def _difference(name: str, reward: Reward, score_B: Tensor, expected_B: Tensor) -> float:
    """The largest, of the baseline's largest score; ValueError if it is too large."""
    difference = ((score_B - expected_B).abs().max() / expected_B.abs().max().clamp_min(1e-6)).item()
    tolerance = _TOLERANCES[
        reward.backend.dtype_on(score_B.device) if isinstance(reward, NetworkReward) else torch.float32
    ]
    if not difference <= tolerance:
        raise ValueError(f"{name} differs by {difference:.2%} of the largest score, more than {tolerance:.0%}")
    return difference


def _time(
    case: Case, rewards: dict[str, Reward], differences: dict[str, float], clock: Clock, repeats: int
) -> dict[str, Timing]:
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, reward in rewards.items():
        runs[name, "whole"] = partial(reward, case.images_BCHW, case.prompts)
        if isinstance(reward, NetworkReward):
            runs[name, "preprocessing"] = partial(
                reward.preprocess, case.images_BCHW, reward.backend.dtype_on(case.images_BCHW.device)
            )
    # the second call: the first compiled
    for run in runs.values():
        run()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            seconds[key].append(clock(run))
    spread = {key: quartiles(values) for key, values in seconds.items()}
    return {
        name: Timing(
            whole=spread[name, "whole"],
            preprocessing=spread.get((name, "preprocessing")),
            difference=differences[name],
            peak_bytes=_peak_bytes(runs[name, "whole"]),
        )
        for name in rewards
    }


def _peak_bytes(run: Callable[[], Any]) -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
