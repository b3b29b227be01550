"""A run directory as training leaves it, made in a moment: the real writers, given numbers that are known."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from fastgrpo.evaluation import EvaluationResult
from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.files.whole import write_whole
from fastgrpo.records.metrics import Metrics
from fastgrpo.records.record import Record, no_report
from fastgrpo.records.stragglers import Stragglers
from fastgrpo.types import Noise, Rewards, Scored

HOSTILE = (
    """<script>window.hostile = 1</script> <img src=x onerror="window.hostile = 1"> "two" & 'red' </script> 猫 ü"""
)
PROMPTS = (HOSTILE, "a red circle", "two blue squares")
CONFIG: dict[str, Any] = {
    "name": "run",
    "seed": 42,
    "train": {"iterations": 4, "max_minutes": float("inf"), "learning_rate": 0.001},
    "reward": {"weights": {"shapes": 1.0}},
}
# seconds are 2 an iteration: 0.25 encode, 0.5 rollout, 0.25 reward, 0.75 update, and 0.25 of no stage
STAGES = {"encode": 0.25, "search": 0.0, "rollout": 0.5, "reward": 0.25, "update": 0.75}


def rows_of(num: int, evaluate_every: int = 2) -> list[dict[str, Any]]:
    """Iterations 0 to ``num``; the reward falls and rises, scores are 0.4 at first and 0.1 more each evaluation."""
    rows: list[dict[str, Any]] = [{"iteration": 0, "seconds": 0.0, "eval/strict": 0.1, "eval/shapes": 0.4}]
    rows[0]["seconds/evaluate"] = 1.5
    for i in range(1, num + 1):
        row = {"iteration": i, "images": 96 * i, "seconds": 2.0 * i, "reward/total": ((-1) ** i) * i / 7, "loss": 1 / i}
        row |= {"seconds/iteration": 2.0, **{f"seconds/{stage}": value for stage, value in STAGES.items()}}
        row |= {"images_per_second": 48.0, "grad_norm": float("nan") if i == 2 else 0.1 * i, "peak_bytes": 2**30}
        if i % evaluate_every == 0:
            row |= {"eval/strict": 0.1, "eval/shapes": 0.4 + 0.1 * (i // evaluate_every), "seconds/evaluate": 1.5}
        rows.append(row)
    return rows


def make_record(
    path: Path,
    *,
    config: Mapping[str, Any] = CONFIG,
    make_report: Callable[[Path], Path | None] = no_report,
    wandb_project: str | None = None,
) -> Record:
    """The first rank's writer of a new run."""
    directory = RunDirectory.create(path, resume=False)
    write_whole(directory.config, OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode())
    metrics = Metrics(directory, tensorboard=False, wandb_project=wandb_project)
    stragglers = Stragglers(path=directory.ranks, hosts=["here"])
    return Record(directory=directory, metrics=metrics, stragglers=stragglers, make_report=make_report)


def make_run(
    path: Path,
    *,
    rows: Sequence[Mapping[str, Any]] = (),
    config: Mapping[str, Any] = CONFIG,
    prompts: Sequence[str] = PROMPTS,
    searches: Sequence[int] = (),
    is_finished: bool = True,
) -> Path:
    """A run of ``rows``, an image of each prompt in each evaluation, and a search in the iterations ``searches``."""
    record = make_record(path, config=config)
    for row in rows or rows_of(4):
        if prompts and any(name.startswith("eval/") for name in row):
            record.evaluation(row["iteration"], evaluation_of(row["iteration"], prompts))
        if row["iteration"] in searches:
            record.search(row["iteration"], prompts, *searched(len(prompts)))
        record.metrics.log(row["iteration"], {name: value for name, value in row.items() if name != "iteration"})
    if is_finished:
        record.finish()
    return path


def evaluation_of(iteration: int, prompts: Sequence[str], size: int = 8) -> EvaluationResult:
    """Images of one color, which tells iteration and prompt; the score of prompt p is p / 10 + iteration / 100."""
    images = [color_of(iteration, place)[:, None, None].expand(3, size, size) for place in range(len(prompts))]
    scores_PG = torch.tensor([[place / 10 + iteration / 100] * 2 for place in range(len(prompts))])
    scores = {"shapes": scores_PG, "strict": torch.full_like(scores_PG, float("nan"))}
    verified = [place % 2 == 0 for place in range(len(prompts))]
    return EvaluationResult(scores, {}, 2 * len(prompts), list(prompts), images, verified)


def color_of(iteration: int, place: int) -> torch.Tensor:
    return torch.tensor([iteration * 10, place * 20, 99]) / 255


def searched(num_prompts: int) -> tuple[Noise, Rewards]:
    """Two rounds of three candidates of all prompts but the last one; the best two of five were chosen."""
    places = tuple(range(num_prompts - 1))
    rounds = [torch.tensor([[0.1, 0.3, 0.2]]), torch.tensor([[0.25, float("inf"), 0.4]])]
    scored = tuple(Scored(places, scores_K.expand(len(places), -1)) for scores_K in rounds)
    estimates_PG = torch.tensor([[0.4, 0.3]]).expand(num_prompts, -1).clone()
    estimates_PG[-1] = float("nan")
    rewards_PG = torch.tensor([[0.35, 0.45]]).expand(num_prompts, -1)
    noise = Noise(torch.empty(0), metrics={}, num_scored=6, estimates_PG=estimates_PG, scored=scored)
    return noise, Rewards({}, rewards_PG, rewards_PG)
