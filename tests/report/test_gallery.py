"""Images before and after: what is kept of an evaluation, what of it fits a page, and what a search saw."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.evaluation import statistics
from fastgrpo.records.gallery import read_galleries, save_gallery
from fastgrpo.report.gallery import ALL_PROMPTS, gallery_page
from fastgrpo.report.run import read_runs
from fastgrpo.report.search import MOST_ITERATIONS, search_page
from tests.report.made_run import PROMPTS, color_of, evaluation_of, make_record, make_run, rows_of, searched


def test_images_are_kept_to_the_pixel_with_their_prompts_and_scores(tmp_path: Path) -> None:
    save_gallery(tmp_path, 2, evaluation_of(2, PROMPTS))
    save_gallery(tmp_path, 10, evaluation_of(10, PROMPTS))
    first, second = read_galleries(tmp_path)
    assert (first.iteration, second.iteration) == (2, 10)
    assert [shown.prompt for shown in first.images] == list(PROMPTS)
    for place, shown in enumerate(second.images):
        pixels = np.asarray(Image.open(shown.path))
        assert pixels.shape == (8, 8, 3)
        assert (pixels == (color_of(10, place) * 255).round().to(torch.uint8).numpy()).all()
        # what is not finite is not JSON
        assert shown.scores == {"shapes": pytest.approx(place / 10 + 0.1), "strict": None}
        assert shown.verified is (place % 2 == 0)
    assert first.statistics["shapes"] == pytest.approx({"mean": 0.12, "standard_error": 0.1 / 3**0.5})
    assert first.statistics["strict"] == {"mean": None, "standard_error": None}


def test_large_images_are_kept_small(tmp_path: Path) -> None:
    result = evaluation_of(0, ["wide"], size=8)
    noise = torch.rand(3, 512, 1024, generator=torch.Generator().manual_seed(0))
    object.__setattr__(result, "images", [noise])
    save_gallery(tmp_path, 0, result)
    ((shown,),) = (gallery.images for gallery in read_galleries(tmp_path))
    assert shown.path.suffix == ".jpg"
    assert Image.open(shown.path).size == (256, 128)
    assert shown.path.stat().st_size < 40_000


def test_the_standard_error_is_over_prompts() -> None:
    """Means of prompts 0, 1, 2: std 1, by sqrt(3); of one prompt nothing is known."""
    scores_PG = torch.tensor([[0.0, 0.0], [0.5, 1.5], [2.0, 2.0]])
    assert statistics(scores_PG) == pytest.approx({"mean": 1.0, "standard_error": 1 / 3**0.5})
    assert statistics(scores_PG[:1]) == {"mean": 0.0, "standard_error": None}


def test_a_page_that_would_be_large_keeps_the_first_the_last_and_the_best_evaluation(tmp_path: Path) -> None:
    rows = rows_of(40)
    # better than the last one
    rows[26]["eval/shapes"] = 9.0
    (run,) = read_runs([make_run(tmp_path / "run", rows=rows, is_finished=False)])
    whole = gallery_page([run])
    assert whole.data["steps"] == list(range(0, 41, 2))
    assert whole.remarks == []
    size = sum(shown.path.stat().st_size for gallery in run.galleries for shown in gallery.images)
    page = gallery_page([run], most_bytes=size // 4)
    assert {0, 26, 40} <= {*page.data["steps"]}
    assert len(page.data["steps"]) == 6
    assert page.remarks == [
        "6 of 21 evaluations and 2 of 3 prompts are shown, so that the page stays small; all are in "
        f"{run.directory.images}"
    ]
    assert [prompt for prompt, _ in page.cards] == list(PROMPTS[:2])
    # however little there may be
    assert gallery_page([run], most_bytes=1).data["steps"] == [0, 40]


def test_a_prompt_that_is_given_twice_has_two_cards(tmp_path: Path) -> None:
    page = gallery_page(read_runs([make_run(tmp_path / "run", prompts=("a", "b", "a"), is_finished=False)]))
    assert [prompt for prompt, _ in page.cards] == ["a", "b", "a"]
    for place, card in enumerate(page.data["cards"]):
        assert [entry[0] for entry in card["0"]] == [0, 2, 4]
        assert [entry[2]["shapes"] for entry in card["0"]] == pytest.approx([place / 10 + i / 100 for i in (0, 2, 4)])


def test_of_an_earlier_versions_run_the_grids_are_shown(tmp_path: Path) -> None:
    run_path = make_run(tmp_path / "run", is_finished=False)
    for scores in run_path.glob("images/*/scores.json"):
        scores.unlink()
    page = gallery_page(read_runs([run_path]))
    assert page.is_grid
    assert page.cards == [(ALL_PROMPTS, [0])]
    assert page.data["steps"] == [0, 2, 4]
    # beside one that has them, it is told where they are
    both = read_runs([run_path, make_run(tmp_path / "other", is_finished=False)])
    page = gallery_page(both)
    assert not page.is_grid
    assert [numbers for _, numbers in page.cards] == [[1]] * 3
    assert page.remarks == [
        f"run: its images were not kept one by one; grids of them are in {both[0].directory.images}"
    ]


def test_a_file_outside_the_run_is_never_shown(tmp_path: Path) -> None:
    run_path = make_run(tmp_path / "run", is_finished=False)
    (tmp_path / "secret.png").write_bytes(b"secret")
    scores = run_path / "images/evaluation_000004/scores.json"
    said: dict[str, Any] = json.loads(scores.read_text())
    said["images"][0]["file"] = "../../../secret.png"
    scores.write_text(json.dumps(said))
    (run,) = read_runs([run_path])
    assert len(run.galleries) == 3
    page = gallery_page([run])
    assert [entry[0] for entry in page.data["cards"][0]["0"]] == [0, 2]


def columns_of(plot: Any) -> list[dict[str, Any]]:
    """Of all that is drawn in a plot."""
    return [renderer.data_source.data for renderer in plot.renderers]


def test_the_searchs_dots_are_the_recorded_scores(tmp_path: Path) -> None:
    """Of two of three prompts two rounds of three, one of them not finite; chosen were 0.4 and 0.3."""
    (run,) = read_runs([make_run(tmp_path / "run", searches=(1, 3), is_finished=False)])
    row = run.searches[1]
    assert row["iteration"] == 3
    assert [group["prompt"] for group in row["groups"]] == list(PROMPTS[:2])
    assert row["groups"][1] == {
        "prompt": PROMPTS[1],
        "rounds": [[0.1, 0.3, 0.2], [0.25, None, 0.4]],
        "chosen": [0.4, 0.3],
        "rewards": [0.35, 0.45],
    }
    page = search_page(run)
    assert page is not None
    assert not page.is_of_images
    seen, chosen, images = columns_of(page.scores)
    assert seen["y"] == [0.1, 0.3, 0.2, 0.25, 0.4] * 4
    assert seen["which"] == (["round 1"] * 3 + ["round 2"] * 2) * 4
    assert chosen["y"] == [0.4, 0.3] * 4
    assert images["y"] == [0.35, 0.45] * 4
    assert images["iteration"] == [1] * 4 + [3] * 4
    # a group's dots lie about one place, and no two groups share it
    assert [round(x) for x in images["x"]] == [0] * 4 + [1] * 4
    assert len({*chosen["x"]}) == 4
    assert page.scatter is not None
    _, dots = columns_of(page.scatter)
    assert list(zip(dots["x"], dots["y"], strict=True)) == [(0.4, 0.35), (0.3, 0.45)] * 4


def test_a_search_by_whole_images_and_one_whose_choice_nothing_scored_are_told_apart(tmp_path: Path) -> None:
    noise, rewards = searched(3)
    for kind, scored in (
        ("images", tuple(replace(one, is_of_images=True) for one in noise.scored)),
        ("estimates", noise.scored),
    ):
        record = make_record(tmp_path / kind)
        record.search(1, PROMPTS, replace(noise, scored=scored, estimates_PG=None), rewards)
        (run,) = read_runs([tmp_path / kind])
        page = search_page(run)
        assert page is not None
        assert page.is_of_images == (kind == "images")
        assert page.scatter is None
        seen, images = columns_of(page.scores)
        assert {*seen["which"]} == ({"attempt 1", "attempt 2"} if kind == "images" else {"round 1", "round 2"})
        assert images["y"] == pytest.approx([0.35, 0.45] * 2)


def test_of_a_long_search_some_iterations_are_drawn(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "run", rows=rows_of(40), searches=range(1, 40), is_finished=False)])
    page = search_page(run)
    assert page is not None
    assert page.said == f"{MOST_ITERATIONS} of 39 recorded iterations"
    iterations = columns_of(page.scores)[2]["iteration"]
    assert (iterations[0], iterations[-1], len({*iterations})) == (1, 39, MOST_ITERATIONS)
    assert search_page(read_runs([make_run(tmp_path / "other", is_finished=False)])[0]) is None
