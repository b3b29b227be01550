"""Our whole iteration beside Flow-GRPO's own functions, on the same model, recipe and number of images.

    python -m benchmarks.flow_grpo --checkout PATH             in miniature, on the CPU
    python -m benchmarks.flow_grpo --checkout PATH --full      SD3.5-medium at 512x512, on a GPU
    python -m benchmarks.flow_grpo --checkout PATH --ours "compile=blocks" --ours "compile=eager"

PATH is a checkout of github.com/yifan123/flow_grpo; with several, each recipe takes the first that can run it (the fast
recipe came in August 2025; until then the unconditional branch was detached, as it is here).  Weights are random unless
--pipeline names a StableDiffusion3Pipeline directory.  Without a checkout ours is compared with itself, every
optimization off.  What is theirs and what is the driver's: benchmarks/flow_grpo/theirs.py.
"""

import argparse
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.flow_grpo.agreement import Agreement, agreement
from benchmarks.flow_grpo.checkout import Checkout, choose
from benchmarks.flow_grpo.children import Work, children
from benchmarks.flow_grpo.ours import FastGRPO
from benchmarks.flow_grpo.pipeline import FULL, MINIATURE, make_pipeline
from benchmarks.flow_grpo.plain import PlainFastGRPO
from benchmarks.flow_grpo.recipe import MICRO_BATCH, OPTIMIZER_STEPS, RECIPES, Job
from benchmarks.flow_grpo.results import PLAIN, THEIRS, Result, goals, summary
from benchmarks.flow_grpo.side import Iteration
from benchmarks.flow_grpo.theirs import FlowGRPO
from benchmarks.report import write_report
from fastgrpo.shapes.captions import training_captions

_LEGEND = """\
images/s: median [quartiles] over rounds, in which the sides take turns.  rollout: text encoders, noise search,
sampling, rewards and advantages; update: the rest.  `x`: times faster than the baseline of the same round.  MB: the
most memory of a side's process, on a GPU the most that was allocated.  `ratio deviation`: max |ratio - 1| before the
first optimizer step.  The reward is the size of the image's JPEG file on both sides, computed in threads:
a few milliseconds."""


def main(arguments_of_shell: Sequence[str] | None = None) -> None:
    arguments = _parse(arguments_of_shell)
    checkouts = [Checkout(path.resolve()) for path in arguments.checkout]
    if arguments.full and not torch.cuda.is_available():
        raise SystemExit("--full needs a GPU and there is none here; without it the miniature runs on the CPU")
    if not checkouts:
        print("no --checkout of flow_grpo was given: ours is compared with itself, every optimization off")
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        job = _job(arguments, Path(scratch))
        for name in arguments.recipes:
            result = _run(replace(job, recipe=name), checkouts, arguments, Path(scratch) / name)
            if result is not None:
                results.append(result)
                print(summary(results[-1:]), flush=True)
    if not results:
        raise SystemExit("no recipe could run on the given checkouts")
    device = job.device
    body = "\n\n".join(
        ["\n".join(f"- {line}" for line in goals(results, device)), _LEGEND, _setting(job), summary(results)]
    )
    data = {"rounds": arguments.rounds, "batches": job.batches, "results": [one.to_dict() for one in results]}
    title = "Flow-GRPO's own functions and ours, " + ("SD3.5-medium" if arguments.full else "in miniature")
    print(write_report("flow_grpo", title=title, body=body, data=data).read_text())
    if any(one.agreement and not one.agreement.holds for one in results):
        raise SystemExit("the sides did not do the same work")


def _parse(arguments_of_shell: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, action="append", default=[], help="of flow_grpo; may be repeated")
    parser.add_argument("--full", action="store_true", help="SD3.5-medium's sizes")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--ours", action="append", default=[], help="config overrides; repeat for several variants")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="iterations of each side that are not counted")
    parser.add_argument("--batches", type=int, help="micro-batches an iteration: 4 at full size, else 2")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for each side; 0 is PyTorch's choice")
    parser.add_argument("--pipeline", type=Path, help="a StableDiffusion3Pipeline directory instead of random weights")
    parsed = parser.parse_args(arguments_of_shell)
    parsed.batches = parsed.batches or (4 if parsed.full else 2)
    if parsed.rounds < 2 or parsed.batches % OPTIMIZER_STEPS:
        parser.error(f"there must be at least 2 rounds, and batches in multiples of {OPTIMIZER_STEPS}")
    return parsed


def _job(arguments: argparse.Namespace, scratch: Path) -> Job:
    size = FULL if arguments.full else MINIATURE
    device = "cuda" if arguments.full else "cpu"
    # an iteration never meets a prompt of an earlier one, so that cached conditions save no more than in training
    prompts = scratch / "prompts.txt"
    prompts.write_text("".join(f"{caption}\n" for caption in training_captions()))
    pipeline = arguments.pipeline or make_pipeline(scratch / "pipeline", size, device)
    return Job(
        recipe=arguments.recipes[0],
        pipeline=str(pipeline),
        size=size,
        prompts=str(prompts),
        batches=arguments.batches,
        device=device,
        threads=arguments.threads,
    )


def _run(job: Job, checkouts: Sequence[Checkout], arguments: argparse.Namespace, scratch: Path) -> Result | None:
    recipe = RECIPES[job.recipe]
    peer = replace(job, recipe=recipe.peer or recipe.name)
    checkout = choose(checkouts, RECIPES[peer.recipe])
    if checkouts and checkout is None:
        print(f"{recipe.name} is not measured: no given checkout has flow_grpo's fast recipe; use one from August 2025")
        return None
    sides: dict[str, Work] = {}
    if checkout is None:
        baseline, against = PLAIN, "ours with every optimization off"
        sides[PLAIN] = partial(PlainFastGRPO, job, scratch / "plain")
    else:
        baseline, against = THEIRS, f"flow_grpo {checkout.commit()[:9]}, recipe {peer.recipe}"
        sides[THEIRS] = partial(FlowGRPO, checkout, peer)
    for index, text in enumerate(arguments.ours or [""]):
        side = f"ours {text}".strip()
        sides[side] = partial(FastGRPO, job, scratch / f"ours_{index}", shlex.split(text))
    checked = _agreement(checkout, peer, scratch / "agreement") if checkout else None
    with children(sides) as run:
        rounds: dict[str, list[Iteration]] = {side: [] for side in sides}
        for number in range(arguments.warm_up + arguments.rounds):
            for side in sides:
                iteration = run[side]()
                if number >= arguments.warm_up:
                    rounds[side].append(iteration)
    return Result(recipe.name, baseline, against, rounds, checked)


def _agreement(checkout: Checkout, job: Job, output: Path) -> Agreement:
    with children({"the check": partial(partial, agreement, checkout, job, output)}) as run:
        checked: Agreement = run["the check"]()
    return checked


def _setting(job: Job) -> str:
    return (
        f"{job.num_images} images an iteration: {job.batches} prompts x {MICRO_BATCH}, micro-batches of {MICRO_BATCH}, "
        f"{OPTIMIZER_STEPS} optimizer steps, {job.size.resolution}x{job.size.resolution}; "
        + ("theirs in fp16 over float32, ours in bfloat16." if job.device == "cuda" else "float32 on both sides but ")
        + ("" if job.device == "cuda" else f"for our decoding, in bfloat16; CPU threads: {job.threads or 'all'}.")
    )


if __name__ == "__main__":
    main()
