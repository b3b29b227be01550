"""Does learned start noise find better images, and for prompts that it has never seen?  On the embedded model.

    python -m benchmarks.learned_proposal

The proposal (algorithm/noise=learned) is learned three times: on the base model, whose weights stay as they are; beside
NFT, on the share of the groups that --mix leaves it; and on the policy that NFT trained, which stays as it is.  Each
policy then makes images of training prompts and of the held-out ones, whose noise is plain, learned, learned but that
of another prompt, or the best of --best-of plain noises by the graded reward of the image made in full.  All but the
last cost one image an image; the third says how much of what was learned is about the prompt.

What is done is kept in --out, cell by cell; the same command goes on.  Seconds are of this process on the CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.report import table, write_report
from fastgrpo.algorithm.noise import EVALUATION_STREAM, NoiseDraw, Starts, plain_starts
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.files.whole import write_whole
from fastgrpo.proposal.files import load_proposal, save_proposal
from fastgrpo.proposal.learner import ProposalLearner
from fastgrpo.sampler import Sampler
from fastgrpo.trainer import Trainer
from fastgrpo.types import Conditions, Prompt, Prompts, Samples

REWARDS = ("shapes", "shapes_strict")
# policy, where its weights are, which proposal goes with it: by the names of cells
POLICIES = (
    ("base model", None, "frozen"),
    ("NFT on plain noise", "nft", "trained"),
    ("NFT beside the proposal", "beside", "beside"),
)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/learned_proposal"))
    parser.add_argument("--frozen", type=int, default=160, help="iterations of learning on the base model")
    parser.add_argument("--nft", type=int, default=70, help="iterations of each NFT run")
    parser.add_argument("--trained", type=int, default=100, help="iterations of learning on what NFT trained")
    parser.add_argument("--mix", type=float, default=0.5, help="share of the groups that keep plain noise beside NFT")
    parser.add_argument("--prompts", type=int, default=64, help="of the training prompts and of the held-out ones")
    parser.add_argument("--images", type=int, default=16, help="of a prompt, a multiple of --best-of")
    parser.add_argument("--best-of", type=int, default=8)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("overrides", nargs="*", help="key=value, of the model and of algorithm.noise")
    arguments = parser.parse_args(words)
    measured = {}
    for seed in arguments.seeds:
        one = argparse.Namespace(**{**vars(arguments), "seed": seed, "out": arguments.out / f"seed_{seed}"})
        one.out.mkdir(parents=True, exist_ok=True)
        measured[seed] = _measure(one)
    print(_report(measured, arguments).read_text())


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every cell of one seed."""
    cells = Cells(arguments.out, arguments)
    results = {
        "frozen": cells("frozen", lambda: _learn(arguments, "frozen", arguments.frozen, None)),
        "nft": cells("nft", lambda: _train(arguments, "nft", ["algorithm/noise=gaussian"])),
        "beside": cells("beside", lambda: _train(arguments, "beside", [*_learned(arguments), _mixed(arguments)])),
        "trained": cells("trained", lambda: _learn(arguments, "trained", arguments.trained, "nft")),
    }
    for _, weights, proposal in POLICIES:
        name = f"judged_{proposal}"
        results[name] = cells(name, partial(_judge, arguments, weights, proposal))
    return results


@dataclass(frozen=True)
class Cells:
    """What has been measured, each in a file of ``out`` that is read in place of measuring it again."""

    out: Path
    arguments: argparse.Namespace

    def __call__(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.out / f"{name}.json"
        if not path.exists():
            began = time.process_time()
            measured = measure()
            write_whole(path, json.dumps(measured | {"cpu_seconds": time.process_time() - began}).encode())
            print(f"{name}: {time.process_time() - began:.0f} s", flush=True)
        values: dict[str, Any] = json.loads(path.read_text())
        return values


def _learned(arguments: argparse.Namespace) -> list[str]:
    return ["algorithm/noise=learned", *(word for word in arguments.overrides if word.startswith("algorithm.noise."))]


def _mixed(arguments: argparse.Namespace) -> str:
    return f"algorithm.noise.mix={arguments.mix}"


def _trainer(arguments: argparse.Namespace, words: Sequence[str], directory: str) -> Trainer:
    others = [word for word in arguments.overrides if not word.startswith("algorithm.noise.")]
    fixed = [
        f"seed={arguments.seed}",
        "runtime.threads=1",
        f"output={directory}/run",
        f"train.iterations={arguments.nft}",
    ]
    return build_trainer(load_config("train", [*fixed, *others, *words]))


def _learn(arguments: argparse.Namespace, name: str, iterations: int, weights: str | None) -> dict[str, Any]:
    """The proposal of a policy that stays as it is: an iteration of training without its update."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = _trainer(arguments, _learned(arguments), directory)
        _take_weights(trainer, arguments.out, weights)
        rows = [learning_step(trainer, iteration) for iteration in range(iterations)]
        _keep(trainer, arguments.out / name)
    return {"rows": rows}


def learning_step(trainer: Trainer, iteration: int) -> dict[str, float]:
    """Prompts, start noise, rollout, rewards and advantages of an iteration; only the proposal learns."""
    prompts = trainer.prompts.at(iteration)
    samples = Samples.all_of(prompts, trainer.group_size)
    conditions = trainer.model.encode(samples.texts)
    noise = trainer.start_noise(samples, iteration)
    scores = trainer.rewards.begin(samples.texts)
    trainer.rollout(samples, conditions, noise, iteration, scores.add)
    rewards = trainer.rewards.of_groups(scores.collect(), trainer.group_size)
    advantages_B = trainer.algorithm.advantage(rewards.learned_PG).flatten()
    metrics = trainer.proposal.learn(samples, conditions, noise, advantages_B, rewards.total_PG)
    return metrics | {name: reward_PG.mean().item() for name, reward_PG in rewards.named.items()}


def _train(arguments: argparse.Namespace, name: str, words: Sequence[str]) -> dict[str, Any]:
    """NFT, with the default run's settings but its length; its averaged weights are kept."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = _trainer(arguments, words, directory)
        rows = []
        for _ in range(arguments.nft):
            row = trainer.step()
            rows.append({key: row[key] for key in row if key.startswith(("reward/", "proposal/"))})
        averages = {key: average.contiguous() for key, average in trainer.ema.averages.items()}
        safetensors.torch.save_file(averages, arguments.out / f"{name}.safetensors")
        _keep(trainer, arguments.out / name)
    return {"rows": rows}


def _keep(trainer: Trainer, directory: Path) -> None:
    if isinstance(trainer.proposal, ProposalLearner):
        save_proposal(trainer.proposal.network, directory)


@torch.no_grad()
def _take_weights(trainer: Trainer, out: Path, name: str | None) -> None:
    if name is not None:
        averages = safetensors.torch.load_file(out / f"{name}.safetensors")
        for key, weight in trainer.model.trainable.items():
            weight.copy_(averages[key])


def _judge(arguments: argparse.Namespace, weights: str | None, proposal: str) -> dict[str, Any]:
    """Rewards of a policy on training and held-out prompts, from each kind of noise."""
    with tempfile.TemporaryDirectory() as directory:
        config = load_config("train", [word for word in arguments.overrides if not word.startswith("algorithm.noise.")])
        trainer = _trainer(arguments, [], directory)
        _take_weights(trainer, arguments.out, weights)
        network = load_proposal(arguments.out / proposal)
        num_steps = config.evaluate.num_steps
        # as many of each kind of caption as in the file, which is in the world's order
        seen, unseen = list(trainer.prompts.prompts), list(trainer.evaluation.prompts)
        found = {}
        for name, prompts in (("training prompts", seen), ("held-out prompts", unseen)):
            taken = prompts[:: max(1, len(prompts) // arguments.prompts)][: arguments.prompts]
            found[name] = _compare(trainer, num_steps, taken, network.starts, arguments)
        return found


def _compare(
    trainer: Trainer, num_steps: int, prompts: Sequence[Prompt], learned: Starts, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Of each noise and reward, the mean and standard error over prompts, and those of the gain over plain noise."""
    plain = images_rewards(trainer, num_steps, prompts, plain_starts, arguments.images)
    drawn = images_rewards(trainer, num_steps, prompts, learned, arguments.images)
    swapped = images_rewards(trainer, num_steps, prompts, _of_another(learned), arguments.images)
    best_PS = plain["shapes"].unflatten(1, (-1, arguments.best_of)).argmax(dim=2, keepdim=True)
    summary: dict[str, Any] = {}
    for reward in REWARDS:
        searched_PS = plain[reward].unflatten(1, (-1, arguments.best_of)).gather(2, best_PS)[:, :, 0]
        by_noise = {
            "plain": plain[reward],
            "learned": drawn[reward],
            "swapped": swapped[reward],
            "searched": searched_PS,
        }
        for noise, reward_PG in by_noise.items():
            gain_P = reward_PG.mean(dim=1) - plain[reward].mean(dim=1)
            summary[f"{noise} {reward}"] = {**_statistics(reward_PG.mean(dim=1)), "gain": _statistics(gain_P)}
    return summary


def _of_another(learned: Starts) -> Starts:
    """The noise of the prompt half a list away, whose rows come one prompt after the other."""

    def starts(draw: NoiseDraw, stream: int, conditions_B: Conditions) -> Tensor:
        half = len(draw.prompt_ids) // 2 * draw.group_size
        return learned(draw, stream, conditions_B[half:].cat(conditions_B[:half]))

    return starts


def _statistics(values_P: Tensor) -> dict[str, float]:
    return {"mean": values_P.mean().item(), "standard_error": (values_P.std() / len(values_P) ** 0.5).item()}


def images_rewards(
    trainer: Trainer, num_steps: int, prompts: Sequence[Prompt], starts: Starts, num_images: int
) -> dict[str, Tensor]:
    """Rewards [P, G] of the images that one kind of noise leads to; evaluation's time grid and noise."""
    model, texts = trainer.model, [prompt.text for prompt in prompts]
    rollout: Any = trainer.rollout
    sampler = Sampler(
        model=model,
        grid=trainer.algorithm.evaluation_grid(num_steps),
        batch_sizes=rollout.sampler.batch_sizes,
    )
    samples = Samples.all_of(Prompts(texts, list(range(len(texts)))), num_images)
    conditions = model.encode(samples.texts)
    draw = NoiseDraw(0, samples.prompts.ids, num_images, model.latent_shape, model.device)
    images_BCHW = sampler(samples, conditions, starts(draw, EVALUATION_STREAM, conditions))
    return trainer.rewards(images_BCHW, texts).named


def _report(measured: dict[int, dict[str, Any]], arguments: argparse.Namespace) -> Path:
    rows = []
    for policy, _, proposal in POLICIES:
        for prompts in ("training prompts", "held-out prompts"):
            of_seeds = [results[f"judged_{proposal}"][prompts] for results in measured.values()]
            cells = [
                " / ".join(_median([found[f"{noise} {reward}"]["mean"] for found in of_seeds]) for reward in REWARDS)
                for noise in ("plain", "learned", "swapped", "searched")
            ]
            gains = [found["learned shapes_strict"]["gain"] for found in of_seeds]
            gained = ", ".join(f"{gain['mean']:+.3f} ± {gain['standard_error']:.3f}" for gain in gains)
            rows.append([policy, prompts, *cells, gained])
    header = [
        "policy",
        "prompts",
        "plain",
        "learned",
        "of another prompt",
        f"best of {arguments.best_of}",
        "learned minus plain, strict, a seed each",
    ]
    curves = [
        [name, str(seed), *_curve(results[name])]
        for name in ("frozen", "beside", "trained")
        for seed, results in measured.items()
    ]
    took = "; ".join(
        f"seed {seed}: " + ", ".join(f"{name} {values['cpu_seconds']:.0f}" for name, values in results.items())
        for seed, results in measured.items()
    )
    body = (
        f"Graded / strict reward, {arguments.prompts} prompts of each kind, {arguments.images} images of each from "
        "plain and from learned noise, in evaluation's steps; the standard error is that over prompts.  Of another "
        "prompt: learned noise, of the prompt half a list away.  Best of "
        f"{arguments.best_of}: of so many of the plain images, the one with the highest graded reward.  Medians over "
        f"{len(measured)} seed(s), and their range.\n\n"
        + table(header, rows)
        + "\n\nWhile it learned: iterations of 12 prompts and 16 images, the graded reward in the first and in the "
        "last fifth of them, and nats of KL to N(0, I) in the last one.\n\n"
        + table(["learned", "seed", "iterations", "first fifth", "last fifth", "nats"], curves)
        + f"\n\nSeconds of one CPU core: {took}."
    )
    data = {"results": measured, "arguments": {**vars(arguments), "out": ""}}
    return write_report("learned_proposal", title="Learned start noise", body=body, data=data)


def _median(values: Sequence[float]) -> str:
    """With the range, where there are several."""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.3f}{spread}"


def _curve(values: dict[str, Any]) -> list[str]:
    rows = values["rows"]
    fifth = max(1, len(rows) // 5)
    reward = [row["shapes"] if "shapes" in row else row["reward/shapes"] for row in rows]
    first, last = (sum(part) / len(part) for part in (reward[:fifth], reward[-fifth:]))
    kls = [row["proposal/kl"] for row in rows if "proposal/kl" in row]
    return [str(len(rows)), f"{first:.3f}", f"{last:.3f}", f"{(kls or [0.0])[-1]:.1f}"]


if __name__ == "__main__":
    main()
