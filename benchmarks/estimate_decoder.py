"""Does a small decoder rank start noises as the model's own does?  Its pixels, its rewards, and what it costs.

    python -m benchmarks.estimate_decoder               the base model
    python -m benchmarks.estimate_decoder --seconds 60  and after so many process seconds of training by NFT

Noises of the held-out prompts are followed in a few steps to estimates, decoded by both; ``rank`` is Spearman's
correlation, within prompts, of an estimate's reward with that of the final image, which is decoded in full.
Letters: P prompts, G noises of each, B = P * G.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.decode_drift import timed
from benchmarks.report import table, write_report
from fastgrpo.algorithm.noise import NoiseDraw, plain_noise, rank_correlation
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.files.locations import resolve_path
from fastgrpo.prompts import load_prompts
from fastgrpo.sampler import Sampler
from fastgrpo.types import Prompts, Samples

STEPS = (2, 3, 4, 6)
FINAL = "final"
BATCH = 64


class Bench:
    """Latents that each number of steps leads to, from the same noises, by the model as it is now."""

    def __init__(self, output: Path, prompts: int, group_size: int) -> None:
        words = ["reward.golden=false", "runtime.device=cpu", "runtime.threads=1", f"output={output}"]
        config = load_config("train", [*words, "runtime.micro_batch=64", "train.prompts_per_iteration=4"])
        self.trainer = build_trainer(config)
        rows = load_prompts(resolve_path(config.prompts.held_out))[:prompts]
        self.prompts = Prompts([row.text for row in rows], ids=list(range(len(rows))))
        self.group_size = group_size

    def train(self, seconds: float) -> int:
        """Iterations that it took."""
        started = time.process_time()
        while time.process_time() - started < seconds:
            self.trainer.step()
        return self.trainer.iteration

    def facts(self, latents: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """By number of steps, of estimates decoded in full, small, and in full at a quarter of the pixels."""
        model = self.trainer.model
        decoders: dict[str, Callable[[Tensor], Tensor]] = {
            "full": model.decode,
            "small": model.decode_estimate,  # type: ignore[attr-defined]
            "quarter": lambda x_BCHW: F.interpolate(model.decode(F.avg_pool2d(x_BCHW, 2)), scale_factor=2),
        }
        final_BCHW = self._decoded(latents[FINAL], model.decode)
        final_PG = self._rewards(final_BCHW)
        facts: dict[str, dict[str, float]] = {}
        for name, x_BCHW in latents.items():
            full_BCHW = self._decoded(x_BCHW, model.decode)
            facts[name] = {}
            for decoder, decode in decoders.items():
                images_BCHW = full_BCHW if decoder == "full" else self._decoded(x_BCHW, decode)
                rewards_PG = self._rewards(images_BCHW)
                facts[name] |= {
                    f"{decoder} error": 255 * (images_BCHW - full_BCHW).abs().mean().item(),
                    f"{decoder} reward": rewards_PG["shapes"].mean().item(),
                    f"{decoder} rank": rank_correlation(rewards_PG["shapes"], final_PG["shapes"]),
                    f"{decoder} strict rank": rank_correlation(rewards_PG["shapes_strict"], final_PG["shapes_strict"]),
                }
        return facts

    def milliseconds(self, x_BCHW: Tensor, rounds: int) -> dict[str, float]:
        """Of one candidate, by what is done with it, taking turns."""
        model = self.trainer.model
        texts = [text for text in self.prompts.texts for _ in range(self.group_size)][:BATCH]
        conditions, images_BCHW = model.encode(texts), model.decode(x_BCHW)
        verify = self.trainer.rewards.terms["shapes"]
        runs: dict[str, Callable[[], Any]] = {
            "one velocity": lambda: model.velocity(x_BCHW, 0.75, conditions),
            "decode in full": lambda: model.decode(x_BCHW),
            "decode small": lambda: model.decode_estimate(x_BCHW),  # type: ignore[attr-defined]
            "verifier": lambda: verify(images_BCHW, texts),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        with model.sampling(lossy=True):
            for _ in range(1 + rounds):
                for name, run in runs.items():
                    seconds[name].append(timed(run)[1])
        return {name: 1000 * statistics.median(each[1:]) / BATCH for name, each in seconds.items()}

    def latents(self) -> dict[str, Tensor]:
        """By number of steps, B of each."""
        algorithm, model = self.trainer.algorithm, self.trainer.model
        samples = Samples.all_of(self.prompts, self.group_size)
        conditions = model.encode(samples.texts)
        noise_BCHW = plain_noise(NoiseDraw(3, self.prompts.ids, self.group_size, model.latent_shape))
        grids = {str(steps): algorithm.estimate_grid(steps) for steps in STEPS} | {FINAL: algorithm.grid}
        batch_sizes = self.trainer.evaluation.batch_sizes
        return {
            name: Sampler(model=model, grid=grid, batch_sizes=batch_sizes).latents(
                noise_BCHW, conditions, range(len(grid) - 1)
            )
            for name, grid in grids.items()
        }

    def _decoded(self, x_BCHW: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([decode(part) for part in x_BCHW.split(BATCH)])

    def _rewards(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        return self.trainer.rewards(images_BCHW, self.prompts.texts).named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.0, help="of training; process seconds")
    parser.add_argument("--prompts", type=int, default=64, help="P, of the held-out ones")
    parser.add_argument("--group", type=int, default=16, help="G")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory) / "run", arguments.prompts, arguments.group)
        with torch.no_grad():
            latents = bench.latents()
            results = {"base model": bench.facts(latents)}
            milliseconds = bench.milliseconds(latents["4"][:BATCH], arguments.rounds)
        if arguments.seconds > 0:
            iterations = bench.train(arguments.seconds)
            with torch.no_grad():
                results[f"after {iterations} iterations"] = bench.facts(bench.latents())
    data = {"results": results, "milliseconds": milliseconds, **vars(arguments)}
    title = "A small decoder for a search's estimates"
    print(write_report("estimate_decoder", title=title, body=_body(data), data=data).read_text())


def _body(data: dict[str, Any]) -> str:
    parts = [
        f"The embedded model, {data['prompts']} held-out prompts x {data['group']} noises.  Errors are mean absolute "
        "ones of pixels x 255 against the full decoder.  A quarter of the pixels: the latents averaged 2 x 2, decoded "
        "in full, the image enlarged."
    ]
    for name, facts in data["results"].items():
        rows = [
            [
                steps,
                *(f"{f[f'{decoder} rank']:.3f} / {f[f'{decoder} strict rank']:.3f}" for decoder in ("full", "small")),
                f"{f['quarter rank']:.3f}",
                f"{f['full reward']:.3f} / {f['small reward']:.3f}",
                f"{f['small error']:.2f}",
            ]
            for steps, f in facts.items()
        ]
        header = ["steps", "rank, graded / strict, full", "small", "quarter", "reward, full / small", "error"]
        parts.append(table([f"{name}: {header[0]}", *header[1:]], rows))
    rows = [[name, f"{value:.2f}"] for name, value in data["milliseconds"].items()]
    parts.append(f"Process milliseconds a candidate, batches of {BATCH}, on one core, taking turns:")
    parts.append(table(["what", "ms"], rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
