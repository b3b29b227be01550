"""Which runs a measurement consists of, and making those that are not there yet.

First every side is tuned: a short run with each learning rate of the grid, with a seed that is not reported, judged on
one half of the held-out prompts.  Then it runs with the best of them, once a seed, and is reported on the other half.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.apart import run_apart
from benchmarks.time_to_reward.curve import Curve
from benchmarks.time_to_reward.sides import SIDES

# the same for all sides
LEARNING_RATES = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A measurement: ``out`` keeps its runs, of which those that are there are not made again."""

    sides: Sequence[str]
    seeds: Sequence[int]
    seconds: float
    tune_seconds: float
    every: float
    out: Path
    learning_rates: Sequence[float] = LEARNING_RATES
    tune_seed: int = 1000
    parallel: int = 1
    checkout: Path | None = None
    nft_checkout: Path | None = None

    def __post_init__(self) -> None:
        if self.tune_seed in self.seeds:
            raise ValueError(
                f"seed {self.tune_seed} chooses learning rates and is not reported; take others in --seeds"
            )
        if not self.sides or not self.seeds or not self.learning_rates:
            raise ValueError("there must be at least one side, one seed and one learning rate; give --sides or --seeds")
        if min(self.seconds, self.tune_seconds, self.every, self.parallel) <= 0:
            raise ValueError(
                f"--seconds {self.seconds:g}, --tune-seconds {self.tune_seconds:g}, --every {self.every:g} and "
                f"--parallel {self.parallel} must be positive"
            )

    def __call__(self) -> tuple[dict[str, list[Curve]], dict[str, list[Curve]]]:
        """Of each side the runs that tuned it, and those that are reported."""
        tuned = self._made(
            Ask(side, rate, self.tune_seed, self.tune_seconds) for side in self.sides for rate in self.learning_rates
        )
        rates = {side: chosen(curves) for side, curves in tuned.items()}
        # seeds outside: a stop in the middle leaves whole comparisons
        return tuned, self._made(
            Ask(side, rates[side], seed, self.seconds) for seed in self.seeds for side in self.sides
        )

    def _made(self, asked: Iterable["Ask"]) -> dict[str, list[Curve]]:
        self.out.mkdir(parents=True, exist_ok=True)
        curves: dict[str, list[Curve]] = {side: [] for side in self.sides}
        with ThreadPoolExecutor(self.parallel) as pool:
            for curve in pool.map(self._curve, list(asked)):
                curves[curve.side].append(curve)
        return curves

    def _curve(self, ask: "Ask") -> Curve:
        path = self.out / f"{ask.name}_every{self.every:g}.json"
        if not path.exists():
            self._run(ask, path)
        curve = Curve.of_dict(json.loads(path.read_text()))
        if curve.settings != repr(SIDES[ask.side]):
            raise ValueError(f"{path} was made by {curve.settings}, and {ask.side} is now another; remove it")
        return curve

    def _run(self, ask: "Ask", path: Path) -> None:
        command = [
            *(sys.executable, "-m", "benchmarks.time_to_reward.run", "--side", ask.side, "--out", str(path)),
            *("--learning-rate", str(ask.learning_rate), "--seed", str(ask.seed)),
            *("--seconds", str(ask.seconds), "--every", str(self.every)),
        ]
        for option, checkout in (("--checkout", self.checkout), ("--nft-checkout", self.nft_checkout)):
            command += [option, str(checkout)] if checkout else []
        run_apart(ask.name, command, path)


@dataclass(frozen=True)
class Ask:
    """One run."""

    side: str
    learning_rate: float
    seed: int
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.side}_lr{self.learning_rate:g}_seed{self.seed}_{self.seconds:g}s"


def chosen(curves: Sequence[Curve]) -> float:
    """The learning rate of the best of the tuning runs; of equals the smallest."""
    return min(curves, key=lambda curve: (-curve.tuned_by, curve.learning_rate)).learning_rate
