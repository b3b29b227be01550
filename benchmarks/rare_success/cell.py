"""One run of the map, in a process of its own: ``python -m benchmarks.rare_success.cell``, which the whole map calls.

A policy is trained on the prompts of one band by the strict reward, and judged on the same prompts with plain noise:
how soon does it learn what it was asked for?  Seconds are of training alone, of the process's CPU time.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.rare_success.methods import METHODS
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.files.whole import write_whole
from fastgrpo.trainer import Trainer

NUM_IMAGES = 96
# of an evaluation, at least
NUM_JUDGED = 192
# no run comes so far, so the learning rate does not fall
_ITERATIONS = 100_000
_SEARCH = ("search/share", "search/images", "search/gain", "search/rank_correlation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="a file of them, one a line")
    parser.add_argument("--band", required=True, help="its name, for the JSON")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--every", type=float, required=True, help="seconds of training between evaluations")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        words = METHODS[arguments.method]
        trainer = make_trainer(arguments.prompts, arguments.group, arguments.seed, Path(scratch) / "run", words)
        points = trained(trainer, arguments.seconds, arguments.every)
    cell = {
        "band": arguments.band,
        "limit": arguments.seconds,
        "method": arguments.method,
        "words": words,
        "group": arguments.group,
        "seed": arguments.seed,
    }
    write_whole(arguments.out, (json.dumps(cell | {"points": points}, indent=1) + "\n").encode())


def make_trainer(prompts: Path, group: int, seed: int, output: Path, words: Sequence[str]) -> Trainer:
    """Of ``fastgrpo train``: as many images an iteration whatever the group."""
    return build_trainer(
        load_config(
            "train",
            [
                f"prompts.path={prompts}",
                f"prompts.held_out={prompts}",
                "reward.terms.shapes.strict=true",
                "~reward.watch.shapes_strict",
                f"output={output}",
                f"seed={seed}",
                "runtime.device=cpu",
                "runtime.threads=1",
                f"train.prompts_per_iteration={NUM_IMAGES // group}",
                f"train.group_size={group}",
                f"train.iterations={_ITERATIONS}",
                f"evaluate.images_per_prompt={-(-NUM_JUDGED // len(prompts.read_text().splitlines()))}",
                *words,
            ],
        )
    )


def trained(trainer: Trainer, seconds: float, every: float) -> list[dict[str, float]]:
    """Train for so long, and evaluate at the start, then every so many seconds, and at the end."""
    spent, images = 0.0, 0
    rows: list[dict[str, float]] = []
    points = [_evaluated(trainer, spent, images, rows)]
    while spent < seconds:
        start = time.process_time()
        rows.append(trainer.step())
        spent += time.process_time() - start
        images += NUM_IMAGES
        if spent >= points[-1]["seconds"] + every or spent >= seconds:
            points.append(_evaluated(trainer, spent, images, rows))
            rows = []
    return points


def _evaluated(trainer: Trainer, seconds: float, images: int, rows: list[dict[str, float]]) -> dict[str, Any]:
    """Accuracy of the averaged weights, and means of what the iterations since the last evaluation measured."""
    with trainer.ema.applied():
        accuracy = trainer.evaluation().means["shapes"]
    names = ("reward/total", "zero_variance_groups", *_SEARCH)
    means = {name: sum(row[name] for row in rows) / len(rows) for name in names if rows and name in rows[0]}
    return {"seconds": seconds, "images": images, "accuracy": accuracy, **means}


if __name__ == "__main__":
    main()
