"""One run, in a process of its own: ``python -m benchmarks.time_to_reward.run``, which the whole measurement calls.

Seconds are of training alone: of the processor (``time.process_time``, one torch thread) where there is no GPU, else of
the clock.  The first iteration counts like any other.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.flow_grpo.side import now
from benchmarks.time_to_reward.curve import Curve, Point
from benchmarks.time_to_reward.learner import NUM_IMAGES, Learner, Run, device, halves
from benchmarks.time_to_reward.sides import SIDES
from fastgrpo.files.whole import write_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--every", type=float, required=True, help="seconds of training between evaluations")
    parser.add_argument("--checkout", type=Path)
    parser.add_argument("--nft-checkout", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(
            seed=arguments.seed,
            learning_rate=arguments.learning_rate,
            scratch=Path(scratch),
            flow_grpo=arguments.checkout,
            nft=arguments.nft_checkout,
        )
        side = SIDES[arguments.side]
        points = trained(side(run), arguments.seconds, arguments.every)
    curve = Curve(
        side=arguments.side,
        settings=repr(side),
        learning_rate=run.learning_rate,
        seed=run.seed,
        points=tuple(points),
    )
    write_whole(arguments.out, (json.dumps(curve.to_dict(), indent=1) + "\n").encode())


def trained(learner: Learner, seconds: float, every: float) -> list[Point]:
    """Train for so long and evaluate: at the start, then every so many seconds of training, and at the end."""
    spent, images, rewards = 0.0, 0, [math.nan]
    points = [_evaluated(learner, spent, images, rewards)]
    rewards = []
    while spent < seconds:
        start = _seconds()
        rewards.append(learner.step())
        spent += _seconds() - start
        images += NUM_IMAGES
        if spent >= points[-1].seconds + every or spent >= seconds:
            points.append(_evaluated(learner, spent, images, rewards))
            rewards = []
    return points


def _evaluated(learner: Learner, seconds: float, images: int, rewards: list[float]) -> Point:
    result = learner.evaluate()
    strict_P = result.scores["shapes_strict"].mean(dim=1)
    tuning, reported = halves(len(strict_P))
    return Point(
        seconds=seconds,
        images=images,
        tuning=strict_P[tuning].mean().item(),
        reported=strict_P[reported].mean().item(),
        graded=result.means["shapes"],
        reward=statistics.fmean(rewards),
    )


def _seconds() -> float:
    return now() if device() == "cuda" else time.process_time()


if __name__ == "__main__":
    main()
