"""Which code makes a model good soonest: ours, Flow-GRPO's own or DiffusionNFT's own, on the embedded model.

    python -m benchmarks.time_to_reward --checkout FLOW_GRPO --nft-checkout DIFFUSION_NFT
    python -m benchmarks.time_to_reward --sides nft smart_grpo --seconds 60 --seeds 0

Every side has the same prompts, reward, images an iteration, adapters and number of learning rates to choose from, and
is judged by the same evaluation.  A run that is in --out is not made again: a stopped measurement goes on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.flow_grpo.checkout import Checkout
from benchmarks.report import write_report
from benchmarks.time_to_reward.figure import draw
from benchmarks.time_to_reward.learner import GROUP, IMAGES_PER_PROMPT, NUM_STEPS, PROMPTS, Run, device
from benchmarks.time_to_reward.measure import LEARNING_RATES, Plan
from benchmarks.time_to_reward.nft_checkout import NFTCheckout
from benchmarks.time_to_reward.results import Results
from benchmarks.time_to_reward.sides import SIDES


def main(arguments_of_shell: Sequence[str] | None = None) -> None:
    arguments = _parse(arguments_of_shell)
    plan = Plan(
        sides=_sides(arguments),
        seeds=arguments.seeds,
        seconds=arguments.seconds,
        tune_seconds=arguments.tune_seconds,
        every=arguments.every,
        out=arguments.out,
        learning_rates=arguments.learning_rates,
        parallel=arguments.parallel,
        checkout=arguments.checkout,
        nft_checkout=arguments.nft_checkout,
    )
    tuned, curves = plan()
    results = Results(curves=curves, tuned=tuned)
    data = {
        "seconds_are": "CPU seconds of one thread" if device() == "cpu" else "seconds",
        "sides": {side: [curve.to_dict() for curve in runs] for side, runs in curves.items()},
        "tuning": {side: [curve.to_dict() for curve in runs] for side, runs in tuned.items()},
        "baseline": results.baseline,
    }
    body = f"{_legend(plan)}\n\n{results.summary()}"
    path = write_report("time_to_reward", title="Time to reward on the embedded model", body=body, data=data)
    axis = "CPU seconds of training, one thread" if device() == "cpu" else "seconds of training"
    draw(curves, path.with_suffix(".png"), axis=axis)
    print(path.read_text())


def _parse(arguments_of_shell: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="of flow_grpo")
    parser.add_argument("--nft-checkout", type=Path, help="of DiffusionNFT")
    parser.add_argument("--sides", nargs="+", help=f"of {', '.join(SIDES)}; by default all that can be run")
    parser.add_argument("--seconds", type=float, default=300.0, help="of training, a run")
    parser.add_argument("--tune-seconds", type=float, default=100.0, help="of training, a run that tunes")
    parser.add_argument("--every", type=float, default=20.0, help="seconds of training between evaluations")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=list(LEARNING_RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=1, help="runs side by side")
    parser.add_argument("--out", type=Path, default=Path("outputs/time_to_reward"), help="of the runs")
    return parser.parse_args(arguments_of_shell)


def _sides(arguments: argparse.Namespace) -> list[str]:
    """Those that are asked for, or all that can be run; ValueError for one that cannot."""
    # refuses what is no checkout before anything runs
    if arguments.checkout:
        Checkout(arguments.checkout)
    if arguments.nft_checkout:
        NFTCheckout(arguments.nft_checkout)
    run = Run(seed=0, learning_rate=0, scratch=Path(), flow_grpo=arguments.checkout, nft=arguments.nft_checkout)
    chosen = []
    for name in arguments.sides or SIDES:
        if name not in SIDES:
            raise ValueError(f"there is no side {name!r}; take of {', '.join(SIDES)}")
        missing = SIDES[name].missing(run)
        if missing and arguments.sides:
            raise ValueError(f"side {name} needs {missing}")
        if missing:
            print(f"{name} is left out: it needs {missing}", flush=True)
        else:
            chosen.append(name)
    return chosen


def _legend(plan: Plan) -> str:
    seconds = "CPU seconds of its process, one torch thread" if device() == "cpu" else "seconds by the clock"
    rates = ", ".join(f"{rate:g}" for rate in plan.learning_rates)
    return f"""\
{plan.seconds:g} seconds of training a run: {seconds}, evaluations left out.
Seeds {", ".join(map(str, plan.seeds))}; {plan.parallel} run(s) side by side.

An iteration is {PROMPTS} prompts x {GROUP} images on every side, in float32, without guidance; adapters of rank 32 on
the joint attention of every block, AdamW, gradients clipped to length 1.  Reward: the graded verifier of shapes.
Accuracy: the strict one, of averaged weights, {NUM_STEPS} Euler steps of SD3's grid from plain noise,
{IMAGES_PER_PROMPT} images of each held-out prompt, the same noise for all sides, every {plan.every:g} seconds of
training; in between a straight line.  Each side has the learning rate, of {rates}, that was best with
seed {plan.tune_seed} in the later half of {plan.tune_seconds:g} seconds on one half of the held-out prompts; everything
else here is of the other half.  Beside the learning rate, flow_grpo's own code has its published settings; those of
ours, which `nft_code` has too, were chosen on this model before, in tries judged by prompts of both halves.

A cell is the median over seeds and their range, `-` where that is beyond the end of the run.  `reward rise`: of the
training images, from the first evaluation to the last.  `images/s`: of training.

Sides: {"; ".join(f"`{side}` is {SIDES[side]!r}" for side in plan.sides)}."""


if __name__ == "__main__":
    main()
