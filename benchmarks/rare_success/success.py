"""How often the base model draws each caption right: strict successes over plain noises, 10 ODE steps, no guidance.

    python -m benchmarks.rare_success.success --captions candidates --images 64 --counts COUNTS
    python -m benchmarks.rare_success.success --captions easy --images 64 --counts COUNTS
    python -m benchmarks.rare_success.success --captions doubtful --images 128 --counts COUNTS
    python -m benchmarks.rare_success.success --choose --counts COUNTS
    python -m benchmarks.rare_success.success --write --counts COUNTS

A line with captions adds to the counts in a file, and does not measure again what is there; ``--choose`` writes the
prompts chosen by them, and the last line a result.  ``candidates`` are the hard ones of the world, ``doubtful`` those
that lie above 1% so far, ``hard`` those that were chosen, ``easy`` the 300 that the model was made from and ``counted``
the 36 of them without a relation.
"""

import argparse
import time
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rare_success.chosen import HARD_BELOW
from benchmarks.rare_success.counts import Counts
from benchmarks.rare_success.written import write, write_chosen
from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.config import load_config
from fastgrpo.evaluation import Evaluation
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.parts import build_model, read_runtime
from fastgrpo.pieces import build
from fastgrpo.shapes.hard_captions import hard_candidates, hard_captions
from fastgrpo.shapes.world import all_captions
from fastgrpo.types import Prompt

NUM_STEPS = 10
# captions measured together; counts are kept after each such portion
PORTION = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", choices=["candidates", "doubtful", "hard", "easy", "counted"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--counts", type=Path, required=True)
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    counts = Counts.read(arguments.counts)
    if arguments.captions is not None:
        begun, name = time.process_time(), f"{arguments.captions}, seed {arguments.seed}"
        done = set(counts.by_measurement.get(name, ()))
        for found in measured(_texts(arguments.captions, counts), arguments.images, arguments.seed, done):
            counts = counts.with_more(found, name)
            counts.write(arguments.counts)
            print(f"{time.process_time() - begun:.0f} CPU s", found, flush=True)
    if arguments.choose:
        write_chosen(counts)
    if arguments.write:
        print(write(counts).read_text())


def measured(texts: list[str], num_images: int, seed: int, done: Set[str]) -> Iterator[dict[str, tuple[int, int]]]:
    """(successes, images) of each caption but those done, a portion of them at a time."""
    config = load_config("evaluate", ["reward=shapes"])
    model = build_model(config)
    algorithm: Algorithm = build(config.algorithm)
    evaluation: dict[str, Any] = {
        "model": model,
        "rewards": build(config.reward),
        "images_per_prompt": num_images,
        "grid": algorithm.evaluation_grid(NUM_STEPS),
        "batch_sizes": BatchSizes.of_runtime(read_runtime(config)),
    }
    for first in range(0, len(texts), PORTION):
        part = [text for text in texts[first : first + PORTION] if text not in done]
        if not part:
            continue
        # noise is of (seed, place in the portion, image): no two portions share theirs
        own_seed = seed * 1_000_003 + first
        result = Evaluation(prompts=[Prompt(text) for text in part], seed=own_seed, **evaluation)()
        successes_P = result.scores["shapes_strict"].sum(dim=1).int().tolist()
        yield {text: (number, num_images) for text, number in zip(part, successes_P, strict=True)}


def _texts(captions: str, counts: Counts) -> list[str]:
    if captions == "easy":
        # mixed, so that those measured when a measurement is stopped are like the others
        easy = all_captions()
        return [str(easy[i]) for i in np.random.default_rng(0).permutation(len(easy))]
    if captions == "counted":
        return [str(caption) for caption in all_captions() if caption.relation is None]
    if captions == "hard":
        return [str(caption) for part in hard_captions() for caption in part]
    candidates, totals = [str(caption) for caption in hard_candidates()], counts.total
    if captions == "candidates":
        return candidates
    return [text for text in candidates if text in totals and totals[text][0] >= HARD_BELOW * totals[text][1]]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
