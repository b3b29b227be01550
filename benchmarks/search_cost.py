"""What the search of start noises takes of an iteration, with estimates decoded in full and by the small decoder.

    python -m benchmarks.search_cost

Iterations of one run each, the two decoders taking turns; seconds are those of the process on one core, which other
processes do not lengthen.  Rewards are computed in this thread, so that they count where they are asked for.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_drift import timed
from benchmarks.report import table, write_report
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.rewards.shapes import ShapesReward
from fastgrpo.trainer import Trainer

RECIPES = {
    "smart_grpo, elite search of all prompts": ("algorithm=smart_grpo", "algorithm/noise=elite"),
    "nft, best of 8": ("algorithm=nft", "algorithm/noise=best_of_k"),
}
DECODERS = {"in full": "null", "small": "auto"}
COMMON = ("reward.golden=false", "runtime.device=cpu", "runtime.threads=1", "evaluate.images_per_prompt=1")


class Timed:
    """A run, and the process seconds of its search and of its whole iterations."""

    def __init__(self, output: Path, recipe: tuple[str, ...], prompts: int, decoder: str) -> None:
        words = [*recipe, *COMMON, f"train.prompts_per_iteration={prompts}"]
        words += [f"model.estimate_decoder={decoder}", f"output={output}"]
        self.trainer: Trainer = build_trainer(load_config("train", words))
        self.searches: list[float] = []
        self.iterations: list[float] = []
        search = self.trainer.start_noise

        def timed_search(*arguments: Any) -> Any:
            noise, seconds = timed(lambda: search(*arguments))
            self.searches.append(seconds)
            return noise

        self.trainer.start_noise = timed_search  # type: ignore[assignment]

    def step(self) -> None:
        self.iterations.append(timed(self.trainer.step)[1])

    def facts(self) -> dict[str, Any]:
        """Without the first iteration, in which memory is met."""
        searches, iterations = self.searches[1:], self.iterations[1:]
        return {
            "search": statistics.median(searches),
            "iteration": statistics.median(iterations),
            "share": statistics.median(a / b for a, b in zip(searches, iterations, strict=True)),
            "searches": searches,
            "iterations": iterations,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=5, help="of each run, after one that is not counted")
    parser.add_argument("--prompts", type=int, default=12, help="of an iteration, 16 samples each")
    arguments = parser.parse_args()
    # in a thread they would run beside the sampling of the next images
    ShapesReward.in_thread = False
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for r, (name, recipe) in enumerate(RECIPES.items()):
            runs = {
                decoder: Timed(Path(directory) / f"{r}_{decoder}", recipe, arguments.prompts, key)
                for decoder, key in DECODERS.items()
            }
            for _ in range(1 + arguments.iterations):
                for run in runs.values():
                    run.step()
            results[name] = {decoder: run.facts() for decoder, run in runs.items()}
    data = {"results": results, **vars(arguments)}
    print(write_report("search_cost", title="What a search costs", body=_body(data), data=data).read_text())


def _body(data: dict[str, Any]) -> str:
    rows = [
        [name, decoder, f"{f['search']:.2f}", f"{f['iteration']:.2f}", f"{f['share']:.0%}"]
        for name, decoders in data["results"].items()
        for decoder, f in decoders.items()
    ]
    header = ["recipe", "estimates decoded", "seconds of the search", "of the iteration", "share"]
    return (
        f"The embedded model, estimates of 4 steps, {data['prompts']} prompts x 16 samples an iteration; medians of "
        f"{data['iterations']} iterations of a run each, the decoders taking turns; process seconds on one core.\n\n"
        + table(header, rows)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
