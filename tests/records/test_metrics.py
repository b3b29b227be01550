"""What a run writes can be read back: rows, scalars, pixels, curves, summary; a resumed run writes it without seams."""

import importlib.util
import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.records.grids import cell_origin, enlargement
from fastgrpo.records.json_lines import read_rows
from fastgrpo.records.metrics import METRICS, Metrics
from fastgrpo.records.progress import Progress
from fastgrpo.records.record import Record
from fastgrpo.records.stragglers import Stragglers

PROMPTS = ["a red circle", "three green triangles", "a blue square left of a yellow circle", "ü"]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", resume=False)


@pytest.fixture
def metrics(run: RunDirectory) -> Metrics:
    return Metrics(run, tensorboard=False)


def colors(size: int = 64) -> torch.Tensor:
    """Four images: red, green, blue, and one whose top left pixel alone is white."""
    images_BCHW = torch.zeros(4, 3, size, size)
    for index in range(3):
        images_BCHW[index, index] = 1.0
    images_BCHW[3, :, 0, 0] = 1.0
    return images_BCHW


def test_every_key_of_a_run_is_explained() -> None:
    keys = "iteration images seconds reward/strict reward/total reward/group_std eval/strict loss kl ratio_deviation"
    keys += " clip_fraction grad_norm images_per_second peak_bytes search/gain search/rank_correlation"
    keys += " zero_variance_groups skipped_steps seconds/iteration seconds/encode seconds/search seconds/rollout"
    keys += " seconds/reward seconds/update seconds/evaluate seconds/checkpoint"
    assert {key if key in METRICS else f"{key.split('/')[0]}/<name>" for key in keys.split()} <= METRICS.keys()


def test_rows_are_on_disk_as_soon_as_they_are_logged(run: RunDirectory, metrics: Metrics) -> None:
    metrics.log(1, {"loss": 0.1, "images": 96, "kl": 0.5})
    assert json.loads(run.metrics.read_text()) == {"iteration": 1, "loss": 0.1, "images": 96, "kl": 0.5}


def test_numbers_that_are_not_finite_are_null_and_named(run: RunDirectory, metrics: Metrics) -> None:
    metrics.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "kl": 0.0})
    text = run.metrics.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    row = {"iteration": 1, "loss": None, "grad_norm": None, "kl": 0.0, "nonfinite": ["grad_norm", "loss"]}
    assert read_rows(run.metrics) == [row]


@pytest.mark.parametrize(
    "tail", ["", '{"iteration": 6, "lo', '{"iteration": 6}', "\0\0\0\n", '[1]\n{"iteration": 3}\n']
)
def test_a_resumed_run_continues_the_rows_without_a_seam(run: RunDirectory, metrics: Metrics, tail: str) -> None:
    for iteration in range(1, 6):
        metrics.log(iteration, {"loss": iteration})
    with open(run.metrics, "a") as file:
        file.write(tail)
    metrics.truncate_to(3)
    metrics.log(4, {"loss": 4.5})
    assert [(row["iteration"], row["loss"]) for row in read_rows(run.metrics)] == [(1, 1), (2, 2), (3, 3), (4, 4.5)]


def test_a_half_written_last_line_alone_is_dropped_with_a_warning(
    run: RunDirectory, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    metrics.log(1, {"loss": 1.0})
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole + b'{"iteration": 2')
    with caplog.at_level(logging.WARNING):
        metrics.truncate_to(5)
    assert run.metrics.read_bytes() == whole
    assert "is not whole" in caplog.text


def test_truncating_before_anything_was_written_is_no_error(run: RunDirectory, metrics: Metrics) -> None:
    metrics.truncate_to(0)
    assert read_rows(run.metrics) == []


def test_a_file_that_cannot_be_written_is_named(run: RunDirectory, metrics: Metrics) -> None:
    run.metrics.mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*metrics\.jsonl"):
        metrics.log(1, {"loss": 1.0})


def test_tensorboard_has_the_scalars_and_forgets_those_after_a_resume(run: RunDirectory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(run) as metrics:
        for iteration in (1, 2, 3):
            metrics.log(iteration, {"loss": iteration / 2, "kl": float("nan")})
        metrics.evaluation_grid(3, colors(), PROMPTS)
    with Metrics(RunDirectory.create(run.path, resume=True)) as metrics:
        metrics.truncate_to(2)
        metrics.log(3, {"loss": 9.0})
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert "kl" not in events.Tags()["scalars"]


def test_wandb_asked_for_and_missing_names_the_extra(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'fastgrpo\[wandb\]'"):
        Metrics(run, tensorboard=False, wandb_project="shapes")


def test_wandb_is_given_scalars_grids_and_the_report_under_one_id_of_the_run(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, Any]] = []
    logger = SimpleNamespace(
        log=lambda values, step: calls.append((sorted(values), step)), finish=lambda: calls.append(("finish", None))
    )
    ids: list[str] = []

    def init(**options: Any) -> Any:
        ids.append(options["id"])
        return logger

    pages: list[tuple[str, bool]] = []
    wandb = SimpleNamespace(
        init=init, Image=lambda image: image, Html=lambda file, inject: pages.append((file.read(), inject))
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (run.path / "page.html").write_text("<p>ü</p>", encoding="utf-8")
    for _ in range(2):
        with Metrics(run, tensorboard=False, wandb_project="shapes") as metrics:
            metrics.log(1, {"loss": 1.0, "kl": float("inf")})
            metrics.evaluation_grid(1, colors(), PROMPTS)
            metrics.page(7, "report", run.path / "page.html")
    grids = [(["evaluation"], 1), (["before_after"], 1)]
    assert calls == [(["loss"], 1), *grids, (["report"], 7), ("finish", None)] * 2
    assert pages == [("<p>ü</p>", False)] * 2
    assert ids[0] == ids[1]


@pytest.mark.parametrize("size", [64, 40, 100])
def test_a_grid_shows_each_image_enlarged_at_its_place(metrics: Metrics, size: int) -> None:
    page = np.asarray(
        Image.open(metrics.evaluation_grid(7, colors(size), PROMPTS, verified=[True, False, True, False]))
    )
    scale = enlargement(size, size)
    assert size * scale >= 96
    for index, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        x, y = cell_origin(index, 4, 1, size, size)
        assert (page[y : y + size * scale, x : x + size * scale] == color).all()
        assert (page[y - 1, x : x + size] == 255).all()
    x, y = cell_origin(3, 4, 1, size, size)
    assert (page[y : y + scale, x : x + scale] == 255).all()
    assert (page[y + scale, x : x + scale] == 0).all()


def test_each_label_stands_below_its_image_with_its_mark(metrics: Metrics) -> None:
    page = np.asarray(Image.open(metrics.evaluation_grid(0, colors(), PROMPTS, verified=[True, False, True, False])))
    marks = []
    for index in range(4):
        x, y = cell_origin(index, 4, 1, 64, 64)
        mark = page[y + 131 : y + 146, x : x + 13].reshape(-1, 3).astype(int)
        marks.append("green" if (mark[:, 1] > mark[:, 0] + 60).any() else "red")
        label = page[y + 131 : y + 176, x + 14 : x + 128]
        assert (label < 100).any(), "the label's text is drawn"
        assert (page[y + 128 : y + 176, x + 129 : x + 138] == 255).all(), "the text stays within its cell"
    assert marks == ["green", "red", "green", "red"]


def test_before_and_after_stand_side_by_side_also_after_a_resume(run: RunDirectory, metrics: Metrics) -> None:
    metrics.evaluation_grid(0, colors(), PROMPTS)
    resumed = Metrics(RunDirectory.create(run.path, resume=True), tensorboard=False)
    resumed.evaluation_grid(10, 1.0 - colors(), PROMPTS)
    page = np.asarray(Image.open(run.images / "before_after.png"))
    x, y = cell_origin(0, 4, 2, 64, 64)
    assert tuple(page[y + 5, x + 5]) == (255, 0, 0)
    assert tuple(page[y + 5, x + 128 + 4 + 5]) == (0, 255, 255)


def test_images_of_unlike_sizes_stand_in_equal_cells_with_gray_around(run: RunDirectory, metrics: Metrics) -> None:
    sizes = [(64, 96), (128, 32), (64, 96), (16, 16)]
    images = [torch.full((3, *size), shade) for size, shade in zip(sizes, (0.0, 0.2, 0.4, 0.6), strict=True)]
    page = np.asarray(Image.open(metrics.evaluation_grid(0, images, PROMPTS)))
    # the cell is 128 high and 96 wide, whose shorter side is large enough
    for index, ((height, width), shade) in enumerate(zip(sizes, (0, 51, 102, 153), strict=True)):
        x, y = cell_origin(index, 4, 1, 128, 96)
        cell = page[y : y + 128, x : x + 96].copy()
        top, left = (128 - height) // 2, (96 - width) // 2
        assert (cell[top : top + height, left : left + width] == shade).all()
        cell[top : top + height, left : left + width] = 226
        assert (cell == 226).all()
    # read back by a resumed run, where another size came in the place of the second
    resumed = Metrics(RunDirectory.create(run.path, resume=True), tensorboard=False)
    images[1] = torch.ones(3, 32, 160)
    resumed.evaluation_grid(10, images, PROMPTS)
    page = np.asarray(Image.open(run.images / "before_after.png"))
    x, y = cell_origin(1, 4, 2, 128, 160)
    assert (page[y : y + 128, x + 64 : x + 96] == 51).all()
    assert (page[y + 48 : y + 80, x + 164 : x + 324] == 255).all()


def test_changed_evaluation_prompts_start_before_and_after_anew(
    run: RunDirectory, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    metrics.evaluation_grid(0, colors(), PROMPTS)
    metrics.evaluation_grid(1, 1.0 - colors()[:1], ["another"])
    page = np.asarray(Image.open(run.images / "before_after.png"))
    x, y = cell_origin(0, 1, 2, 64, 64)
    assert tuple(page[y + 5, x + 5]) == (0, 255, 255)
    assert "starts anew" in caplog.text


def test_before_of_a_run_that_an_earlier_version_began_is_kept(
    run: RunDirectory, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    first_BHWC = (colors() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.save(run.images / ".first.npy", first_BHWC, allow_pickle=False)
    (run.images / ".first.json").write_text(json.dumps(PROMPTS))
    for iteration in (10, 20):
        metrics.evaluation_grid(iteration, 1.0 - colors(), PROMPTS)
        page = np.asarray(Image.open(run.images / "before_after.png"))
        x, y = cell_origin(0, len(PROMPTS), 2, 64, 64)
        assert tuple(page[y + 5, x + 5]) == tuple(first_BHWC[0, 5, 5])
    assert caplog.text == ""
    # another first evaluation comes before it
    metrics.evaluation_grid(30, 1.0 - colors()[:1], ["another"])
    metrics.evaluation_grid(40, colors()[:1], ["another"])
    page = np.asarray(Image.open(run.images / "before_after.png"))
    x, y = cell_origin(0, 1, 2, 64, 64)
    assert tuple(page[y + 5, x + 5]) == tuple(255 - first_BHWC[0, 5, 5])
    assert caplog.text.count("starts anew") == 1


def test_odd_pixels_and_odd_labels_are_drawn(metrics: Metrics) -> None:
    images_BCHW = torch.tensor([float("nan"), -3.0, 7.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    page = np.asarray(Image.open(metrics.evaluation_grid(0, images_BCHW, ["x" * 500 + "\n猫 " * 99])))
    x, y = cell_origin(0, 1, 1, 64, 64)
    assert tuple(page[y, x]) == (0, 0, 255)
    assert (page[:, x + 129 :] == 255).all()


def test_a_label_for_each_image_is_asked_for(metrics: Metrics) -> None:
    with pytest.raises(ValueError, match="give one an image"):
        metrics.evaluation_grid(0, colors(), ["only one"])


ROWS: list[dict[str, Any]] = [
    {"iteration": 0, "seconds": 0.0, "eval/strict": 0.42},
    {"iteration": 1, "seconds": 2.0, "images": 96, "reward/total": 0.5, "kl": None, "images_per_second": 10.0},
    {"iteration": 2, "seconds": 3.0, "images": 192, "reward/total": 0.6, "images_per_second": 50.0, "peak_bytes": 7},
    {"iteration": 3, "seconds": 4.0, "images": 288, "images_per_second": 48.0, "eval/strict": 0.6, "skipped_steps": 2},
]


def test_the_summary_states_first_and_last_evaluation_speed_and_machine(run: RunDirectory, metrics: Metrics) -> None:
    for row in ROWS:
        values = {name: float("nan") if value is None else value for name, value in row.items() if name != "iteration"}
        metrics.log(row["iteration"], values)
    assert metrics.finish() == json.loads(run.summary.read_text())
    summary = json.loads(run.summary.read_text())
    assert summary["first_evaluation"] == {"iteration": 0, "seconds": 0.0, "eval/strict": 0.42}
    assert summary["last_evaluation"] == {"iteration": 3, "seconds": 4.0, "eval/strict": 0.6}
    keys = ("iterations", "images", "seconds", "images_per_second", "peak_bytes", "skipped_steps")
    assert [summary[key] for key in keys] == [3, 288, 4.0, 48.0, 7, 2]
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["hardware"]["cpu_cores"] >= 1
    assert run.curves.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_logged_nothing_has_a_summary_too(metrics: Metrics) -> None:
    summary = metrics.finish()
    assert (summary["iterations"], summary["first_evaluation"], summary["images_per_second"]) == (0, None, None)


def test_a_taken_directory_is_refused_unless_resuming(run: RunDirectory, metrics: Metrics) -> None:
    # an empty one, as Hydra makes, is not taken
    assert RunDirectory.create(run.path, resume=False) == run
    metrics.log(1, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"run already holds a run; continue it with resume=true or give a new name="):
        RunDirectory.create(run.path, resume=False)
    assert RunDirectory.create(str(run.path), resume=True) == run


def test_a_directory_in_use_by_another_process_is_refused_until_that_dies(tmp_path: Path) -> None:
    code = (
        "import sys, time; from fastgrpo.files.run_directory import RunDirectory;"
        "run = RunDirectory.create(sys.argv[1], resume=True); print('holds it', flush=True); time.sleep(600)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds it\n"
        with pytest.raises(ValueError, match=r"another process is writing the run in .*; wait for it, stop it"):
            RunDirectory.create(tmp_path, resume=True)
        process.kill()
    assert RunDirectory.create(tmp_path, resume=True).path == tmp_path


@pytest.mark.parametrize("path", ["file", "file/run", "/proc/no/run"])
def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write the run directory .*; set output"):
        RunDirectory.create(tmp_path / path, resume=False)


@pytest.mark.parametrize("module", ["wandb", "torch.utils.tensorboard"])
def test_metrics_can_be_imported_without_its_optional_writers(module: str) -> None:
    spec = importlib.util.find_spec("fastgrpo.records.metrics")
    assert spec is not None
    assert spec.origin is not None
    top_level = [line for line in Path(spec.origin).read_text().splitlines() if line.startswith(("import", "from"))]
    assert not any(module in line for line in top_level)


def clock_of(times: list[float]) -> Any:
    return iter(times).__next__


def test_a_log_file_gets_the_first_line_every_nth_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"images_per_second": 23.44, "reward/total": 0.6123}
    with Progress(12, first=2, every=5, clock=clock_of([0.0, 10.0, 80.0, 200.0, 100.0])) as progress:
        for iteration in range(3, 13):
            progress.update(iteration, values | ({"eval/strict": 0.5} if iteration == 4 else {}))
            progress._clock = lambda: 80.0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "1:30 left  iteration 3/12  reward 0.612  23.4 images/s",
        "3:07 left  iteration 5/12  reward 0.612  eval/strict 0.500  23.4 images/s",
        "0:20 left  iteration 10/12  reward 0.612  eval/strict 0.500  23.4 images/s",
        "0:00 left  iteration 12/12  reward 0.612  eval/strict 0.500  23.4 images/s",
    ]


def test_a_run_with_a_time_limit_counts_down_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, max_seconds=60.0, every=100, clock=clock_of([0.0, 10.0, 20.0, 70.0])) as progress:
        for iteration, seconds in ((1, 8.0), (2, 16.0), (3, 61.0)):
            progress.update(iteration, {"seconds": seconds})
    assert capsys.readouterr().out.splitlines() == ["0:52 left  iteration 1/1000", "0:00 left  iteration 3/1000"]


def test_a_line_fits_a_terminal_of_80_columns_and_begins_with_the_time_left() -> None:
    values = {"reward/total": 0.5, "images_per_second": 12.3}
    values |= {f"eval/{name}": 0.25 for name in ("pick_score", "image_reward", "shapes_strict")}
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    with Progress(120, console=console, clock=clock_of([0.0, 4.0])) as progress:
        progress.update(1, values)
    shown = next(line for line in screen.getvalue().splitlines() if "iteration" in line)
    shown = shown[shown.index("7:56") :].rstrip("━╸╺ ")
    # what is watched comes first, and what does not fit is left out whole
    assert shown == "7:56 left  iteration 1/120  reward 0.500  eval/shapes_strict 0.250"
    assert len(shown) < 80


def test_what_is_done_before_the_first_iteration_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(5, clock=clock_of([0.0])) as progress:
        progress.say("evaluating before training")
    assert capsys.readouterr().out.splitlines() == ["iteration 0/5  evaluating before training"]


def test_tensorboard_has_the_config(run: RunDirectory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(run, config={"train": {"group_size": 16}, "name": "ü"}) as metrics:
        # as a run does before it begins, which hides what was written before
        metrics.truncate_to(-1)
        metrics.log(0, {"loss": 1.0})
    events = EventAccumulator(str(run.tensorboard)).Reload()
    (tag,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("config")]
    text = events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
    assert text == "    train:\n      group_size: 16\n    name: ü"


def test_a_run_that_fails_says_so_in_its_summary_and_one_that_goes_on_no_more(run: RunDirectory) -> None:
    def record() -> Record:
        metrics = Metrics(run, tensorboard=False, config={"train": {"iterations": 1, "max_minutes": 9.0}})
        return Record(directory=run, metrics=metrics, stragglers=Stragglers(path=run.ranks, hosts=["here"]))

    with pytest.raises(RuntimeError), record().open(1, 0, 9.0):
        raise RuntimeError("the disk\nis full")
    assert json.loads(run.summary.read_text())["error"] == "RuntimeError: the disk is full"
    assert json.loads(run.summary.read_text())["state"] == "failed"
    again = record()
    with again.open(1, 0, 9.0):
        assert not run.summary.exists()
        again.row(1, {"seconds": 2.0, "loss": 1.0})
        again.finish()
    summary = json.loads(run.summary.read_text())
    assert (summary["state"], summary["error"]) == ("finished", None)


def test_scores_of_prompts_are_kept_and_forgotten_with_the_iterations_they_are_of(
    run: RunDirectory, metrics: Metrics
) -> None:
    for iteration in (0, 2, 4):
        metrics.scores(iteration, {"a": torch.full((2, 3), float(iteration))})
    metrics.truncate_to(3)
    assert read_rows(run.evaluations) == [{"iteration": n, "means": {"a": [float(n)] * 2}} for n in (0, 2)]


def test_a_terminal_gets_one_line_that_is_drawn_again() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    with Progress(2, console=console, clock=clock_of([0.0, 4.0, 8.0])) as progress:
        progress.update(1, {"reward/total": 0.25})
        progress.update(2, {"reward/total": 0.75})
    assert "0:04 left  iteration 1/2  reward 0.250" in screen.getvalue()
    assert "0:00 left  iteration 2/2  reward 0.750" in screen.getvalue()
    assert screen.getvalue().count("\n") == 1


def test_the_readme_explains_every_metric_in_the_same_words() -> None:
    readme = (Path(__file__).parents[2] / "fastgrpo" / "algorithm" / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{key}` | {meaning} |" in readme for key, meaning in METRICS.items())
