"""The benchmark against Flow-GRPO: what it cuts out of a checkout, what it refuses, and its figures by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.flow_grpo import __main__ as command
from benchmarks.flow_grpo.agreement import Agreement
from benchmarks.flow_grpo.checkout import Checkout, choose, definition, executed
from benchmarks.flow_grpo.children import ChildError, children
from benchmarks.flow_grpo.ours import FastGRPO
from benchmarks.flow_grpo.pipeline import MINIATURE, make_pipeline
from benchmarks.flow_grpo.plain import PlainFastGRPO
from benchmarks.flow_grpo.recipe import RECIPES, Job
from benchmarks.flow_grpo.results import Result, goals, summary
from benchmarks.flow_grpo.side import Iteration
from benchmarks.kernels.timing import Quartiles
from fastgrpo.shapes.captions import training_captions
from tests.benchmarks.flow_grpo_children import count, die, fail_when_called, fail_when_made

TINY = replace(MINIATURE, resolution=32, num_layers=2, num_dual_layers=1, num_heads=1)
_PACKAGE = "flow_grpo/diffusers_patch/"
_FILES = [
    *(f"{_PACKAGE}{name}.py" for name in ("sd3_pipeline_with_logprob", "train_dreambooth_lora_sd3")),
    *(f"flow_grpo/{name}.py" for name in ("stat_tracking", "ema", "rewards")),
]
_STEP = "def sde_step_with_logprob(v):\n    return 10 * v\n"
# the first line would fail, were it executed
_SCRIPT = """\
from absl import app, flags_that_do_not_exist
def compute_log_prob(v, detach):
    noise_pred_uncond = v
    {detached}
    return sde_step_with_logprob(noise_pred_uncond)
app.run(0)
"""
_DETACHED = _SCRIPT.format(detached="noise_pred_uncond = noise_pred_uncond.detach()")
_ATTACHED = _SCRIPT.format(detached="pass")


def make_checkout(path: Path, *, full: str = _DETACHED, fast: str | None = None) -> Checkout:
    sources = dict.fromkeys(_FILES, "") | {f"{_PACKAGE}sd3_sde_with_logprob.py": _STEP, "scripts/train_sd3.py": full}
    if fast is not None:
        sources |= {f"{_PACKAGE}sd3_pipeline_with_logprob_fast.py": "", "scripts/train_sd3_fast.py": fast}
    for name, source in sources.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(source)
    return Checkout(path)


def test_one_function_is_cut_out_of_a_script_that_cannot_be_imported(tmp_path: Path) -> None:
    path = make_checkout(tmp_path).script(RECIPES["full"])
    function = executed(path, "compute_log_prob", {"sde_step_with_logprob": lambda v: 2 * v})
    v = torch.ones(1, requires_grad=True)
    assert function(v, True).item() == 2
    assert not function(v, True).requires_grad
    assert function.__code__.co_filename == str(path)
    with pytest.raises(ValueError, match=r"train_sd3\.py has no function main; use a checkout of https"):
        definition(path, "main")


def test_what_a_checkout_lacks_is_named(tmp_path: Path) -> None:
    make_checkout(tmp_path)
    (tmp_path / "flow_grpo/ema.py").unlink()
    with pytest.raises(ValueError, match=r"no checkout of flow_grpo: it lacks flow_grpo/ema\.py; clone https"):
        Checkout(tmp_path)
    with pytest.raises(ValueError, match=r"lacks .*train_sd3\.py"):
        command.main(["--checkout", str(tmp_path / "nowhere")])


def test_a_recipe_takes_the_checkout_that_runs_it_and_whose_gradient_is_ours(tmp_path: Path) -> None:
    early = make_checkout(tmp_path / "early")
    late = make_checkout(tmp_path / "late", full=_ATTACHED, fast=_ATTACHED)
    full, fast = RECIPES["full"], RECIPES["fast"]
    assert early.detaches_unconditional(full)
    assert not late.detaches_unconditional(full)
    assert choose([late, early], full) is early
    assert choose([late], full) is late
    assert choose([early, late], fast) is late
    assert choose([early], fast) is None


def test_a_directory_inside_another_repository_has_no_commit(tmp_path: Path) -> None:
    assert make_checkout(tmp_path).commit() == "unknown"
    inside = Path(__file__).parents[2]
    checkout = make_checkout(tmp_path / "other")
    object.__setattr__(checkout, "path", inside / "tests")
    assert checkout.commit() == "unknown"


def test_children_keep_their_state_take_turns_and_tell_what_failed() -> None:
    sides = {"a": count, "b": count, "c": fail_when_called, "d": die}
    with children(sides) as run:
        assert [run["a"](), run["b"](), run["a"](), run["a"](), run["b"]()] == [1, 1, 2, 3, 2]
        with pytest.raises(ChildError, match=r"(?s)c failed.*ZeroDivisionError"):
            run["c"]()
        with pytest.raises(ChildError, match="d ended without an answer"):
            run["d"]()
        assert run["a"]() == 4


def test_a_side_that_cannot_be_made_tells_its_traceback() -> None:
    with pytest.raises(ChildError, match=r"(?s)b failed.*ZeroDivisionError: made"), children({"b": fail_when_made}):
        pass


def iteration(rollout: float, update: float, **others: float) -> Iteration:
    values: dict[str, Any] = {"num_images": 18, "peak_bytes": 5_000_000, "ratio_deviation": 0.0, "cpu_seconds": 1.0}
    return Iteration(rollout_seconds=rollout, update_seconds=update, **values | others)


def test_speeds_and_ratios_by_hand() -> None:
    # a slow moment of the machine, the second round, is in both sides and in no ratio
    theirs = [iteration(2, 4, ratio_deviation=7e-5), iteration(20, 40), iteration(3, 6)]
    ours = [iteration(1, 1, peak_bytes=9_000_000), iteration(10, 10), iteration(1, 2)]
    result = Result("full", "flow_grpo", "flow_grpo abc, recipe full", {"flow_grpo": theirs, "ours": ours})
    assert result.images_per_second("ours", "rollout") == Quartiles(18.0, 9.9, 18.0)
    assert result.times_faster("ours") == Quartiles(3.0, 3.0, 3.0)
    assert result.times_faster("ours", "rollout") == Quartiles(2.0, 2.0, 2.5)
    assert result.times_faster("ours", "update") == Quartiles(4.0, 3.5, 4.0)
    assert goals([result], "cpu") == ["full: ours is 3.00x flow_grpo [3.00, 3.00] (goal: 2x)."]
    text = summary([result])
    assert "## full, against flow_grpo abc, recipe full" in text
    assert "| ours | 6 [3.45, 7.5] | 18 [9.9, 18] | 9 [5.4, 13.5] | 3.00 [3.00, 3.00] | 2.00 [2.00, 2.50] |" in text
    assert "| 5 | 7.0e-05 |" in text
    assert "| 9 | 0.0e+00 |" in text


def test_sides_that_do_other_work_are_told_apart() -> None:
    same = Agreement(ratio_deviation=1e-7, gradient_difference=2e-6, tolerance=1e-4, trains_unconditional=False)
    other = replace(same, gradient_difference=0.2)
    assert same.holds
    assert not other.holds
    assert replace(other, trains_unconditional=True).holds
    assert not replace(same, ratio_deviation=float("nan")).holds
    rounds = {"flow_grpo": [iteration(1, 1)] * 2, "ours": [iteration(1, 1)] * 2}
    told = summary([Result("full", "flow_grpo", "flow_grpo", rounds, agreement) for agreement in (same, other, None)])
    assert told.count("Checked: the same work.") == 1
    assert "NOT the same work (tolerance 0.0001)" in told
    assert "There was no checkout of flow_grpo" in told


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    directory = tmp_path_factory.mktemp("flow_grpo")
    (directory / "prompts.txt").write_text("\n".join(map(str, training_captions())))
    pipeline = make_pipeline(directory / "pipeline", TINY, "cpu")
    prompts = str(directory / "prompts.txt")
    return Job(recipe="full", pipeline=str(pipeline), size=TINY, prompts=prompts, batches=2, device="cpu", threads=1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_ours_and_ours_without_optimizations_do_the_same_work(job: Job, recipe: str, tmp_path: Path) -> None:
    fast = FastGRPO(replace(job, recipe=recipe), tmp_path / "ours").trainer.step()
    plain = PlainFastGRPO(replace(job, recipe=recipe), tmp_path / "plain").trainer.step()
    for name in ("reward/total", "reward/group_std", "grad_norm"):
        assert plain[name] == pytest.approx(fast[name], rel=1e-3), name
    assert plain["ratio_deviation"] == fast["ratio_deviation"] == 0


def test_without_a_checkout_ours_is_compared_with_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written: dict[str, Any] = {}

    def write(theme: str, **report: Any) -> Path:
        written.update(report)
        (tmp_path / "report.md").write_text(report["body"])
        return tmp_path / "report.md"

    monkeypatch.setattr(command, "write_report", write)
    monkeypatch.setattr(command, "MINIATURE", TINY)
    command.main(["--recipes", "fast", "--rounds", "2", "--warm-up", "0", "--ours", "runtime.micro_batch=6"])
    told = capsys.readouterr().out
    assert "no --checkout of flow_grpo was given" in told
    assert "- fast: ours runtime.micro_batch=6 is " in told
    (result,) = written["data"]["results"]
    assert result["baseline"] == "ours, plain"
    assert [len(side["iterations"]) for side in result["sides"].values()] == [2, 2]
