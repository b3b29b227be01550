"""Our whole iteration beside Flow-GRPO's own functions, on the same model, recipe and number of images.

    python -m benchmarks.flow_grpo --checkout PATH             in miniature, on the CPU
    python -m benchmarks.flow_grpo --checkout PATH --full      SD3.5-medium at 512x512, on a GPU
    python -m benchmarks.flow_grpo --checkout PATH --theirs float32 --ours "" --ours "compile=blocks"

Both have the same chances: --theirs is a type, float32, float16 or bfloat16, by accelerate's mixed precision, with
``compiled`` after it for torch.compile of its transformer blocks; --ours is overrides of the config. Each of ours is
set beside the side of theirs that computes as it does. Each side is checked as it will be timed
(benchmarks/flow_grpo/agreement.py), and one that does not do the same work is not timed; --checks none leaves that to
another run, of --checks only.

PATH is a checkout of github.com/yifan123/flow_grpo; with several, each recipe takes the first that can run it. The
fast recipe came in August 2025; until then the unconditional branch was detached, as it is here: give one checkout
from before and one from after. Weights are random unless --pipeline names a StableDiffusion3Pipeline directory.
Without a checkout ours is compared with itself, every optimization off. What is theirs and what is the driver's:
benchmarks/flow_grpo/theirs.py.
"""

import argparse
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.flow_grpo.agreement import Agreement, agreement
from benchmarks.flow_grpo.checkout import Checkout, choose
from benchmarks.flow_grpo.measure import Entry, checked, timed
from benchmarks.flow_grpo.ours import FastGRPO
from benchmarks.flow_grpo.pipeline import FULL, FULL_SHORT_TEXT, MINIATURE, make_pipeline
from benchmarks.flow_grpo.plain import PlainFastGRPO
from benchmarks.flow_grpo.recipe import MICRO_BATCH, OPTIMIZER_STEPS, RECIPES, Job, our_config, our_setting
from benchmarks.flow_grpo.results import PLAIN, THEIRS, Result, goals, summary
from benchmarks.flow_grpo.setting import Setting
from benchmarks.flow_grpo.theirs import FlowGRPO
from benchmarks.report import write_report
from fastgrpo.shapes.captions import training_captions

# theirs as its configs have it first: the baseline
_THEIRS = {"cpu": ("float32", "bfloat16", "bfloat16 compiled"), "cuda": ("float16", "float16 compiled")}
_LEGEND = """\
Median [quartiles] over rounds, every other of which goes through the sides backwards.  `x`: times faster than another
side in the same round: than the baseline, which is the first line, or than the side of flow_grpo that is alike, in
the same type and compiled or not, as this one.  On a GPU that is by the clock.  On a CPU it is in CPU time, of all
threads of a side's process: the machine may be shared with other work, which lengthens what the clock says, given
beside it, and CPU time by far less.  rollout: text encoders, noise search, sampling, rewards and advantages;
update: the rest.  MB: the most memory of a side's process, on a GPU the most that was allocated.  `ratio deviation`:
max |ratio - 1| before the first optimizer step, within the side.  `checked`: on the same samples, how far the side's
ratio and gradients are from those of the other's code in float32, ours for a side of theirs and theirs for one of
ours.  The reward is the size of the image's JPEG file on both sides, computed in threads: a few milliseconds."""


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
    if arguments.checks == "only":
        return
    if not results:
        raise SystemExit("no recipe could run on the given checkouts")
    body = "\n\n".join(["\n".join(f"- {line}" for line in goals(results)), _LEGEND, _setting(job), summary(results)])
    data = {"rounds": arguments.rounds, "batches": job.batches, "results": [one.to_dict() for one in results]}
    title = "Flow-GRPO's own functions and ours, " + ("SD3.5-medium" if arguments.full else "in miniature")
    print(write_report("flow_grpo", title=title, body=body, data=data).read_text())
    if refused := [f"{one.recipe}: {side}" for one in results for side in one.refused]:
        raise SystemExit(f"not timed, see above: {'; '.join(refused)}")


def _parse(arguments_of_shell: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, action="append", default=[], help="of flow_grpo; may be repeated")
    parser.add_argument("--full", action="store_true", help="SD3.5-medium's sizes")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--theirs", action="append", help="a type, and compiled after it; repeat for several")
    parser.add_argument("--ours", action="append", default=[], help="config overrides; repeat for several variants")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="iterations of each side that are not counted")
    parser.add_argument("--batches", type=int, help="micro-batches an iteration: 4 at full size, else 2")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for each side; 0 is PyTorch's choice")
    parser.add_argument(
        "--pipeline",
        type=Path,
        help="a StableDiffusion3Pipeline directory; one that does not exist is made, with random weights, and kept",
    )
    parser.add_argument("--short-text", action="store_true", help="with --full: random text encoders of one layer")
    parser.add_argument("--checks", choices=("first", "none", "only"), default="first")
    parsed = parser.parse_args(arguments_of_shell)
    parsed.batches = parsed.batches or (4 if parsed.full else 2)
    if parsed.rounds < 2 or parsed.batches % OPTIMIZER_STEPS:
        parser.error(f"there must be at least 2 rounds, and batches in multiples of {OPTIMIZER_STEPS}")
    return parsed


def _job(arguments: argparse.Namespace, scratch: Path) -> Job:
    full = FULL_SHORT_TEXT if arguments.short_text else FULL
    size = full if arguments.full else MINIATURE
    device = "cuda" if arguments.full else "cpu"
    # an iteration never meets a prompt of an earlier one, so that cached conditions save no more than in training
    prompts = scratch / "prompts.txt"
    prompts.write_text("".join(f"{caption}\n" for caption in training_captions()))
    pipeline = arguments.pipeline or scratch / "pipeline"
    if not pipeline.exists():
        pipeline = make_pipeline(pipeline, size, device)
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
    peer = recipe.peer or recipe.name
    checkout = choose(checkouts, RECIPES[peer])
    if checkouts and checkout is None:
        print(f"{recipe.name} is not measured: no given checkout has flow_grpo's fast recipe; use one from August 2025")
        return None
    entries = _theirs(job, checkout, arguments, scratch) | _ours(job, checkout, arguments, scratch)
    baseline = next(iter(entries))
    agreements, refused = ({}, {}) if arguments.checks == "none" else checked(entries)
    if arguments.checks == "only":
        _say_what_was_checked(recipe.name, agreements, refused)
        return None
    entries = {side: entry for side, entry in entries.items() if side not in refused}
    if baseline in refused or len(entries) < 2:
        raise SystemExit(f"{recipe.name} cannot be measured: " + "; ".join(f"{s}, {why}" for s, why in refused.items()))
    return Result(
        recipe=recipe.name,
        baseline=baseline,
        peer=f"flow_grpo {checkout.commit()[:9]}, recipe {peer}" if checkout else "ours with every optimization off",
        settings={side: entry.setting for side, entry in entries.items()},
        rounds=timed(entries, arguments.warm_up, arguments.rounds),
        device=job.device,
        agreements=agreements,
        refused=refused,
    )


def _say_what_was_checked(recipe: str, agreements: Mapping[str, Agreement], refused: Mapping[str, str]) -> None:
    """SystemExit where a side does not do the same work."""
    for side, found in agreements.items():
        off = f"ratio off by {found.ratio_deviation:.1e}, gradients by {found.gradient_difference:.1e}"
        print(f"{recipe}: {side}: the same work: {off}; allowed: {found.tolerance}", flush=True)
    if refused:
        raise SystemExit("; ".join(f"{recipe}: {side}, {why}" for side, why in refused.items()))


def _theirs(job: Job, checkout: Checkout | None, arguments: argparse.Namespace, scratch: Path) -> dict[str, Entry]:
    """Sides of flow_grpo; without a checkout ours, plain."""
    if checkout is None:
        return {PLAIN: Entry(make=partial(PlainFastGRPO, job, scratch / "plain"), setting=Setting())}
    peer = replace(job, recipe=RECIPES[job.recipe].peer or job.recipe)
    entries = {}
    for index, text in enumerate(arguments.theirs or _THEIRS[job.device]):
        setting, check = Setting.parse(text), scratch / f"check_theirs_{index}"
        entries[f"{THEIRS} {setting}"] = Entry(
            make=partial(FlowGRPO, checkout, peer, setting),
            setting=setting,
            check=partial(agreement, checkout, peer, check, ("model.dtype=float32",), setting),
        )
    return entries


def _ours(job: Job, checkout: Checkout | None, arguments: argparse.Namespace, scratch: Path) -> dict[str, Entry]:
    entries = {}
    for index, text in enumerate(arguments.ours or [""]):
        overrides = shlex.split(text)
        check = scratch / f"check_ours_{index}"
        entries[f"ours {text}".strip()] = Entry(
            make=partial(FastGRPO, job, scratch / f"ours_{index}", overrides),
            setting=our_setting(our_config(job, overrides)),
            check=partial(agreement, checkout, job, check, overrides, Setting()) if checkout else None,
        )
    return entries


def _setting(job: Job) -> str:
    return (
        f"{job.num_images} images an iteration: {job.batches} prompts x {MICRO_BATCH}, micro-batches of {MICRO_BATCH}, "
        f"{OPTIMIZER_STEPS} optimizer steps, {job.size.resolution}x{job.size.resolution}.  Theirs decodes in float32 "
        "in every setting, as its script does, ours in bfloat16 where no override says otherwise.  CPU threads: "
        f"{job.threads or 'all'}."
    )


if __name__ == "__main__":
    main()
