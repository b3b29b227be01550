"""What a run measures: one JSON object an iteration in ``metrics.jsonl``, TensorBoard, pictures, curves, a summary.

``METRICS`` explains every key once.  Numbers that are not finite are written as null, their names under "nonfinite".
Letters: H W pixels.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml  # type: ignore[import-untyped]
from PIL import Image
from torch import Tensor

from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.files.whole import write_whole
from fastgrpo.records.before_after import Shown, write_before_after
from fastgrpo.records.evaluations import means_of_prompts, totals, weights_of
from fastgrpo.records.grids import draw_grid, png, to_uint8
from fastgrpo.records.json_lines import append_row, read_rows, truncate_rows
from fastgrpo.records.plots import draw_curves
from fastgrpo.records.summary import summarize

METRICS = {
    "iteration": "iterations done, from 1; 0 is the state before training",
    "images": "images that training has made so far, over all GPUs; those of searches and evaluations not counted",
    "seconds": "training time so far, without evaluation, over all resumptions",
    "height": "of the iteration's images in pixels, where its prompts ask for a resolution of their own",
    "width": "the same; rewards and losses of images of other sizes are not to be compared",
    "reward/<name>": "mean of one named reward over the iteration's images",
    "reward/total": "mean of the weighted sum of the rewards: what is maximised",
    "reward/group_std": "standard deviation of the total reward within a group, mean over groups; 0 teaches nothing",
    "zero_variance_groups": "share of groups whose images all have the same reward: they give no gradient",
    "eval/<name>": "mean on the evaluation prompts, from plain N(0, I) noise, the same prompts and noise each time",
    "loss": "mean of the objective over the iteration's optimizer steps",
    "kl": "KL(policy, reference) per latent element, mean over trained steps, before kl_coef; where images are learned "
    "from, the mean squared distance of the two velocities; absent if kl_coef is 0",
    "drift": "mean squared distance of the velocity from the old policy's in the iteration's last optimizer step, or "
    "in the one that train.max_drift left out, where images are learned from",
    "approx_kl": "KL(old policy, policy) estimated from the ratios; 0 when an iteration has one optimizer step",
    "ratio_deviation": "largest distance of the ratio from 1 before the first optimizer step: 0 when rollout and "
    "update agree; null where batches did not fit and were halved in the update",
    "velocity_deviation": "the same where images are learned from: the largest distance of update's velocity from "
    "sampling's, with adapters merged, as a share of its error; every tenth iteration, or all with optimizer_steps > "
    "1; not where train.old_policy_growth makes the old policy another one",
    "clip_fraction": "share of trained steps, or of images, whose ratio lies outside 1 ± clip_range",
    "grad_norm": "norm of the gradient before clipping, mean over optimizer steps",
    "skipped_steps": "optimizer steps skipped in this iteration because loss or gradient was not finite",
    "optimizer_steps": "optimizer steps taken in this iteration: fewer than asked for if train.max_drift ended it",
    "learning_rate": "that of the iteration's optimizer steps",
    "images_per_second": "images of the iteration divided by its seconds, over all GPUs",
    "seconds/iteration": "wall-clock time of the iteration, without evaluation and checkpoint; this and all that "
    "follow are of the first rank, those of the others are in ranks.jsonl",
    "seconds/encode": "text encoding",
    "seconds/search": "noise search: estimates, decoding and their rewards, and groups that are made again",
    "seconds/rollout": "denoising and decoding of the iteration's images",
    "seconds/reward": "rewards of the iteration's images, as far as nothing else hid it",
    "seconds/update": "forward and backward passes and optimizer steps",
    "seconds/wait": "part of these stages in which other ranks were waited for; 0 where there is one",
    "seconds/evaluate": "evaluation, in the iterations that have one",
    "seconds/checkpoint": "writing the checkpoint of the iteration before, 0 where there was none",
    "peak_bytes": "peak memory allocated on the first rank's GPU (on a CPU: of the process)",
    "compilations": "graphs that torch.compile made in the iteration; 0 after the first of each resolution and length "
    "of texts",
    "search/share": "share of the iteration's prompts that were searched, or whose groups were made again",
    "search/images": "images that the search made in full beside the first ones, for each image of the iteration",
    "search/gain": "estimated reward of the noises that the search chose, minus that of plain noises; where groups are "
    "made again, the mean reward of the images that are kept, minus that of the first ones",
    "search/rank_correlation": "rank correlation, within a prompt, of estimated and final rewards",
    "search/effective_share": "share of a searched step's samples that count, (sum w)^2 / (n sum w^2) of their "
    "weights w, 1 where nothing was preferred; with algorithm.noise.correction=weights",
    "proposal/kl": "KL(learned start noise, N(0, I)) in nats an image, mean over the prompts that it was drawn for",
    "proposal/gain": "mean reward of the prompts with learned start noise minus that of those with plain noise, which "
    "are other prompts; where algorithm.noise.mix is above 0",
    "proposal/grad_norm": "norm of the gradient by the weights of the learned start noise's network",
}


class Sink(Protocol):
    """Where metrics go besides the run directory's own files."""

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def image(self, iteration: int, name: str, image: Image.Image) -> None: ...

    def page(self, iteration: int, name: str, path: Path) -> None: ...

    def config(self, config: Mapping[str, Any]) -> None: ...

    def truncate_to(self, iteration: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars and image grids for TensorBoard."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = lambda **options: SummaryWriter(str(directory), **options)
        self._writer = self._open()

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def image(self, iteration: int, name: str, image: Image.Image) -> None:
        self._writer.add_image(name, np.asarray(image), iteration, dataformats="HWC")

    def page(self, iteration: int, name: str, path: Path) -> None:
        """TensorBoard shows no pages."""

    def config(self, config: Mapping[str, Any]) -> None:
        """The config as text, which TensorBoard reads as markdown."""
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), 0)

    def truncate_to(self, iteration: int) -> None:
        """TensorBoard hides what earlier files hold of later iterations."""
        self._writer.close()
        self._writer = self._open(purge_step=iteration + 1)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """The same for Weights & Biases; a resumed run goes on under its id, the run directory's path."""

    def __init__(self, directory: Path, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            remedy = "pip install 'fastgrpo[wandb]', or set wandb=false"
            raise ValueError(f"wandb=true asks for a package that is not installed; {remedy}") from error
        self._wandb = wandb
        identity = str(directory.resolve()).strip("/").replace("/", "-")[-64:]
        self._run = wandb.init(project=project, name=directory.name, id=identity, dir=str(directory), resume="allow")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def image(self, iteration: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=iteration)

    def page(self, iteration: int, name: str, path: Path) -> None:
        with open(path, encoding="utf-8") as file:
            # as it is: what wandb would put into it is refused by the page's own policy
            self._run.log({name: self._wandb.Html(file, inject=False)}, step=iteration)

    def config(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(dict(config), allow_val_change=True)

    def truncate_to(self, iteration: int) -> None:
        """Nothing to do: wandb keeps the first value of a step, and a resumed run computes the same ones again."""

    def close(self) -> None:
        self._run.finish()


class Metrics:
    """The writer of a run's measurements; use it as a context manager, in one process of the run."""

    def __init__(
        self,
        run: RunDirectory,
        *,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._run, self._config = run, config or {}
        self._weights = weights_of(self._config)
        self._sinks: list[Sink] = [TensorBoard(run.tensorboard)] if tensorboard else []
        if wandb_project is not None:
            self._sinks.append(Wandb(run.path, wandb_project))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Append one iteration's object; on disk when this returns, as far as a kill of the process goes."""
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        row: dict[str, Any] = {"iteration": iteration} | {name: finite.get(name) for name in numbers}
        if len(finite) < len(numbers):
            row["nonfinite"] = sorted(numbers.keys() - finite.keys())
        append_row(self._run.metrics, row)
        for sink in self._sinks:
            sink.scalars(iteration, finite)

    def truncate_to(self, iteration: int) -> None:
        """On resume from ``iteration``: drop later lines, and the last one if a kill left half of it."""
        truncate_rows(self._run.metrics, iteration)
        truncate_rows(self._run.evaluations, iteration)
        for sink in self._sinks:
            sink.truncate_to(iteration)
            # afterwards: what was written before may be hidden
            if self._config:
                sink.config(self._config)

    def evaluation_grid(
        self,
        iteration: int,
        images: Iterable[Tensor],
        prompts: Sequence[str],
        verified: Sequence[bool] | None = None,
        totals: Sequence[float] | None = None,
    ) -> Path:
        """Save images [3, H, W] in [0, 1] as a labelled grid, and beside those of the first evaluation of the run.

        Call it with the same prompts and noise each time, first before training.  totals: the reward of each image.
        """
        pixels = [to_uint8(image_CHW) for image_CHW in images]
        grid = draw_grid(pixels, prompts, verified, totals)
        path = self._run.images / f"evaluation_{iteration:06d}.png"
        write_whole(path, png(grid))
        before_after = write_before_after(self._run.images, Shown(pixels, prompts, totals, verified))
        for sink in self._sinks:
            sink.image(iteration, "evaluation", grid)
            sink.image(iteration, "before_after", before_after)
        return path

    def page(self, iteration: int, name: str, path: Path) -> None:
        """Hand an HTML file on to those that show such."""
        for sink in self._sinks:
            sink.page(iteration, name, path)

    def totals_of(self, scores: Mapping[str, Tensor], num_prompts: int) -> list[float] | None:
        """The reward of the first image of each of the first prompts, from scores [P, G]; None if it is not known."""
        return totals({name: of_PG[:num_prompts, 0].tolist() for name, of_PG in scores.items()}, self._weights)

    def scores(self, iteration: int, scores: Mapping[str, Tensor]) -> None:
        """Append the scores [P, G] of an evaluation to ``evaluations.jsonl``, as the mean of each prompt."""
        append_row(self._run.evaluations, means_of_prompts(iteration, scores))

    def finish(self, error: str | None = None) -> dict[str, Any]:
        """Draw ``curves.png`` and write ``summary.json``, at any time; returns the summary.

        error: what ended the run, in a line, if anything went wrong.
        """
        rows = read_rows(self._run.metrics)
        draw_curves(rows, self._run.curves, title=self._run.path.name)
        evaluations = read_rows(self._run.evaluations)
        summary = summarize(rows, config=self._config, evaluations=evaluations, error=error)
        write_whole(self._run.summary, (json.dumps(summary, indent=2) + "\n").encode())
        return summary

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
