"""The result of ``benchmarks.rare_success.success``, and the prompts that are chosen by it."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path

from benchmarks.rare_success.chosen import choose_bands, choose_hard
from benchmarks.rare_success.counts import Counts, wilson
from benchmarks.report import table, write_report
from fastgrpo.shapes.captions import training_captions
from fastgrpo.shapes.world import parse_caption

BANDS_FILE = Path(__file__).parent / "bands.json"
PROMPTS = Path(str(files("fastgrpo.shapes") / "prompts"))


def write_chosen(counts: Counts) -> None:
    """The prompt files, and the bands."""
    for part, captions in zip(("train", "held_out"), choose_hard(counts.total), strict=True):
        (PROMPTS / f"hard_{part}.txt").write_text("".join(f"{caption}\n" for caption in captions))
    BANDS_FILE.write_text(json.dumps(choose_bands(counts.total), indent=1) + "\n")


def write(counts: Counts) -> Path:
    """The result of these counts; returns the path of its .md."""
    totals = counts.total
    train, held_out = ({str(caption) for caption in part} for part in choose_hard(totals))
    easy_train = {str(caption) for caption in training_captions()}
    sets = {"train.txt": easy_train, "hard_train.txt": train, "hard_held_out.txt": held_out}
    by_form: dict[str, list[str]] = defaultdict(list)
    for text in totals:
        by_form[parse_caption(text).form].append(text)
    bands = choose_bands(totals)
    body = (
        "Strict successes of the shipped model, plain noise, 10 ODE steps, no guidance.  Intervals are Wilson's, 95%, "
        "of pooled images; captions of a form differ, and images of one caption are not independent of its "
        "difficulty.\n\n"
        + "\n\n".join(_table(what, of, counts) for what, of in (("form", by_form), ("prompts", sets), ("band", bands)))
        + f"\n\n{_caution(counts, train | held_out)}"
    )
    data = {"totals": totals, "measurements": counts.by_measurement, "bands": bands}
    data |= {"hard_train": sorted(train), "hard_held_out": sorted(held_out)}
    title = "How often the base model draws a caption right"
    return write_report("rare_success.success", title=title, body=body, data=data)


def _table(what: str, texts: Mapping[str, Iterable[str]], counts: Counts) -> str:
    rows = [_row(name, list(found), counts) for name, found in texts.items()]
    return table([what, "captions", "ever right", "right of images", "rate"], rows)


def _row(name: str, texts: list[str], counts: Counts) -> list[str]:
    totals = counts.total
    measured = [totals[text] for text in texts if text in totals]
    successes, images = (sum(part) for part in zip(*measured, strict=True)) if measured else (0, 0)
    if not images:
        return [name, "0", "", "", ""]
    low, high = wilson(successes, images)
    ever = sum(right > 0 for right, _ in measured)
    rate = f"{successes / images:.2%} ({low:.2%} to {high:.2%})"
    return [name, str(len(measured)), str(ever), f"{successes} of {images}", rate]


def _caution(counts: Counts, hard: set[str]) -> str:
    never = [counts.total[text][1] for text in sorted(hard) if counts.total[text][0] == 0]
    most, least = (wilson(0, number)[1] for number in (min(never), max(never)))
    bound = f"{most:.1%}" if min(never) == max(never) else f"{least:.1%} to {most:.1%}"
    return (
        f"{len(never)} of the {len(hard)} hard prompts were never drawn right in {min(never)} to {max(never)} images: "
        f"nobody can tell that from never, and the upper end of such a prompt's own interval is {bound}.  Prompts and "
        "bands were chosen by these same images, so their rates are biased; a form's is of all its captions that were "
        "measured, of which those that once succeeded got more images."
    )
