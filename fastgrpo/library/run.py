"""``fastgrpo.train`` and ``fastgrpo.load``: a run, and what its directory holds."""

import json
import os
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from omegaconf import OmegaConf

from fastgrpo import training
from fastgrpo.commands.export import export
from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.given import FILES, Given, Row
from fastgrpo.health import Preempted
from fastgrpo.library.evaluate import Evaluated, evaluate
from fastgrpo.library.process import as_before
from fastgrpo.library.sample import Sampled, sample
from fastgrpo.library.settings import Directory, RewardFunction, config_with
from fastgrpo.own_code.named import to_name_again
from fastgrpo.parts import RunParts
from fastgrpo.records.json_lines import read_rows


@dataclass(frozen=True)
class Run:
    """A run by its directory, finished or not; what it is asked is read from there.  A notebook shows its curves."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> dict[str, Any]:
        """All settings, as ``config.yaml`` has them."""
        config: Any = OmegaConf.to_container(OmegaConf.load(self._directory.config))
        return config

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row an iteration, also while it trains: ``pandas.DataFrame(run.metrics)``.  README explains the keys."""
        return read_rows(self._directory.metrics)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Of those rows the ones with an evaluation, ``{"iteration": 20, ..., "eval/shapes_strict": 0.81}``."""
        return [row for row in self.metrics if any(key.startswith("eval/") for key in row)]

    @property
    def last_evaluation(self) -> dict[str, float]:
        """Mean of each reward on held-out prompts, by its name; empty before the first evaluation."""
        last = self.evaluations[-1] if self.evaluations else {}
        return {key.removeprefix("eval/"): value for key, value in last.items() if key.startswith("eval/")}

    @property
    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds; ValueError before the run has come to an end, or was asked to stop."""
        path = self._directory.summary
        if not path.exists():
            raise ValueError(f"{path} is written when a run ends, and this one did not yet; run.metrics has its rows")
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return summary

    @property
    def curves(self) -> Path:
        """A PNG, written when the run ends."""
        return self._directory.curves

    @property
    def before_after(self) -> Path:
        """A PNG: images before training, and of the last evaluation."""
        return self._directory.images / "before_after.png"

    @property
    def lora(self) -> Path:
        """What diffusers' ``load_lora_weights`` reads, written when the run ends."""
        return self._directory.lora

    def sample(self, prompts: str | Sequence[Row], *settings: str, reward: RewardFunction | None = None) -> Sampled:
        """``fastgrpo.sample`` of its averaged weights."""
        return sample(prompts, *settings, run=self, reward=reward)

    def evaluate(
        self, *settings: str, prompts: Sequence[Row] | None = None, reward: RewardFunction | None = None
    ) -> Evaluated:
        """``fastgrpo.evaluate`` of its averaged weights."""
        return evaluate(*settings, run=self, prompts=prompts, reward=reward)

    def export(self, output: Directory, *settings: str) -> Path:
        """Write its averaged weights for diffusers into a new directory: ``run.export("exported", "merged=true")``."""
        with as_before():
            export(config_with("export", [f"output={os.fspath(output)}", *settings], run=self))
        return Path(output)

    def resume(self, *settings: str, reward: RewardFunction | None = None, stop: Event | None = None) -> "Run":
        """Go on from its newest checkpoint: ``run.resume("train.iterations=240")``.

        A reward that was given as a function is given again.
        """
        return train(f"output={self.path}", "resume=true", *settings, reward=reward, stop=stop)

    def _repr_png_(self) -> bytes | None:
        return self.curves.read_bytes() if self.curves.exists() else None

    @property
    def _directory(self) -> RunDirectory:
        return RunDirectory(self.path)


def load(path: Directory) -> Run:
    """The run in a directory, finished or not: ``fastgrpo.load("outputs/nft").last_evaluation``.

    ValueError where there is none.
    """
    directory = Path(path).expanduser().absolute()
    if not RunDirectory(directory).config.is_file():
        raise ValueError(f"{directory} is no run directory, which has a config.yaml; give that of a run")
    return Run(directory)


def train(
    *settings: str,
    reward: RewardFunction | None = None,
    prompts: Sequence[Row] | None = None,
    held_out: Sequence[Row] | None = None,
    stop: Event | None = None,
) -> Run:
    """Train a model on a reward to the end of the run; what it learns lies in its directory, as of the command.

        def redness(images, prompts):
            return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))

        run = fastgrpo.train("algorithm=nft", "train.iterations=20", "name=red", reward=redness)

    settings: those of ``fastgrpo train``, as ``"model=sd35_medium"`` or ``"resume=true"``.
    reward: a function of (images, prompts) in place of the setting ``reward=...``: of float32 images [B, 3, H, W] in
        [0, 1] and B prompts, one an image, B numbers; more is better.  A third parameter, ``metadata``, is given what
        else each row of the prompts says.  It may be a lambda, or an object that is called.
        Its name in metrics is ``custom``.  ``config.yaml`` keeps its ``module.qualname``: to resume, give it again.
    prompts, held_out: what is trained on and what is evaluated, texts or mappings as a .jsonl file has them, in place
        of the files ``prompts.path`` and ``prompts.held_out``; the run directory keeps them.
    stop: when another thread has set this event, the run ends its iteration, saves and is returned.

    It may be called from a thread, and again in the same process, which is left as it was.  In a program that torchrun
    starts every rank calls it.  Ctrl-C, or a notebook's stop, ends the iteration and saves; KeyboardInterrupt is raised
    then, and ``fastgrpo.load(output).resume()`` goes on.  A thread hears no signal: there ``stop`` does the same.
    Two runs at once are better two processes: while one loads bfloat16 weights, transformers makes that the default
    dtype of every thread, and what the other computes then may be rounded to it.

    ValueError for whatever is wrong with the arguments, RewardError for a reward that fails, TrainingError for a run
    that must not go on.
    """
    given = Given(reward=reward, path=prompts, held_out=held_out, stop=stop)
    with as_before():
        config = config_with("train", settings, given=given)
        output = Path(config.output).absolute()
        for key, name in FILES.items():
            # a run that goes on keeps the path that it began with
            if given.rows(key) is not None and Path(config.prompts[key]).name != name:
                config.prompts[key] = str(output / name)
        given.compare(output)
        try:
            training.train(config, given, _call_that_goes_on)
        except Preempted as error:
            if error.signal_number != signal.SIGINT:
                raise
            if given.is_stopped():
                return Run(output)
            raise KeyboardInterrupt(f"stopped after iteration {error.iteration}, which is saved") from error
    return Run(output)


def _call_that_goes_on(parts: RunParts) -> str:
    # as the shell would hand them on
    words = [f"output={parts.output}", "resume=true", *shlex.split(to_name_again(parts.config))]
    given = [", reward=..."] if parts.given.reward is not None else []
    words = [word for word in words if not given or not word.startswith("reward.path=")]
    return f"fastgrpo.train({', '.join(map(repr, words))}{''.join(given)})"
