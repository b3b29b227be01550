"""What the lossy options cost in images and rewards, and what they save: against the exact rollout of the same noise.

    python -m benchmarks.lossy             the embedded model
    python -m benchmarks.lossy --full      SD3.5-medium's architecture with random weights, on a GPU

A training rollout has a few stochastic and trained steps: options act on those before and after them.  Drift is of its
images; ``rank`` is Spearman's correlation, within prompts, of their rewards with those of the exact images, which is
what advantages are made of.  Options take turns, round after round.
Letters: P prompts, G samples of each, B = P * G.
"""

import argparse
import statistics
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode_drift import decode_drift, median_ratio, pixel_drift, timed
from benchmarks.report import table, write_report
from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.noise import NoiseDraw, plain_noise, rank_correlation
from fastgrpo.algorithm.solver import Solver
from fastgrpo.config import load_config
from fastgrpo.files.locations import resolve_path
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.old_policy import OldPolicy
from fastgrpo.parts import build_model, read_runtime
from fastgrpo.pieces import build
from fastgrpo.prompts import load_prompts
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.rollout import StepRollout
from fastgrpo.sampler import Sampler
from fastgrpo.signals import make_replay
from fastgrpo.types import Noise, Prompts, Samples, TrainedSteps, Trajectories
from fastgrpo.update import Update

EXACT = "exact"
OPTIONS = (
    EXACT,
    "lossy=fp8",
    "solver.stride=2",
    "solver=adams_bashforth",
    "solver=cached_guidance",
    "lossy=fp8 solver=adams_bashforth",
)
# recipe, guidance scale, stochastic steps of its 10 or 25
CASES: tuple[tuple[str, float, tuple[int, ...]], ...] = (
    ("flow_grpo_fast", 1.0, (1, 2, 3)),
    ("flow_grpo_fast", 2.5, (1, 2, 3)),
    ("mix_grpo", 2.5, (4, 5, 6, 7)),
)
FULL_CASES: tuple[tuple[str, float, tuple[int, ...]], ...] = (("flow_grpo_fast", 4.5, (1, 2, 3)),)
EMBEDDED = ("reward.golden=false", "runtime.device=cpu", "runtime.micro_batch=32", "runtime.threads=1")
# SD3.5's autoencoder at a quarter of its width, as much as a CPU decodes in a second
RANDOM_AUTOENCODER = (
    "model=sd35_miniature",
    "model.architecture.decoder_channels=[32,64,128,128]",
    "reward=jpeg_incompressibility",
    "runtime.threads=1",
)
FULL = (
    "model=sd35_medium",
    "model.weights=random",
    "model.condition_cache=null",
    "reward=jpeg_incompressibility",
    "reward.golden=false",
    "compile=blocks",
    "runtime.micro_batch=8",
)


class Bench:
    """Rollouts from one set of start noises, at one guidance scale."""

    def __init__(
        self, arguments: argparse.Namespace, recipe: str, guidance: float, trained_steps: tuple[int, ...]
    ) -> None:
        model = FULL if arguments.full else EMBEDDED
        self.common = [f"algorithm={recipe}", *model, f"model.guidance_scale={guidance}"]
        self.trained_steps = trained_steps
        config = load_config("train", self.common)
        self.algorithm: Algorithm = build(config.algorithm)
        self.rewards: Rewards = build(config.reward)
        # one model holds both: fp8 is entered on lossy steps alone
        self.models = {name: _moved(build_model(config, lossy)) for name, lossy in _lossy_pieces().items()}
        self.batch_sizes = BatchSizes.of_runtime(read_runtime(config))
        rows = load_prompts(resolve_path(config.prompts.held_out))[: arguments.prompts]
        texts = [row.text for row in rows]
        self.prompts = Prompts(texts, ids=list(range(len(texts))))
        self.group_size = arguments.group
        self.seed = config.seed

    def options(self) -> list[str]:
        """Those that mean something here: without guidance none of its branches can be cached."""
        is_guided = self.models["none"].guidance_scale > 1
        return [option for option in OPTIONS if is_guided or "cached_guidance" not in option]

    def roll(self, option: str, other_noise: int = 0) -> tuple[Trajectories[TrainedSteps], float]:
        """Trajectories and the seconds they took."""
        model = self._model(option)
        sampler = Sampler(
            model=model,
            grid=self.algorithm.grid,
            batch_sizes=self.batch_sizes,
            solver=_solver(" ".join(word for word in option.split() if word.startswith("solver"))),
        )
        rollout = StepRollout(
            sampler=sampler,
            dynamics=self.algorithm.dynamics,
            timesteps=lambda *_: self.trained_steps,
            seed=self.seed + other_noise,
        )
        samples = Samples.all_of(self.prompts, self.group_size)
        conditions = model.encode(samples.texts)
        draw = NoiseDraw(other_noise, self.prompts.ids, self.group_size, model.latent_shape, model.device)
        return timed(lambda: rollout(samples, conditions, Noise(plain_noise(draw), metrics={}, num_scored=0), 0))

    def ratio_deviation(self, option: str, trajectories: Trajectories[TrainedSteps]) -> float:
        model = self._model(option)
        update = Update(
            model=model,
            replay=make_replay(self.algorithm, model, OldPolicy(model.trainable), self.batch_sizes.sampling, self.seed),
            optimizer=torch.optim.SGD(list(model.trainable.values()), lr=0.0, fused=True),
            optimizer_steps=1,
            max_grad_norm=1.0,
            batch_size=self.batch_sizes.training,
            seed=self.seed,
        )
        advantages_B = torch.linspace(-1, 1, len(trajectories.start_BCHW), device=model.device)
        conditions_B = model.encode(self.prompts.texts).repeat(self.group_size)
        shares = update.shares(len(advantages_B), 0)
        deviation = update(trajectories.trained, conditions_B, advantages_B, shares).deviation
        assert deviation is not None
        return deviation

    def __call__(self, rounds: int) -> dict[str, dict[str, float]]:
        """Facts of each option, and of other noise in place of another option: how far apart any two images are."""
        firsts = {option: self.roll(option)[0] for option in self.options()}
        seconds: dict[str, list[float]] = {option: [] for option in firsts}
        for _ in range(rounds):
            for option in firsts:
                seconds[option].append(self.roll(option)[1])
        exact = firsts[EXACT].images_BCHW
        exact_PG = self.rewards(exact, self.prompts.texts).total_PG
        facts = {}
        for option, trajectories in firsts.items():
            facts[option] = self._drift(trajectories.images_BCHW, exact, exact_PG) | {
                "ratio_deviation": self.ratio_deviation(option, trajectories),
                "seconds": statistics.median(seconds[option]),
                "speed": median_ratio(seconds[EXACT], seconds[option]),
            }
        facts["other noise"] = self._drift(self.roll(EXACT, other_noise=1)[0].images_BCHW, exact, exact_PG)
        return facts

    def _model(self, option: str) -> Any:
        return self.models["fp8" if "fp8" in option else "none"]

    def _drift(self, images_BCHW: Tensor, exact_BCHW: Tensor, exact_PG: Tensor) -> dict[str, float]:
        reward_PG = self.rewards(images_BCHW, self.prompts.texts).total_PG
        return pixel_drift(images_BCHW, exact_BCHW) | {
            "reward": reward_PG.mean().item(),
            "rank": rank_correlation(reward_PG, exact_PG),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="SD3.5-medium with random weights; needs a GPU")
    parser.add_argument("--prompts", type=int, default=16, help="P, of the held-out ones")
    parser.add_argument("--group", type=int, default=8, help="G")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.full and not torch.cuda.is_available():
        raise SystemExit("--full needs a CUDA device, and torch sees none; leave it out for the embedded model")
    rollouts = {
        f"{recipe}, guidance {guidance:g}": Bench(arguments, recipe, guidance, steps)(arguments.rounds)
        for recipe, guidance, steps in (FULL_CASES if arguments.full else CASES)
    }
    if arguments.full:
        decoders = {"random, SD3.5's size": decode_drift(FULL, arguments.rounds, batch=8)}
    else:
        decoders = {
            "embedded": decode_drift(EMBEDDED, arguments.rounds, batch=64),
            "random, a quarter of SD3.5's width": decode_drift(RANDOM_AUTOENCODER, arguments.rounds, batch=4),
        }
    data = {"rollouts": rollouts, "decoders": decoders, **vars(arguments)}
    print(write_report("lossy", title="Lossy options: drift and speed", body=_body(data), data=data).read_text())


def _body(data: dict[str, Any]) -> str:
    what = "SD3.5-medium with random weights" if data["full"] else "The embedded model"
    parts = [
        f"{what}, adapters moved from zero; {data['prompts']} prompts x {data['group']} samples; median of "
        f"{data['rounds']} rounds.  3 of 10 steps are trained in flow_grpo_fast, 4 of 25 in mix_grpo.  Speed is of "
        "rollout and decoding together."
    ]
    if not data["full"]:
        parts.append(
            "Speed is in seconds of one thread of the CPU, which has no fp8: products are computed in float32, so the "
            "speed of lossy=fp8 says nothing of a GPU."
        )
    for name, facts in data["rollouts"].items():
        rows = [[option, *_cells(fact)] for option, fact in facts.items()]
        header = [name, "pixel RMS x 255", "PSNR dB", "reward", "rank", "ratio_deviation", "speed"]
        parts.append(table(header, rows))
    rows = [
        [name, f"{255 * f['rms']:.3f}", f"{255 * f['largest']:.1f}", f"{f['psnr']:.1f}", f"{f['speed']:.2f}x"]
        for name, f in data["decoders"].items()
    ]
    header = ["bfloat16 channels_last decode", "pixel RMS x 255", "largest x 255", "PSNR dB", "speed"]
    return "\n\n".join([*parts, table(header, rows)])


def _cells(fact: dict[str, float]) -> list[str]:
    cells = [f"{255 * fact['rms']:.2f}", f"{fact['psnr']:.1f}", f"{fact['reward']:.4f}", f"{fact['rank']:.3f}"]
    measured = "speed" in fact
    return [*cells, f"{fact['ratio_deviation']:.2g}" if measured else "", f"{fact['speed']:.2f}x" if measured else ""]


@cache
def _solver(overrides: str) -> Solver:
    """A config takes a good part of a second, and every roll asks for one."""
    solver: Solver = build(load_config("train", overrides.split()).solver)
    return solver


def _lossy_pieces() -> dict[str, Any]:
    return {name: build(load_config("train", [f"lossy={name}"]).lossy) for name in ("none", "fp8")}


@torch.no_grad()
def _moved(model: Any) -> Any:
    """With adapters as they are after some training: fresh ones add nothing."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.trainable.values():
        weight.add_(0.003 * torch.randn(weight.shape, generator=generator).to(weight))
    return model


if __name__ == "__main__":
    main()

if __name__ == "__main__":
    main()
