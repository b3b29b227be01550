"""``python -m benchmarks.flow_grpo`` on a stand-in: all sides are checked as they are timed, and take turns."""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.flow_grpo import __main__ as command
from benchmarks.flow_grpo import agreement as agreements
from benchmarks.flow_grpo import measure
from benchmarks.flow_grpo.agreement import Agreement, Tolerance
from benchmarks.flow_grpo.checkout import Checkout
from benchmarks.flow_grpo.children import Work
from benchmarks.flow_grpo.measure import Entry, checked, timed
from benchmarks.flow_grpo.pipeline import Size
from benchmarks.flow_grpo.recipe import Job
from benchmarks.flow_grpo.setting import Setting
from benchmarks.flow_grpo.side import Iteration


@contextmanager
def in_this_process(sides: Mapping[str, Work]) -> Iterator[dict[str, Callable[[], Any]]]:
    """What ``children`` does, without the seconds that a process takes to import; a process is sent the work."""
    yield {name: pickle.loads(pickle.dumps(work))() for name, work in sides.items()}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_size: Size, job: Job) -> dict[str, Any]:
    """What the command writes."""
    written: dict[str, Any] = {}

    def write(theme: str, **report: Any) -> Path:
        written.update(report)
        (tmp_path / "report.md").write_text(report["body"])
        return tmp_path / "report.md"

    monkeypatch.setattr(command, "write_report", write)
    monkeypatch.setattr(command, "MINIATURE", tiny_size)
    monkeypatch.setattr(command, "make_pipeline", lambda *_: job.pipeline)
    monkeypatch.setattr(measure, "children", in_this_process)
    return written


AGREEMENT = Agreement(
    ratio_deviation=1e-7, gradient_difference=2e-6, tolerance=Tolerance(1e-5, 1e-5), trains_unconditional=False
)


ITERATION = Iteration(
    num_images=18, rollout_seconds=1.0, update_seconds=1.0, cpu_seconds=2.0, peak_bytes=1, ratio_deviation=0.0
)
CHECKED: list[tuple[str, str, str]] = []


def note_check(checkout: Checkout, job: Job, output: Path, overrides: Sequence[str], setting: Setting) -> Agreement:
    """In place of ``agreement``: what was to be checked."""
    CHECKED.append((job.recipe, " ".join(overrides), str(setting)))
    return replace(AGREEMENT, gradient_difference=len(CHECKED) * 1e-6)


def test_each_side_is_checked_as_it_is_timed_and_set_beside_its_like(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stand_in: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "agreement", note_check)
    CHECKED.clear()
    sides = ["--theirs", "bfloat16", "--ours", "model.dtype=bfloat16 train.gradients=reweight"]
    command.main(["--checkout", str(stand_in.path), "--recipes", "smart", "--rounds", "2", "--warm-up", "0", *sides])
    # theirs is timed, and so checked, on the recipe without a search
    assert CHECKED == [
        ("fast", "model.dtype=float32", "bfloat16"),
        ("smart", "model.dtype=bfloat16 train.gradients=reweight", "float32"),
    ]
    (result,) = report["data"]["results"]
    found = result["sides"]
    theirs, ours = "flow_grpo bfloat16", "ours model.dtype=bfloat16 train.gradients=reweight"
    assert list(found) == [theirs, ours]
    assert result["baseline"] == found[ours]["alike"] == theirs
    assert [side["setting"] for side in found.values()] == ["bfloat16", "bfloat16"]
    assert [side["agreement"]["gradient_difference"] for side in found.values()] == [1e-6, 2e-6]
    assert [len(side["iterations"]) for side in found.values()] == [2, 2]
    assert [one["num_images"] for side in found.values() for one in side["iterations"]] == [18] * 4
    assert f"- smart: {ours} is " in report["body"]
    assert f"x {theirs} [" in report["body"]
    assert ours in capsys.readouterr().out


def test_without_a_checkout_ours_is_compared_with_itself(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "timed", lambda entries, *_: {side: [ITERATION] * 2 for side in entries})
    command.main(["--recipes", "fast", "--ours", "runtime.micro_batch=6"])
    told = capsys.readouterr().out
    assert "no --checkout of flow_grpo was given" in told
    assert "- fast: ours runtime.micro_batch=6 is 1.00x ours, plain" in told
    assert "There was no checkout of flow_grpo" in told
    (result,) = report["data"]["results"]
    assert result["baseline"] == "ours, plain"
    assert [side["agreement"] for side in result["sides"].values()] == [None, None]


def holds() -> Agreement:
    return AGREEMENT


def differs() -> Agreement:
    return replace(AGREEMENT, gradient_difference=0.2)


def fails() -> Agreement:
    raise ValueError("no such override")


def make() -> Callable[[], Any]:
    raise AssertionError("nothing is made before all is checked")


def entry(check: Callable[[], Agreement]) -> Entry:
    return Entry(make=make, setting=Setting(), check=check)


def test_a_side_whose_check_fails_is_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "children", in_this_process)
    found, refused = checked({"theirs": entry(holds), "wrong": entry(differs), "broken": entry(fails)})
    assert found == {"theirs": AGREEMENT}
    assert refused == {
        "wrong": "not the same work: its ratio is off by 1.0e-07, its gradients by 2.0e-01 of their length, where "
        "ratio 1e-05, gradients 1e-05 are allowed",
        "broken": "ValueError: no such override",
    }


def test_a_refused_side_is_not_timed_and_the_command_fails(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stand_in: Checkout
) -> None:
    monkeypatch.setattr(command, "timed", lambda entries, *_: {side: [ITERATION] * 2 for side in entries})
    monkeypatch.setattr(
        command, "checked", lambda entries: (dict.fromkeys(list(entries)[:2], AGREEMENT), {"ours seed=1": "wrong"})
    )
    arguments = ["--checkout", str(stand_in.path), "--recipes", "fast", "--theirs", "float32"]
    with pytest.raises(SystemExit, match="not timed, see above: fast: ours seed=1"):
        command.main([*arguments, "--ours", "", "--ours", "seed=1"])
    (result,) = report["data"]["results"]
    assert list(result["sides"]) == ["flow_grpo float32", "ours"]
    assert result["refused"] == {"ours seed=1": "wrong"}
    monkeypatch.setattr(command, "checked", lambda entries: ({}, {"flow_grpo float32": "wrong"}))
    with pytest.raises(SystemExit, match="fast cannot be measured: flow_grpo float32, wrong"):
        command.main([*arguments, "--ours", ""])


def test_checks_may_be_left_to_a_run_of_their_own(
    report: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    stand_in: Checkout,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "timed", lambda entries, *_: {side: [ITERATION] * 2 for side in entries})
    monkeypatch.setattr(command, "checked", lambda entries: pytest.fail("nothing was to be checked"))
    arguments = ["--checkout", str(stand_in.path), "--recipes", "fast", "--theirs", "float32", "--ours", ""]
    command.main([*arguments, "--checks", "none"])
    assert "None of the sides was checked in this run" in report["body"]
    assert "every optimization off" not in report["body"]

    monkeypatch.setattr(command, "timed", lambda *_: pytest.fail("nothing was to be timed"))
    monkeypatch.setattr(command, "checked", lambda entries: (dict.fromkeys(entries, AGREEMENT), {}))
    command.main([*arguments, "--checks", "only"])
    told = "fast: ours: the same work: ratio off by 1.0e-07, gradients by 2.0e-06; allowed: ratio 1e-05"
    assert told in capsys.readouterr().out
    monkeypatch.setattr(command, "checked", lambda entries: ({"ours": AGREEMENT}, {"flow_grpo float32": "wrong"}))
    with pytest.raises(SystemExit, match="fast: flow_grpo float32, wrong"):
        command.main([*arguments, "--checks", "only"])


def test_a_pipeline_is_made_once_and_whole(tmp_path: Path, tiny_size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MINIATURE", tiny_size)
    arguments = command._parse(["--pipeline", str(tmp_path / "pipeline")])
    assert command._job(arguments, tmp_path).pipeline == str(tmp_path / "pipeline")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["pipeline"]
    monkeypatch.setattr(command, "make_pipeline", lambda *_: pytest.fail("it is there"))
    assert command._job(arguments, tmp_path).pipeline == str(tmp_path / "pipeline")
    # one that was cut off while it was written is not there
    (tmp_path / "other.unfinished").mkdir()
    monkeypatch.setattr(command, "make_pipeline", lambda directory, *_: directory / "made")
    other = command._parse(["--pipeline", str(tmp_path / "other")])
    assert command._job(other, tmp_path).pipeline == str(tmp_path / "other" / "made")


TURNS: list[str] = []


def turn(name: str) -> Iteration:
    TURNS.append(name)
    return replace(ITERATION, peak_bytes=len(TURNS))


class Turn:
    """Work whose side only notes that it was its turn."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> Callable[[], Iteration]:
        return lambda: turn(self.name)


def test_every_other_round_goes_backwards_and_a_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "children", in_this_process)
    TURNS.clear()
    rounds = timed({name: Entry(make=Turn(name), setting=Setting()) for name in "abc"}, warm_up=1, rounds=2)
    assert "".join(TURNS) == "abc" + "cba" + "abc"
    assert [[one.peak_bytes for one in rounds[name]] for name in "abc"] == [[6, 7], [5, 8], [4, 9]]


def test_what_is_allowed_grows_with_the_blocks_and_shrinks_with_the_latent(tiny_size: Size) -> None:
    float32, bfloat16 = Setting(), Setting("bfloat16")
    tolerance = agreements._tolerance
    assert tolerance(float32, command.MINIATURE, "cpu") == Tolerance(1e-5, 1e-5)
    # 24 blocks in place of 4
    assert tolerance(bfloat16, command.FULL, "cuda").gradient == pytest.approx(0.06 * 6**0.5)
    # 6 times the width and height in place of tiny's, of the elements that a ratio averages
    assert tolerance(bfloat16, tiny_size, "cpu") == Tolerance(pytest.approx(0.012), 0.06)  # type: ignore[arg-type]
    # on a GPU float32 has the bits of TF32
    assert tolerance(float32, command.FULL, "cuda") == tolerance(Setting("float16"), command.FULL, "cuda")
