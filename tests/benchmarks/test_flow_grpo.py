"""The benchmark against Flow-GRPO: what it cuts out of a checkout, what it refuses, and its figures by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.flow_grpo.__main__ import main
from benchmarks.flow_grpo.agreement import Agreement, Tolerance
from benchmarks.flow_grpo.checkout import Checkout, choose, definition, executed
from benchmarks.flow_grpo.children import ChildError, children
from benchmarks.flow_grpo.ours import FastGRPO
from benchmarks.flow_grpo.plain import PlainFastGRPO
from benchmarks.flow_grpo.recipe import RECIPES, Job
from benchmarks.flow_grpo.results import Result, goals, summary
from benchmarks.flow_grpo.setting import Setting
from benchmarks.flow_grpo.side import Iteration
from benchmarks.kernels.timing import Quartiles
from tests.benchmarks.flow_grpo_children import count, die, fail_when_called, fail_when_made

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
        main(["--checkout", str(tmp_path / "nowhere")])


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


def test_without_git_a_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make_checkout(tmp_path / "flow_grpo").commit() == "unknown"


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
    # a slow moment of the machine, the second round, is in all sides and in no ratio
    theirs = [
        iteration(2, 4, cpu_seconds=8.0, ratio_deviation=7e-5),
        iteration(20, 40, cpu_seconds=12.0),
        iteration(3, 6, cpu_seconds=9.0),
    ]
    ours = [
        iteration(1, 1, cpu_seconds=2.0, peak_bytes=9_000_000),
        iteration(10, 10, cpu_seconds=2.0),
        iteration(1, 2, cpu_seconds=2.0),
    ]
    compiled = [iteration(1, 2, cpu_seconds=3.0), iteration(10, 20, cpu_seconds=3.0), iteration(2, 2, cpu_seconds=3.0)]
    result = Result(
        recipe="full",
        baseline="flow_grpo float32",
        peer="flow_grpo abc, recipe full",
        settings={
            "flow_grpo float32": Setting(),
            "flow_grpo bfloat16 compiled": Setting("bfloat16", compiled=True),
            "ours": Setting(),
            "ours compile=blocks": Setting("float16", compiled=True),
            "ours model.dtype=bfloat16": Setting("bfloat16"),
        },
        rounds={
            "flow_grpo float32": theirs,
            "flow_grpo bfloat16 compiled": compiled,
            "ours": ours,
            "ours compile=blocks": ours,
            "ours model.dtype=bfloat16": ours,
        },
    )
    assert result.images_per_second("ours", "rollout") == Quartiles(18.0, 9.9, 18.0)
    assert result.times_faster("ours", "iteration") == Quartiles(3.0, 3.0, 3.0)
    assert result.times_faster("ours", "rollout") == Quartiles(2.0, 2.0, 2.5)
    assert result.times_faster("ours", "update") == Quartiles(4.0, 3.5, 4.0)
    # on a CPU what counts is CPU time: 8, 12 and 9 of theirs, 2 of ours
    assert result.times_faster("ours") == Quartiles(4.5, 4.25, 5.25)
    assert result.images_per_second("ours") == Quartiles(9.0, 9.0, 9.0)
    assert replace(result, device="cuda").times_faster("ours") == Quartiles(3.0, 3.0, 3.0)
    assert result.alike("ours") == "flow_grpo float32"
    assert result.alike("ours compile=blocks") == "flow_grpo bfloat16 compiled"
    assert result.alike("ours model.dtype=bfloat16") is None
    assert goals([result]) == [
        "full: ours is 4.50x flow_grpo float32 [4.25, 5.25] (goal: 2x).",
        # 3 of the compiled one
        "full: ours compile=blocks is 1.50x flow_grpo bfloat16 compiled [1.50, 1.50] (goal: 2x).",
        "full: ours model.dtype=bfloat16 is 4.50x flow_grpo float32 [4.25, 5.25] (goal: 2x).",
    ]
    text = summary([result])
    assert "## full, against flow_grpo abc, recipe full" in text
    assert "| side | images/CPU s | x baseline | x alike | x alike, iteration by the clock |" in text
    assert "| ours | 9 [9, 9] | 4.50 [4.25, 5.25] | 4.50 [4.25, 5.25] | 3.00 [3.00, 3.00] | 2.00 [2.00, 2.50] |" in text
    assert "| ours compile=blocks | 9 [9, 9] | 4.50 [4.25, 5.25] | 1.50 [1.50, 1.50] | 1.50 [1.42, 1.50] |" in text
    assert "| ours model.dtype=bfloat16 | 9 [9, 9] | 4.50 [4.25, 5.25] |  |  |  |  | 9 |" in text
    assert "| 5 | 7.0e-05 |" in text
    assert "| 9 | 0.0e+00 |" in text
    assert "None of the sides was checked in this run" in text
    assert "| side | images/s | x baseline |" in summary([replace(result, device="cuda")])
    sides = result.to_dict()["sides"]
    assert sides["ours compile=blocks"]["times_faster_than_alike"]["iteration"]["median"] == 1.5
    assert sides["ours model.dtype=bfloat16"]["times_faster_than_alike"] is None


SAME = Agreement(
    ratio_deviation=1e-7,
    gradient_difference=2e-6,
    tolerance=Tolerance(ratio=1e-4, gradient=1e-5),
    trains_unconditional=False,
)


def test_a_side_that_does_other_work_is_told_apart() -> None:
    other = replace(SAME, gradient_difference=0.2)
    assert SAME.holds
    assert not other.holds
    assert replace(other, trains_unconditional=True).holds
    assert not replace(SAME, ratio_deviation=2e-4).holds
    assert not replace(SAME, ratio_deviation=float("nan")).holds


def test_every_row_has_the_figures_of_its_own_check() -> None:
    sides = ("flow_grpo float32", "ours", "ours late")
    result = Result(
        recipe="full",
        baseline=sides[0],
        peer="flow_grpo",
        settings=dict.fromkeys(sides, Setting()),
        rounds={side: [iteration(1, 1)] * 2 for side in sides},
        agreements={
            sides[0]: SAME,
            sides[1]: replace(SAME, ratio_deviation=3e-7, gradient_difference=4e-6),
            sides[2]: replace(SAME, trains_unconditional=True),
        },
        refused={"ours wrong": "not the same work"},
    )
    rows = {line.split(" | ")[0].strip("| "): line for line in summary([result]).splitlines() if line.startswith("| ")}
    assert rows[sides[0]].endswith("| 1.0e-07 | 2.0e-06 |")
    assert rows[sides[1]].endswith("| 3.0e-07 | 4.0e-06 |")
    assert rows[sides[2]].endswith("| 1.0e-07 | not compared |")
    assert "Not timed: ours wrong, not the same work." in summary([result])
    assert result.to_dict()["sides"]["ours"]["agreement"]["gradient_difference"] == 4e-6


def test_a_setting_is_read_as_it_is_told() -> None:
    for setting in (Setting("float16"), Setting("bfloat16", compiled=True)):
        assert Setting.parse(str(setting)) == setting
    with pytest.raises(ValueError, match="float32, float16, bfloat16, got 'int8'"):
        Setting.parse("int8")
    with pytest.raises(ValueError, match="'compiled' or nothing, got 'float32 fast'"):
        Setting.parse("float32 fast")


# fast is smart without its search
@pytest.mark.parametrize("recipe", ["full", "full_without_kl", "smart"])
def test_ours_and_ours_without_optimizations_do_the_same_work(job: Job, recipe: str, tmp_path: Path) -> None:
    job = replace(job, recipe=recipe, batches=1)
    fast = FastGRPO(job, tmp_path / "ours").trainer.step()
    plain = PlainFastGRPO(job, tmp_path / "plain").trainer.step()
    for name in ("reward/total", "reward/group_std", "grad_norm"):
        assert plain[name] == pytest.approx(fast[name], rel=1e-3), name
    assert plain["ratio_deviation"] == fast["ratio_deviation"] == 0
