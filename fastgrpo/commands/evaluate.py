"""``fastgrpo evaluate``: an evaluation as a table, as JSON, and as a grid of images.

With a search each image is the best that it finds by the terms of the reward; what is watched judges it alone.  The
standard error of a mean is that over prompts, std of the prompts' means / sqrt(P): images of one prompt are not
independent.  Letters: P prompts, G images of each.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.making import Search
from fastgrpo.algorithm.noise import Starts, plain_starts
from fastgrpo.assembly import build_evaluation
from fastgrpo.commands.output_directory import new_directory
from fastgrpo.commands.proposal import starts_of, wanted_proposal
from fastgrpo.commands.searching import account, begun_search, in_words, wanted_search
from fastgrpo.commands.trained import load_model
from fastgrpo.evaluation import EvaluationResult, statistics
from fastgrpo.files.whole import write_whole
from fastgrpo.given import NOTHING, Given
from fastgrpo.models.adapter import FlowModel
from fastgrpo.parts import build_rewards, read_prompts, read_runtime
from fastgrpo.pieces import build
from fastgrpo.proposal.network import ProposalNetwork
from fastgrpo.records.before_after import Shown, write_before_after
from fastgrpo.records.evaluations import differences, means_of_prompts, totals, weights_of
from fastgrpo.records.grids import draw_grid, png, to_uint8
from fastgrpo.records.summary import commit, hardware, versions
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.settings import Evaluating
from fastgrpo.shapes.world import parse_caption
from fastgrpo.types import Prompt

# a report, and what it was made of
Judged = tuple[dict[str, Any], EvaluationResult]


def evaluate(config: DictConfig) -> None:
    """Run a checked ``evaluate`` config, print the table, and write ``evaluation.json`` and ``grid.png``."""
    judging = Judging.read(config)
    directory = new_directory(config.output)
    bases: list[EvaluationResult] = []
    report, result = judging(bases.append)
    write(directory, report, result)
    for base in bases:
        _draw_both(directory, base, result, weights_of({"reward": OmegaConf.to_container(config.reward)}))
    show(report, Console())
    names = ["evaluation.json", "grid.png", *(["before_after.png"] if bases else [])]
    print(f"written to {directory}: {', '.join(names)}")


def write(directory: Path, report: dict[str, Any], result: EvaluationResult) -> None:
    """The report as ``evaluation.json``, and the images that are shown as ``grid.png``."""
    write_whole(directory / "evaluation.json", (json.dumps(report, indent=2) + "\n").encode())
    write_whole(directory / "grid.png", page(result))


def page(result: EvaluationResult) -> bytes:
    """One image of each of the first prompts, as a PNG."""
    pixels = [to_uint8(image_CHW) for image_CHW in result.images]
    return png(draw_grid(pixels, result.texts, result.verified))


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What a config asks for, with all read but its model, which is loaded when this is called."""

    config: DictConfig
    evaluating: Evaluating
    prompts: list[Prompt]
    algorithm: Algorithm
    search: Search | None
    rewards: Rewards
    proposal: ProposalNetwork | None

    @classmethod
    def read(cls, config: DictConfig, given: Given = NOTHING) -> "Judging":
        """Of a checked ``evaluate`` config and what a program gives beside it."""
        evaluating = Evaluating(**config.evaluate)
        prompts = read_prompts(config, "held_out", given)
        algorithm: Algorithm = build(config.algorithm)
        search = wanted_search(config, evaluating.num_steps)
        rewards, _ = build_rewards(config, prompts, given)
        return cls(
            config=config,
            evaluating=evaluating,
            prompts=prompts,
            algorithm=algorithm,
            search=search,
            rewards=rewards,
            proposal=wanted_proposal(config),
        )

    def __call__(self, on_base: Callable[[EvaluationResult], object] = lambda _: None) -> Judged:
        """What ``evaluation.json`` holds, and what it was made of.

        on_base: is told the evaluation of the model that the run began from, where ``config.base`` asks for it.
        """
        config, texts, bases = self.config, [prompt.text for prompt in self.prompts], list[EvaluationResult]()

        def evaluate_base(model: FlowModel) -> None:
            if config.base:
                bases.append(self._evaluated(model)[0])
                on_base(bases[0])

        model, origin = load_model(config, evaluate_base)
        starts, noise = starts_of(self.proposal, config, model, texts[0])
        result, spent = self._evaluated(model, starts)
        report = {
            "model": origin,
            "start_noise": noise or "plain",
            "images": result.num_images,
            "prompts": len(texts),
            "num_steps": self.evaluating.num_steps,
            "search": spent,
            "rewards": {name: statistics(scores_PG) for name, scores_PG in result.scores.items()},
            "base": {name: statistics(scores_PG) for base in bases for name, scores_PG in base.scores.items()},
            # of the run from the base, prompt by prompt
            "differences": differences([means_of_prompts(0, one.scores) for one in (*bases, result)]),
            "kinds": _by_kind(texts, result),
            "hardware": hardware(),
            "versions": versions(),
            "commit": commit(),
        }
        return report, result

    def _evaluated(self, model: FlowModel, starts: Starts = plain_starts) -> tuple[EvaluationResult, Any]:
        """An evaluation of the model, and what its search took."""
        evaluating, runtime = self.evaluating, read_runtime(self.config)
        evaluation = build_evaluation(
            evaluating, runtime, model, self.rewards, self.algorithm, self.prompts, starts=starts
        )
        if self.search is None:
            return evaluation(), None
        sampler = Sampler(model=model, grid=evaluation.grid, batch_sizes=evaluation.batch_sizes)
        num_images = len(self.prompts) * evaluating.images_per_prompt
        with begun_search(self.search, self.config, sampler, self.rewards, self.algorithm, num_images) as begun:
            result = replace(evaluation, search=begun)()
        return result, account(begun, result.cost, num_images)


def _draw_both(directory: Path, base: EvaluationResult, result: EvaluationResult, weights: Mapping[str, float]) -> None:
    """The images of both beside each other: those that gained most, and all."""
    for one in (base, result):
        shown = len(one.images)
        scores = {name: scores_PG[:shown, 0].tolist() for name, scores_PG in one.scores.items()}
        images = [to_uint8(image_CHW) for image_CHW in one.images]
        write_before_after(directory, Shown(images, one.texts, totals(scores, weights), one.verified))
    (directory / ".first.npz").unlink()


def _by_kind(texts: list[str], result: EvaluationResult) -> dict[str, Any]:
    """Means by what a caption of the shapes world asks for; empty for other prompts."""
    try:
        kinds = [parse_caption(text).form for text in texts]
    except ValueError:
        return {}
    by_kind = {}
    for kind in dict.fromkeys(kinds):
        rows_P = torch.tensor([other == kind for other in kinds])
        scores = {name: statistics(scores_PG[rows_P]) for name, scores_PG in result.scores.items()}
        by_kind[kind] = {"prompts": int(rows_P.sum()), "rewards": scores}
    return by_kind


def show(report: dict[str, Any], console: Console) -> None:
    """What was evaluated, and a table of the means."""
    search = report["search"]
    said = f"{report['images']} images of {report['model']}" + (f", {in_words(search)}" if search else "")
    console.print(said, highlight=False, markup=False, soft_wrap=True)
    if report["base"]:
        both = Table("", "base", "run", "difference", "prompts up, down")
        for name, found in report["differences"].items():
            means = [f"{report[which][name]['mean']:.4f}" for which in ("base", "rewards")]
            error = found["standard_error"]
            change = f"{found['difference']:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
            both.add_row(name, *means, change, f"{found['rose']}, {found['fell']}")
        console.print(both)
    table = Table("", "prompts", *report["rewards"])
    for name, part in report["kinds"].items():
        table.add_row(name, str(part["prompts"]), *[_cell(value) for value in part["rewards"].values()])
    table.add_section()
    table.add_row("all", str(report["prompts"]), *[_cell(value) for value in report["rewards"].values()])
    console.print(table)


def _cell(value: dict[str, float | None]) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.4f}" + (f" ± {error:.4f}" if error is not None else "")
