"""``fastgrpo.sample`` and ``fastgrpo.evaluate`` in memory are what the commands write."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgrpo
from fastgrpo import cli
from fastgrpo.records.grids import draw_grid, to_uint8
from tests.library.runs import brightness, lora, words

TEXTS = ["a red circle", "two blue squares"]
FEW = ("num_steps=2", "images_per_prompt=3", "runtime.device=cpu")


@pytest.fixture(scope="module")
def run(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> fastgrpo.Run:
    return fastgrpo.train(*words(tiny_weights, tmp_path_factory.mktemp("runs") / "run"))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("search", [(), ("search=true", "budget=8", "reward=jpeg_incompressibility")], ids=len)
def test_images_are_those_of_the_command(search: tuple[str, ...], run: fastgrpo.Run, tmp_path: Path) -> None:
    made = run.sample(TEXTS, *FEW, *search)
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    line = [*FEW, *search, f"run={run.path}", f"prompts.path={tmp_path / 'prompts.txt'}", f"output={tmp_path / 'c'}"]
    assert cli.main(["sample", *line]) == 0
    assert files(made.save(tmp_path / "function")) == files(tmp_path / "c")
    assert made.prompts == TEXTS
    assert made.images_BCHW.shape == (6, 3, *made.images[0].shape[2:])
    assert 0 <= made.images_BCHW.min() < made.images_BCHW.max() <= 1
    assert f"6 images of 2 prompts, of the averaged weights of {run.path}" in repr(made)
    assert made._repr_png_() == (tmp_path / "c/grid.png").read_bytes()
    with pytest.raises(ValueError, match="is not empty"):
        made.save(tmp_path / "function")


def test_a_search_maximizes_a_function_and_says_what_it_found(run: fastgrpo.Run) -> None:
    reward = lambda images, prompts: brightness(images, prompts)  # noqa: E731
    found = run.sample(TEXTS, *FEW, "search=true", "budget=8", reward=reward)
    plain = run.sample(TEXTS, *FEW)
    assert plain.scores_PG is None
    assert plain.search is None
    assert found.scores_PG is not None
    assert found.search is not None
    assert found.search["maximized"] == {"custom": 1.0}
    expected_PG = torch.stack([brightness(images_GCHW, []) for images_GCHW in found.images])
    torch.testing.assert_close(found.scores_PG, expected_PG, rtol=0, atol=1e-6)
    # the first candidate is the plain image
    assert (found.scores_PG >= torch.stack([brightness(images, []) for images in plain.images]) - 1e-6).all()
    assert found.scores_PG.sum() > brightness(plain.images_BCHW, []).sum()
    pixels = [to_uint8(image_CHW) for image_CHW in found.images_BCHW]
    labels = [text for text in TEXTS for _ in range(3)]
    assert found.grid() == draw_grid(pixels, labels, scores=found.scores_PG.flatten().tolist())


def test_what_a_row_says_beside_its_prompt_reaches_a_function() -> None:
    rows = [{"prompt": "a red circle", "wanted": sign} for sign in (1.0, -1.0)]
    reward = lambda images, prompts, metadata: [  # noqa: E731
        row["wanted"] * float(brightness(image[None], [])) for image, row in zip(images, metadata, strict=True)
    ]
    found = fastgrpo.sample(rows, *FEW, "search=true", "budget=8", reward=reward)
    assert found.scores_PG is not None
    expected_PG = torch.stack([brightness(images_GCHW, []) for images_GCHW in found.images])
    torch.testing.assert_close(found.scores_PG, expected_PG * torch.tensor([[1.0], [-1.0]]), rtol=0, atol=1e-6)
    judged = fastgrpo.evaluate("runtime.device=cpu", "evaluate.num_steps=2", prompts=rows, reward=reward)
    assert judged.scores_PG["custom"][0].gt(0).all()
    assert judged.scores_PG["custom"][1].lt(0).all()


def test_a_text_is_one_prompt_and_sizes_may_differ(tmp_path: Path) -> None:
    one = fastgrpo.sample("a red circle", *FEW)
    mixed = fastgrpo.sample(["a red circle", {"prompt": "a red circle", "resolution": 32}], *FEW)
    assert torch.equal(one.images_BCHW, mixed.images[0])
    assert [tuple(images.shape[2:]) for images in mixed.images] == [(64, 64), (32, 32)]
    with pytest.raises(ValueError, match=r"several sizes; take them from \.images"):
        _ = mixed.images_BCHW
    assert len(files(mixed.save(tmp_path / "mixed"))) == 7


def test_an_evaluation_is_that_of_the_command(
    run: fastgrpo.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("evaluate.num_steps=2", "evaluate.images_per_prompt=2", "reward=jpeg_incompressibility")
    found = run.evaluate(*few, prompts=TEXTS)
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    where = [f"run={run.path}", f"prompts.held_out={tmp_path / 'prompts.txt'}", f"output={tmp_path / 'command'}"]
    capsys.readouterr()
    assert cli.main(["evaluate", *few, *where, "base=false"]) == 0
    shown = capsys.readouterr().out
    assert found.report == json.loads((tmp_path / "command/evaluation.json").read_text())
    assert files(found.save(tmp_path / "function")) == files(tmp_path / "command")
    assert found._repr_png_() == (tmp_path / "command/grid.png").read_bytes()
    assert repr(found) in shown
    scores_PG = found.scores_PG["jpeg"].double()
    assert found.means == {"jpeg": pytest.approx(scores_PG.mean().item())}
    means_P = scores_PG.mean(dim=1)
    error = (means_P[0] - means_P[1]).abs().item() / 2
    assert found.standard_errors == {"jpeg": pytest.approx(error)}


def test_an_evaluation_by_a_function_judges_the_images_that_it_shows(run: fastgrpo.Run) -> None:
    few = ("evaluate.num_steps=2", "evaluate.images_per_prompt=1")
    found = fastgrpo.evaluate(*few, run=run, prompts=TEXTS, reward=lambda images, prompts: brightness(images, prompts))
    expected = brightness(torch.stack(found.result.images), [])
    torch.testing.assert_close(found.scores_PG["custom"][:, 0], expected, rtol=0, atol=1e-6)


def test_an_export_is_that_of_the_command(run: fastgrpo.Run, tmp_path: Path) -> None:
    assert run.export(tmp_path / "function") == tmp_path / "function"
    assert cli.main(["export", f"run={run.path}", f"output={tmp_path / 'command'}"]) == 0
    assert lora(tmp_path / "function") == lora(tmp_path / "command") == lora(run.path)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fastgrpo.sample("a", "output=x"), r"output=x: images are returned; sample\(\.\.\.\)\.save"),
        (lambda: fastgrpo.sample("a", "prompt=b"), "prompt=b: prompts are the first argument"),
        (lambda: fastgrpo.sample("a", "prompts.path=b"), "prompts are the first argument"),
        (lambda: fastgrpo.sample([]), "there is no prompt to sample"),
        (lambda: fastgrpo.sample("  "), "row 1: blank prompt"),
        (lambda: fastgrpo.sample("a", "run=x", run="y"), "run=x: the run is given as run='y' too"),
        (lambda: fastgrpo.sample("a", run="nowhere"), "run=nowhere is neither a run directory"),
        (lambda: fastgrpo.evaluate("output=x"), r"output=x: the evaluation is returned; evaluate\(\.\.\.\)\.save"),
        (lambda: fastgrpo.evaluate("prompts.held_out=x", prompts=["a"]), "these prompts are given as a list too"),
        (lambda: fastgrpo.evaluate("budgett=3"), "unknown key budgett; did you mean budget"),
    ],
)
def test_a_mistake_is_a_value_error(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
