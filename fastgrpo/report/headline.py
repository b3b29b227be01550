"""What a reader wants to know first: whether it worked, by how much, how fast, and what went wrong."""

import math
from dataclasses import dataclass
from statistics import fmean, median

from fastgrpo.records.evaluations import differences
from fastgrpo.records.json_lines import read_rows
from fastgrpo.records.remarks import remarks
from fastgrpo.report.run import Run, number

# a difference is called one from so many of its standard errors on
_ERRORS = 2.0
# without evaluation: the first and the last share of the iterations are compared
_SHARE = 0.1


@dataclass(frozen=True)
class Score:
    """A score on held-out prompts, first, last and best; errors are standard errors over prompts, None if unknown.

    gain_error is that of the difference, prompt by prompt, which is smaller than those of the two say.
    """

    name: str
    first: float
    last: float
    best: float
    best_iteration: int
    first_error: float | None
    last_error: float | None
    gain_error: float | None

    @property
    def gain(self) -> float:
        return self.last - self.first


@dataclass(frozen=True)
class Headline:
    """``verdict`` in a sentence, whether it is good news (None if neither), and the numbers of a run."""

    verdict: str
    is_good: bool | None
    scores: list[Score]
    facts: list[tuple[str, str]]
    remarks: list[str]


def headline_of(run: Run) -> Headline:
    """From the rows of metrics.jsonl, which a run that still trains has too."""
    names = [name.removeprefix("eval/") for name in run.metrics if name.startswith("eval/")]
    scores = [score for name in _main_first(run, names) if (score := _score(run, name)) is not None]
    verdict, is_good = _verdict(run, scores)
    return Headline(verdict, is_good, scores, _facts(run), remarks(run.rows))


def main_score(run: Run) -> str | None:
    """The metric of the first reward that is trained on, else of any evaluation; None if nothing was evaluated."""
    names = [name.removeprefix("eval/") for name in run.metrics if name.startswith("eval/")]
    return f"eval/{_main_first(run, names)[0]}" if names else None


def weight_of(run: Run, name: str) -> float:
    """Of a reward in the sum that is maximised, 0 for one that is only watched."""
    weights = (run.config.get("reward") or {}).get("weights") or {}
    return number(weights.get(name)) or 0.0


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1 h 02 min, 3 min 05 s, 12.3 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _main_first(run: Run, names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: weight_of(run, name) == 0)


def _score(run: Run, name: str) -> Score | None:
    points = [(places, value) for places, value in run.points(f"eval/{name}") if "iteration" in places]
    if not points:
        return None
    best = min if weight_of(run, name) < 0 else max
    places, value = best(points, key=lambda point: point[1])
    (first_places, first), (last_places, last) = points[0], points[-1]
    errors = {gallery.iteration: gallery.statistics.get(name, {}).get("standard_error") for gallery in run.galleries}
    before, after = (number(errors.get(int(where["iteration"]))) for where in (first_places, last_places))
    gain_error = _gain_error(run, name, int(first_places["iteration"]), int(last_places["iteration"]))
    if gain_error is None and before is not None and after is not None:
        gain_error = math.hypot(before, after)
    return Score(name, first, last, value, int(places["iteration"]), before, after, gain_error)


def _gain_error(run: Run, name: str, first: int, last: int) -> float | None:
    """Of an evaluation's difference from another, by the means of their prompts; None where these are not there."""
    lines = [line for line in read_rows(run.directory.evaluations) if line.get("iteration") in (first, last)]
    if [line["iteration"] for line in lines] != [first, last]:
        return None
    return differences(lines).get(name, {}).get("standard_error")


def _verdict(run: Run, scores: list[Score]) -> tuple[str, bool | None]:
    if not scores:
        return _verdict_of_training(run)
    score = scores[0]
    num_evaluations = len(run.points(f"eval/{score.name}"))
    if num_evaluations == 1:
        return f"{score.name} on held-out prompts is {score.first:.4g}; there is one evaluation so far.", None
    change = f"{score.first:.4g} to {score.last:.4g} ({score.gain:+.3g})"
    if score.gain == 0:
        return f"{score.name} on held-out prompts is {score.last:.4g}, as at the beginning.", None
    if score.gain_error is not None and abs(score.gain) < _ERRORS * score.gain_error:
        return (
            f"{score.name} on held-out prompts went from {change}: within {_ERRORS:g} standard errors of the "
            "difference, so perhaps by chance.",
            None,
        )
    is_good = score.gain * (weight_of(run, score.name) or 1.0) > 0
    word = "rose" if score.gain > 0 else "fell"
    return f"{score.name} on held-out prompts {word} from {change}.", is_good


def _verdict_of_training(run: Run) -> tuple[str, bool | None]:
    rewards = [value for _, value in run.points("reward/total")]
    if not rewards:
        return "Nothing has been measured yet.", None
    some = max(1, round(_SHARE * len(rewards)))
    before, after = fmean(rewards[:some]), fmean(rewards[-some:])
    return (
        f"No evaluation. The reward in training went from {before:.4g} to {after:.4g}, means of the first and the "
        f"last {some} of {len(rewards)} iterations.",
        None,
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    last = run.rows[-1] if run.rows else {}
    speeds = [value for _, value in run.points("images_per_second")]
    bytes_ = [value for _, value in run.points("peak_bytes")]
    wanted = number((run.config.get("train") or {}).get("iterations"))
    iterations = f"{last.get('iteration', 0):,}" + (f" of {int(wanted):,}" if wanted and not run.is_over else "")
    facts = [("iterations", iterations)]
    if (images := number(last.get("images"))) is not None:
        facts.append(("images", f"{int(images):,}"))
    if (seconds := number(last.get("seconds"))) is not None:
        facts.append(("training time", duration(seconds)))
    if speeds:
        # the first iterations compile; the median does not see them
        facts.append(("images/s, median", f"{median(speeds):.1f}"))
    if bytes_:
        facts.append(("peak memory", f"{max(bytes_) / 2**30:.2f} GiB"))
    if skipped := sum(value for _, value in run.points("skipped_steps")):
        facts.append(("skipped steps", f"{int(skipped):,}"))
    return facts
