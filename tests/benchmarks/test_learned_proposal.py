"""The comparison of start noises, in a few images: what is measured, and what is kept of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import learned_proposal
from benchmarks.learned_proposal import POLICIES, _compare, _of_another, main
from fastgrpo.algorithm.noise import NoiseDraw, plain_starts
from fastgrpo.proposal.files import load_proposal
from fastgrpo.types import Conditions

SHORT = ["--seeds=1", "--frozen=1", "--nft=1", "--trained=1", "--prompts=2", "--images=4", "--best-of=2", "--mix=0"]
SHORT += [
    "algorithm.noise.width=4",
    "train.prompts_per_iteration=1",
    "train.group_size=2",
    "train.updates=1",
    "evaluate.num_steps=1",
]
SHORT += ["algorithm.schedule.num_steps=1", "reward.golden=false"]


def test_what_is_measured_is_kept_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path / "results")
    monkeypatch.setenv("BENCHMARK_COMMIT", "0" * 40)
    out = tmp_path / "out"
    main([f"--out={out}", *SHORT])
    shown = capsys.readouterr().out
    for policy, _, _ in POLICIES:
        assert f"| {policy} | training prompts |" in shown
        assert f"| {policy} | held-out prompts |" in shown
    for name in ("frozen", "beside", "trained"):
        assert load_proposal(out / "seed_1" / name).shape.width == 4
    judged = json.loads((out / "seed_1" / "judged_frozen.json").read_text())["held-out prompts"]
    assert judged["plain shapes"]["gain"] == {"mean": 0.0, "standard_error": 0.0}
    assert judged["searched shapes"]["mean"] >= judged["plain shapes"]["mean"]
    monkeypatch.setattr(learned_proposal, "build_trainer", None)
    measured = (out / "seed_1" / "judged_frozen.json").read_text()
    other = json.loads(measured)
    other["held-out prompts"]["plain shapes_strict"]["mean"] = 0.75
    shutil.copytree(out / "seed_1", out / "seed_2")
    (out / "seed_2" / "judged_frozen.json").write_text(json.dumps(other))
    main([f"--out={out}", *SHORT[1:], "--seeds", "1", "2"])
    low = judged["plain shapes_strict"]["mean"]
    assert low < 0.75
    shown = capsys.readouterr().out
    assert f" / {(low + 0.75) / 2:.3f} ({low:.3f} to 0.750) |" in shown
    assert "measured" in shown.lower()


def test_the_best_of_each_so_many_is_taken_by_the_graded_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    graded_PG = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.5, 0.0, 0.1, 0.6]])
    strict_PG = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
    plain = {"shapes": graded_PG, "shapes_strict": strict_PG}
    learned = {"shapes": graded_PG + torch.tensor([[0.1], [0.3]]), "shapes_strict": strict_PG}

    def rewards(trainer, num_steps, prompts, starts, num_images):
        return plain if starts is plain_starts else learned

    monkeypatch.setattr(learned_proposal, "images_rewards", rewards)

    class Arguments:
        images, best_of = 4, 2

    found = _compare(None, 1, [], lambda *_: None, Arguments)  # type: ignore[arg-type]
    assert found["searched shapes"]["mean"] == pytest.approx((0.4 + 0.3 + 0.5 + 0.6) / 4)
    assert found["searched shapes_strict"]["mean"] == pytest.approx((0 + 1 + 1 + 0) / 4)
    assert found["learned shapes"]["gain"]["mean"] == pytest.approx(0.2)
    # of two prompts: half their distance
    assert found["learned shapes"]["gain"]["standard_error"] == pytest.approx(0.1)


def test_the_noise_of_another_prompt_is_that_of_the_one_half_a_list_away() -> None:
    conditions = Conditions(torch.zeros(6, 1, 1), torch.arange(6.0)[:, None])
    found: list[list[float]] = []

    def learned(draw: NoiseDraw, stream: int, conditions_B: Conditions) -> torch.Tensor:
        found.append(conditions_B.pooled_BC[:, 0].tolist())
        return conditions_B.pooled_BC

    _of_another(learned)(NoiseDraw(0, [0, 1, 2], 2, (1, 1, 1)), 0, conditions)
    # of three prompts with two images each, half a list is one prompt
    assert found == [[2.0, 3.0, 4.0, 5.0, 0.0, 1.0]]
