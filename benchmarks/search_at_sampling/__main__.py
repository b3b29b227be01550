"""What network evaluations buy at sampling: accuracy of the embedded model against evaluations an image.

    python -m benchmarks.search_at_sampling --run outputs/nft

Of the base model and of a trained run: plain noise, more steps, guidance and every search of ``configs/search`` with
its default settings, on the 64 held-out prompts.  Searches maximize the graded verifier, and strict accuracy is
reported; then CLIP's cosine by the embedded scorer, judged by the verifier, and the other way round: whether a search
hacks what it is given.  What was measured is kept in --out, a file a cell, and not measured again: about 25 CPU minutes
of both policies on one core.  --images 1 takes half of that.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.report import table, write_report
from benchmarks.search_at_sampling.cells import (
    NUM_STEPS,
    SEARCHES,
    Bench,
    Cell,
    Measured,
    guided_cells,
    plain_cells,
    searched_cells,
)
from benchmarks.search_at_sampling.figure import draw

BUDGETS = (10, 20, 40, 80, 160, 320)


def main(arguments_of_shell: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value of fastgrpo evaluate, for every cell")
    parser.add_argument("--run", default="", help="a run directory; without it the base model alone")
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", choices=list(SEARCHES), default=list(SEARCHES))
    parser.add_argument("--hacking", nargs="*", choices=list(SEARCHES), default=["halving"], help="searches by CLIP")
    parser.add_argument("--guided", action="store_true", help="also halving of images with guidance 2.5")
    parser.add_argument("--images", type=int, default=2, help="of a prompt")
    parser.add_argument("--cpu-seconds", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--out", type=Path, default=Path("outputs/search_at_sampling"))
    arguments = parser.parse_args(arguments_of_shell)
    bench = Bench(
        directory=arguments.out,
        run=arguments.run,
        images_per_prompt=arguments.images,
        overrides=("runtime.threads=1", "runtime.sampling_batch=64", "runtime.decode_batch=16", *arguments.overrides),
    )
    policies = ["base", *(["trained"] if arguments.run else [])]
    cells = [cell for policy in policies for cell in plain_cells(policy)]
    if arguments.guided:
        cells += [cell for policy in policies for cell in guided_cells(policy)]
    cells += [
        cell
        for policy in policies
        for searched, methods in (("verifier", arguments.methods), ("CLIP", arguments.hacking))
        for cell in searched_cells(policy, arguments.budgets, methods, searched)
    ]
    # cheap ones first: an interruption leaves whole curves, only shorter
    cells.sort(key=lambda cell: cell.budget)
    results = measure(bench, cells, arguments.cpu_seconds)
    body = "\n\n".join(
        [sentence(results), *(accuracy_table(results, policy) for policy in policies), *hacking(results)]
    )
    data = {"cells": [{**asdict(one), "accuracy": one.mean("shapes_strict")} for one in results]}
    path = write_report("search_at_sampling", title="Search at sampling", body=body, data=data)
    draw(results, path.with_suffix(".png"))
    print(path.read_text())


def measure(bench: Bench, cells: Sequence[Cell], cpu_seconds: float) -> list[Measured]:
    """Those that are there, and as many others as fit."""
    results = []
    for cell in cells:
        known = bench.measured(cell)
        if known is None and time.process_time() > cpu_seconds:
            continue
        results.append(known or bench(cell))
        if known is None:
            one = results[-1]
            print(f"{cell.name}: {one.mean('shapes_strict'):.3f} in {one.cpu_seconds:.0f} CPU seconds", flush=True)
    return results


def sentence(results: Sequence[Measured]) -> str:
    num_prompts, num_images = len(results[0].scores["shapes"]), len(results[0].scores["shapes"][0])
    settings = "; ".join(f"{name}: {search}" for name, search in SEARCHES.items())
    return (
        f"Of {num_prompts} held-out prompts, {num_images} images of each, from the same plain noise; ± is the standard "
        f"error over prompts.  Searches and plain noise take {NUM_STEPS} steps an image.  An evaluation is a pass "
        f"of the transformer for one sample; decoding and rewards come on top, see images scored in the .json.  "
        f"{settings}."
    )


def accuracy_table(results: Sequence[Measured], policy: str) -> str:
    """Strict accuracy; a search by the verifier is judged by the very reward it was given, graded."""
    own = [one for one in results if one.cell.policy == policy and one.cell.searched == "verifier"]
    budgets = sorted({one.cell.budget for one in own})
    found = {(one.cell.method, one.cell.budget): one for one in own}
    rows = [
        [method, *(cell_text(found.get((method, budget)), "shapes_strict") for budget in budgets)]
        for method in dict.fromkeys(one.cell.method for one in own)
    ]
    header = [f"{policy}: strict accuracy within", *(f"{budget} evaluations" for budget in budgets)]
    return table(header, rows)


def hacking(results: Sequence[Measured]) -> list[str]:
    """What the other reward says of images that were searched by one."""
    methods = {one.cell.method for one in results if one.cell.searched == "CLIP"}
    rows = []
    for one in sorted(results, key=lambda one: (one.cell.policy, one.cell.searched, one.cell.method, one.cell.budget)):
        if one.cell.method in methods or one.cell.method == "plain noise":
            searched = "nothing" if one.cell.method == "plain noise" else one.cell.searched
            judged = [cell_text(one, name) for name in ("shapes", "shapes_strict", "clip_score")]
            rows.append([one.cell.policy, one.cell.method, searched, f"{one.evaluations:g}", *judged])
    if not methods:
        return []
    header = ["policy", "method", "searched by", "evaluations", "verifier, graded", "verifier, strict", "CLIP"]
    return [table(header, rows)]


def cell_text(one: Measured | None, reward: str) -> str:
    return "" if one is None else f"{one.mean(reward):.3f} ± {one.error(reward):.3f}"


if __name__ == "__main__":
    main()
