"""Does a search find better start noise?  Final reward of found noises on the base model, at equal candidates scored.

    python -m benchmarks.search_ablation

For each held-out prompt every method scores the same number of candidates with an estimate of 1, 2 or 4 Euler steps and
hands out one noise; its image is then made in full (10 ODE steps) and judged.  No training happens.
"""

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import table, write_report
from fastgrpo.algorithm.noise import Candidates, NoiseDraw, NoiseProposal, plain_noise, rank_correlation
from fastgrpo.algorithm.search import BestOfK, EliteSearch, RandomSearch
from fastgrpo.config import load_config
from fastgrpo.files.locations import resolve_path
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.parts import build_model, read_runtime
from fastgrpo.pieces import build
from fastgrpo.prompts import load_prompts
from fastgrpo.sampler import Sampler
from fastgrpo.types import Prompts, Samples

ESTIMATE_STEPS = (1, 2, 4)


class Judge:
    """Images of start noises on the base model, and their rewards."""

    def __init__(self, overrides: list[str]) -> None:
        config = load_config("train", overrides)
        self.model = build_model(config)
        self.algorithm = build(config.algorithm)
        self.rewards = build(config.reward)
        texts = [prompt.text for prompt in load_prompts(resolve_path(config.prompts.held_out))]
        self.prompts = Prompts(texts, ids=list(range(len(texts))))
        self.conditions = self.model.encode(texts)
        self.batch_sizes = BatchSizes.of_runtime(read_runtime(config))

    def draw(self, seed: int, group_size: int) -> NoiseDraw:
        return NoiseDraw(
            seed=seed,
            prompt_ids=self.prompts.ids,
            group_size=group_size,
            latent_shape=self.model.latent_shape,
            device=self.model.device,
        )

    def images(self, noise_BCHW: Tensor, grid: tuple[float, ...]) -> Tensor:
        sampler = Sampler(model=self.model, grid=grid, batch_sizes=self.batch_sizes)
        samples = Samples.all_of(self.prompts, len(noise_BCHW) // len(self.prompts))
        return sampler(samples, self.conditions.repeat(samples.group_size), noise_BCHW)

    def score(self, candidates: Candidates, num_steps: int) -> Tensor:
        """That of the searches; of all prompts at once, as the searches compared here ask."""
        assert candidates.prompt_ids == self.prompts.ids
        return self.estimate(candidates.all(), num_steps)

    def estimate(self, noise_PKCHW: Tensor, num_steps: int) -> Tensor:
        """Rewards [P, K] of the images that a few steps lead to."""
        images_BCHW = self.images(noise_PKCHW.flatten(0, 1), self.algorithm.estimate_grid(num_steps))
        texts = [text for text in self.prompts.texts for _ in range(noise_PKCHW.shape[1])]
        return self.rewards.score(images_BCHW, texts).view(noise_PKCHW.shape[:2])

    def final(self, noise_BCHW: Tensor) -> dict[str, Tensor]:
        return self.rewards(self.images(noise_BCHW, self.algorithm.grid), self.prompts.texts).named


def methods(candidates: int, estimate_steps: int) -> dict[str, NoiseProposal]:
    """Each scores ``candidates`` noises a prompt and hands out one."""
    rounds = 4
    elite = EliteSearch(
        rounds=rounds, candidates=candidates // rounds, elites=3, estimate_steps=estimate_steps, start="mean"
    )
    return {
        "random search": RandomSearch(candidates=candidates, estimate_steps=estimate_steps, start="shared"),
        "best of K": BestOfK(candidates=candidates, estimate_steps=estimate_steps, start="shared"),
        "elite search, mean (paper)": replace(elite, project="none", std_floor=0.0),
        "elite search, mean on sphere": elite,
        "elite search, best seen": replace(elite, project="best"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    judge = Judge(arguments.overrides)
    plain = [judge.final(plain_noise(judge.draw(seed, 16))) for seed in arguments.seeds]
    results: dict[str, Any] = {"plain noise": {"final": _summary(plain)}}
    for steps in ESTIMATE_STEPS:
        noises = [plain_noise(judge.draw(seed, 16)) for seed in arguments.seeds]
        correlations = [
            rank_correlation(judge.estimate(noise.unflatten(0, (-1, 16)), steps), final["shapes"])
            for noise, final in zip(noises, plain, strict=True)
        ]
        results[f"rank correlation, {steps} steps"] = statistics.fmean(correlations)
        for name, proposal in methods(arguments.candidates, steps).items():
            finals = [judge.final(proposal(judge.draw(seed, 1), judge.score).start_BCHW) for seed in arguments.seeds]
            results[f"{name}, {steps} steps"] = _summary(finals)
            print(name, steps, results[f"{name}, {steps} steps"], flush=True)
    _report(results, arguments)


def _summary(finals: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    """Mean over prompts, one number a seed."""
    return {name: [final[name].mean().item() for final in finals] for name in finals[0]}


def _report(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    def cell(summary: dict[str, list[float]]) -> str:
        return f"{statistics.fmean(summary['shapes']):.3f} / {statistics.fmean(summary['shapes_strict']):.3f}"

    rows = [["plain noise", *[cell(results["plain noise"]["final"])] * len(ESTIMATE_STEPS)]]
    rows += [[name, *(cell(results[f"{name}, {steps} steps"]) for steps in ESTIMATE_STEPS)] for name in methods(32, 1)]
    rows.append(
        ["rank correlation", *(f"{results[f'rank correlation, {steps} steps']:.2f}" for steps in ESTIMATE_STEPS)]
    )
    body = (
        f"Graded / strict reward of the image made from the noise that each method hands out; {arguments.candidates} "
        f"candidates scored a prompt, 64 held-out prompts, seeds {arguments.seeds}.  The last line is Spearman's "
        "correlation, within a prompt, of the estimate with the final graded reward over 16 plain noises.\n\n"
        + table(["method", *(f"{steps} estimate step(s)" for steps in ESTIMATE_STEPS)], rows)
    )
    data = {"candidates": arguments.candidates, "seeds": arguments.seeds, "results": results}
    print(write_report("search_ablation", title="Noise search on the base model", body=body, data=data).read_text())


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
