"""What the ocr reward answers on pictures whose rewards are known by hand, and on what it spends its time.

    python -m benchmarks.ocr_reward
    python -m benchmarks.ocr_reward --texts 4                  a quick look: no report

Every text is written as its prompt wants it, with one and two wrong letters, without one of its words, and replaced by
noise and by nothing, at 512 x 512.  Each picture is read as drawn, blurred, as JPEG, and after an autoencoder: that of
the embedded model, trained on colored shapes.  What it returns has a decoder's artefacts; it is no generated image.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import cv2
import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.kernels.timing import Quartiles, quartiles
from benchmarks.ocr_pictures import SIZE, VIEWS, Sample, samples, seen, to_images
from benchmarks.report import table, write_report
from fastgrpo.rewards.ocr import Ocr

_TEXTS = 60
_TIMED_PICTURES = 16
_ROUNDS = 7
_THUMBNAIL = 224
# of the contact sheet, each in every view
_SHOWN_TEXTS = 2


def main(arguments_of_shell: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=_TEXTS)
    num_texts = parser.parse_args(arguments_of_shell).texts
    # one core is measured, opencv would take all
    cv2.setNumThreads(1)
    reward = Ocr(threads=1)
    drawn = [sample for seed in range(num_texts) for sample in samples(seed)]
    rewards = {view: answers(reward, drawn, view) for view in VIEWS}
    speed = stages(reward, [sample for sample in drawn if sample.kind == "exact"][:_TIMED_PICTURES])
    rows = [row for view in VIEWS for row in grades(drawn, rewards[view], view)]
    body = report(rows, speed, num_texts)
    print(body)
    if num_texts == _TEXTS:
        data = {"rows": rows, "images_per_second": {name: vars(value) for name, value in speed.items()}}
        path = write_report("ocr_reward", title="The ocr reward on pictures of known spelling", body=body, data=data)
        contact_sheet(drawn, rewards).save(path.with_suffix(".png"))
        print(path)


def answers(reward: Ocr, drawn: list[Sample], view: str) -> list[float]:
    return [reward(to_images([seen(sample.picture, view)]), [sample.prompt]).item() for sample in drawn]


def grades(drawn: list[Sample], rewards: list[float], view: str) -> list[dict]:
    """One row a kind: means, and how many rewards are what the spelling says."""
    rows = []
    for kind in dict.fromkeys(sample.kind for sample in drawn):
        pairs = [(got, one.expected) for got, one in zip(rewards, drawn, strict=True) if one.kind == kind]
        mean, expected = (statistics.fmean(values) for values in zip(*pairs, strict=True))
        share = statistics.fmean(abs(got - wanted) < 1e-6 for got, wanted in pairs)
        rows.append({"view": view, "kind": kind, "mean": mean, "expected": expected, "exactly_expected": share})
    return rows


def stages(reward: Ocr, shown: list[Sample]) -> dict[str, Quartiles]:
    """Images per second of one core's time: the whole reward, finding text, and reading what was found."""
    images_BCHW, prompts = to_images([sample.picture for sample in shown]), [sample.prompt for sample in shown]
    pixels_BHWC = (images_BCHW * 255).byte().permute(0, 2, 3, 1).flip(-1).contiguous().numpy()
    crops = [reward.reader.detect_and_crop(pixels_HWC, {})[0] for pixels_HWC in pixels_BHWC]
    runs: dict[str, Callable[[], object]] = {
        "whole": lambda: reward(images_BCHW, prompts),
        "detection": lambda: [reward.reader.detect_and_crop(pixels_HWC, {}) for pixels_HWC in pixels_BHWC],
        "recognition": lambda: [reward.reader.recognize_txt(of_image) for of_image in crops],
    }
    speed: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            # time that other programs take of the core does not count
            start = time.process_time()
            run()
            speed[name].append(len(shown) / (time.process_time() - start))
    return {name: quartiles(values) for name, values in speed.items()}


def report(rows: list[dict], speed: dict[str, Quartiles], num_texts: int) -> str:
    graded = [
        [row["view"], row["kind"], f"{row['mean']:.3f}", f"{row['expected']:.3f}", f"{row['exactly_expected']:.0%}"]
        for row in rows
    ]
    timed = [[name, f"{one.median:.2f} [{one.lower:.2f}, {one.upper:.2f}]"] for name, one in speed.items()]
    return (
        f"{num_texts} texts of two or three words, one a line, {SIZE} x {SIZE}, slopes up to 4 degrees; expected is "
        "what follows from the spelling alone, and the last column how many rewards are exactly that.  Blurred: a "
        "Gaussian of 1.5 pixels; JPEG: quality 30.  Autoencoder: encoded and decoded by the embedded model's, "
        "which was trained on 64 x 64 scenes of colored shapes and has never seen a letter: it tells what a weak "
        "decoder does to writing, and nothing about images that a model drew.\n\n"
        + table(["view", "text", "mean reward", "expected", "exactly as expected"], graded)
        + f"\n\nImages a second of one core's time, {_TIMED_PICTURES} exact texts, {_ROUNDS} rounds, quartiles:"
        "\n\n" + table(["stage", "images/s"], timed)
    )


def contact_sheet(drawn: list[Sample], rewards: dict[str, list[float]]) -> Image.Image:
    """One row a view of each of the first texts, one column a kind, with the reward below."""
    num_kinds = len({sample.kind for sample in drawn})
    cell, font = _THUMBNAIL + 24, ImageFont.load_default(12)
    sheet = Image.new("RGB", (num_kinds * _THUMBNAIL, _SHOWN_TEXTS * len(VIEWS) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for index, sample in enumerate(drawn[: _SHOWN_TEXTS * num_kinds]):
        for row, view in enumerate(VIEWS):
            x, y = index % num_kinds * _THUMBNAIL, (index // num_kinds * len(VIEWS) + row) * cell
            thumbnail = seen(sample.picture, view).resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
            sheet.paste(thumbnail, (x, y))
            told = f"{view}, {sample.kind}: {rewards[view][index]:.3f}"
            draw.text((x + 4, y + _THUMBNAIL + 4), told, fill="black", font=font)
    # few colors: noise makes a PNG of them all megabytes
    return sheet.quantize(256)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
