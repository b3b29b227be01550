"""``fastgrpo.evaluate``: rewards on held-out prompts.  Letters: P prompts, G images of each, H W pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from fastgrpo.commands import evaluate as command
from fastgrpo.commands.output_directory import new_directory
from fastgrpo.evaluation import EvaluationResult
from fastgrpo.given import Given, Row
from fastgrpo.library.process import as_before
from fastgrpo.library.settings import Directory, RewardFunction, config_with

_REFUSED = {
    "output": "the evaluation is returned; evaluate(...).save(DIRECTORY) writes it",
}
_WIDTH = 120


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Evaluated:
    """An evaluation; printed, and shown by a notebook, it is the table of the command.

    report: what ``evaluation.json`` holds.  result: every score, and one image of each of the first prompts.
    """

    report: dict[str, Any]
    result: EvaluationResult

    @property
    def means(self) -> dict[str, float]:
        """Of each reward over all images."""
        return {name: statistics["mean"] for name, statistics in self.report["rewards"].items()}

    @property
    def standard_errors(self) -> dict[str, float | None]:
        """Of these means, over prompts, since images of one prompt are not independent; None where there is one."""
        return {name: statistics["standard_error"] for name, statistics in self.report["rewards"].items()}

    @property
    def scores_PG(self) -> dict[str, Tensor]:
        """Of each reward all scores, [P, G], prompts in their order."""
        return self.result.scores

    def save(self, directory: Directory) -> Path:
        """Write ``evaluation.json`` and ``grid.png``, as the command does; ValueError unless the directory is empty."""
        path = new_directory(str(Path(directory)))
        command.write(path, self.report, self.result)
        return path

    def __repr__(self) -> str:
        text = StringIO()
        command.show(self.report, Console(file=text, width=_WIDTH, force_jupyter=False, force_terminal=False))
        return text.getvalue().rstrip()

    def _repr_png_(self) -> bytes:
        return command.page(self.result)


def evaluate(
    *settings: str,
    run: Directory | None = None,
    prompts: Sequence[Row] | None = None,
    reward: RewardFunction | None = None,
) -> Evaluated:
    """Mean rewards on held-out prompts from plain noise, of the base model or of a run's averaged weights.

        before, after = fastgrpo.evaluate(), fastgrpo.evaluate(run="outputs/nft")
        after.means["shapes_strict"] - before.means["shapes_strict"]

    settings: those of ``fastgrpo evaluate``, as ``"evaluate.images_per_prompt=16"`` or ``"reward=pick_score"``.
    run: of ``fastgrpo.train`` or ``fastgrpo.load``, or the path of a run directory or of a ``checkpoints/step_*``.
    prompts: texts, or mappings as a .jsonl file has them; None are those of the setting ``prompts.held_out``.
    reward: a function, as in ``fastgrpo.train``; None is the run's, unless that is a function, which is given again.

    ValueError for whatever is wrong with the arguments, RewardError for a reward that fails.  Nothing is written.
    """
    given = Given(reward=reward, held_out=prompts)
    with as_before():
        # each call is one evaluation, unless the settings say otherwise
        words = ("base=false", *settings)
        config = config_with("evaluate", words, run=run, given=given, refused=_REFUSED)
        report, result = command.Judging.read(config, given)()
    return Evaluated(report=report, result=result)
