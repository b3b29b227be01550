"""The loop: what it logs, what evaluation sees, and how a broken run stops."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fastgrpo.assembly import build_trainer
from fastgrpo.checkpoints.checkpoint import Checkpoint
from fastgrpo.health import TrainingError
from fastgrpo.records.metrics import METRICS
from fastgrpo.records.record import Record
from fastgrpo.rewards.reward import Reward, RewardError
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.trainer import Trainer
from fastgrpo.training import train
from tests.tiny import make_pipeline
from tests.tiny_config import make_config

SEARCH = (
    "algorithm=smart_grpo",
    "algorithm/noise=elite",
    "algorithm/timesteps=all_but_last",
    "algorithm.objective.kl_coef=0.04",
    "algorithm.noise.candidates=4",
    "algorithm.noise.elites=3",
    "algorithm.noise.estimate_steps=2",
)

FROM_IMAGES = (
    "algorithm=awm",
    "algorithm/noise=elite",
    "algorithm.noise.candidates=4",
    "algorithm.noise.elites=3",
    "algorithm.noise.estimate_steps=2",
    "algorithm.objective.kl_coef=0.04",
)


def make_trainer(weights: Path, output: Path, *overrides: str) -> Trainer:
    return build_trainer(make_config(weights, output, *overrides))


def release(trainer: Trainer) -> None:
    """Let go of the run directory, as the end of a process does."""
    assert isinstance(trainer.record, Record)
    assert trainer.record.directory._lock is not None
    trainer.record.directory._lock.close()


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with a search, evaluations and checkpoints."""
    output = tmp_path_factory.mktemp("runs") / "run"
    settings = ("train.iterations=3", "evaluate.every=2", "checkpoint.every=1", "train.learning_rate=1e-2")
    return train(make_config(tiny_weights, output, *SEARCH, *settings))


def test_each_iteration_has_one_line(run: Path) -> None:
    rows = rows_of(run)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    assert ["eval/jpeg" in row for row in rows] == [True, False, True, True]
    assert [row["images"] for row in rows[1:]] == [6, 12, 18]
    assert rows[3]["seconds"] == pytest.approx(sum(row["seconds/iteration"] for row in rows[1:]))


def test_the_metrics_are_exactly_those_that_are_explained(
    run: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from_images = train(make_config(tiny_weights, tmp_path_factory.mktemp("from_images") / "run", *FROM_IMAGES))
    of_one_signal = ({"approx_kl", "ratio_deviation"}, {"drift", "velocity_deviation"})
    # test_buckets.py has the first two, test_step_noise.py the third, test_retry.py the fourth, proposal/ the others
    elsewhere = {"height", "width", "search/effective_share", "search/images"}
    elsewhere |= {"proposal/kl", "proposal/gain", "proposal/grad_norm"}
    everything = set()
    for output, absent in ((run, of_one_signal[1]), (from_images, of_one_signal[0])):
        logged = set().union(*(row.keys() for row in rows_of(output))) - {"nonfinite"}
        named = {key if key in METRICS else f"{key.split('/')[0]}/<name>" for key in logged}
        assert named == METRICS.keys() - absent - elsewhere
        everything |= named
        # of images it is compared in every tenth iteration
        sometimes = {"seconds/evaluate", "eval/<name>", "reward/<name>", "velocity_deviation"}
        for row in rows_of(output)[1:]:
            assert METRICS.keys() - absent - sometimes - elsewhere <= row.keys()
    assert everything == METRICS.keys() - elsewhere


def test_the_stages_add_up_to_the_iterations(run: Path) -> None:
    rows = rows_of(run)[1:]
    stages = ("encode", "search", "rollout", "reward", "update")
    total = sum(row[f"seconds/{stage}"] for row in rows for stage in stages)
    assert total == pytest.approx(sum(row["seconds/iteration"] for row in rows), rel=0.05)
    for row in rows:
        assert row["images_per_second"] == pytest.approx(6 / row["seconds/iteration"])


def test_rollout_and_update_agree_in_each_iteration(run: Path) -> None:
    assert [row["ratio_deviation"] for row in rows_of(run)[1:]] == [0.0, 0.0, 0.0]
    assert rows_of(run)[3]["kl"] > 0


def test_a_run_writes_what_its_directory_promises(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "curves.png", "evaluations.jsonl", "golden.json", "images", "lora",
        "metrics.jsonl", "search.jsonl", "summary.json", "tensorboard",
    ]  # fmt: skip
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    ema = Checkpoint(run / "checkpoints", every=1, keep=1).load(run / "checkpoints/step_000003").ema
    lora = safetensors.torch.load_file(run / "lora/pytorch_lora_weights.safetensors")
    # alpha / rank, which is 1.5, is in B
    for name, average in ema.items():
        assert torch.equal(lora[f"transformer.{name}"], 1.5 * average if "lora_B" in name else average)


@torch.no_grad()
def test_evaluation_sees_neither_the_search_nor_the_seed(tiny_weights: Path, tmp_path: Path) -> None:
    plain = make_trainer(tiny_weights, tmp_path / "plain").evaluation()
    searched = make_trainer(tiny_weights, tmp_path / "searched", *SEARCH, "seed=7").evaluation()
    assert torch.equal(torch.stack(plain.images), torch.stack(searched.images))
    assert plain.means == searched.means


def test_training_in_between_changes_evaluation_by_the_weights_alone(tiny_weights: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", *SEARCH, "train.learning_rate=1e-2")
    start = {name: weight.detach().clone() for name, weight in trainer.model.trainable.items()}
    before = trainer.evaluation()
    trainer.step()
    trained = trainer.evaluation()
    assert not torch.equal(torch.stack(trained.images), torch.stack(before.images))
    with torch.no_grad():
        for name, weight in trainer.model.trainable.items():
            weight.copy_(start[name])
    assert torch.equal(torch.stack(trainer.evaluation().images), torch.stack(before.images))


def test_evaluation_is_of_the_averages_and_gives_the_weights_back(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", "train.learning_rate=1e-2")
    trainer.step()
    own = {name: weight.detach().clone() for name, weight in trainer.model.trainable.items()}
    seen: dict[str, Tensor] = {}
    evaluation = trainer.evaluation

    def spy():
        seen.update({name: weight.detach().clone() for name, weight in trainer.model.trainable.items()})
        return evaluation()

    monkeypatch.setattr(trainer, "evaluation", spy)
    trainer._evaluate()
    assert all(torch.equal(seen[name], average) for name, average in trainer.ema.averages.items())
    assert all(torch.equal(weight, own[name]) for name, weight in trainer.model.trainable.items())
    assert any(not torch.equal(seen[name], weight) for name, weight in own.items())


def test_three_iterations_of_broken_gradients_stop_the_run(tiny_weights: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", "train.iterations=9")
    start = {name: weight.detach().clone() for name, weight in trainer.model.trainable.items()}
    broken = dataclasses.replace(trainer.algorithm, advantage=lambda rewards_PG: rewards_PG * float("nan"))  # type: ignore[arg-type]
    trainer.algorithm = broken
    with pytest.raises(TrainingError, match=r"iteration 2: 3 iterations in a row .* not finite; lower"):
        trainer.run()
    rows = rows_of(tmp_path / "run")
    assert [row.get("skipped_steps") for row in rows] == [None, 1, 1]
    assert rows[1]["nonfinite"] == ["grad_norm", "loss"]
    assert all(torch.equal(weight, start[name]) for name, weight in trainer.model.trainable.items())
    batch = safetensors.torch.load_file(tmp_path / "run/failed_batch.safetensors")
    assert batch["images_BCHW"].shape == (6, 3, 64, 64)
    assert batch["x_TBCHW"].shape == (3, 6, 16, 8, 8)
    assert batch["advantages_B"].isnan().all()


def test_a_good_iteration_in_between_starts_the_count_again(tiny_weights: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run")
    good = trainer.algorithm
    broken = dataclasses.replace(good, advantage=lambda rewards_PG: rewards_PG * float("nan"))  # type: ignore[arg-type]
    for algorithm in (broken, broken, good, broken, broken):
        trainer.algorithm = algorithm
        trainer.step()
    assert trainer.iteration == 5


def test_a_ratio_far_from_one_stops_the_run_with_an_explanation(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run")
    rollout = trainer.rollout

    def disagreeing(*arguments, **settings):
        trajectories = rollout(*arguments, **settings)
        trained = trajectories.trained
        return dataclasses.replace(
            trajectories, trained=dataclasses.replace(trained, log_prob_TB=trained.log_prob_TB + 0.5)
        )

    monkeypatch.setattr(trainer, "rollout", disagreeing)
    why = r"iteration 0: ratio_deviation is 0\.39 before the first optimizer step.*rollout and update disagree"
    with pytest.raises(TrainingError, match=why):
        trainer.run()
    assert (tmp_path / "run/failed_batch.safetensors").exists()


def raising(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    raise ConnectionError("no answer")


class FailsFrom:
    """The rewards of a run, until its iteration ``at`` is done."""

    def __init__(self, trainer: Trainer, reward: Reward, at: int) -> None:
        self.trainer, self.at, self.working = trainer, at, trainer.rewards
        scoring = Scoring(retries=1, retry_seconds=0.0)
        self.broken = Rewards(terms={"mine": reward}, weights={"mine": 1.0}, scoring=scoring)

    def __getattr__(self, name: str):
        return getattr(self.working if self.trainer.iteration < self.at else self.broken, name)


def without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if "second" not in key and key != "peak_bytes"}


def test_a_broken_reward_stops_the_run_which_goes_on_from_there_as_if_nothing_had_been(
    tiny_weights: Path, tmp_path: Path
) -> None:
    settings = ("train.iterations=3", "checkpoint.every=100")
    undisturbed = make_trainer(tiny_weights, tmp_path / "undisturbed", *settings)
    undisturbed.run()
    trainer = make_trainer(tiny_weights, tmp_path / "run", *settings)
    trainer.rewards = FailsFrom(trainer, raising, at=2)  # type: ignore[assignment]
    with pytest.raises(
        RewardError, match=r"raised ConnectionError: no answer, 2 times.*; iteration 2 is saved, go on with resume=true"
    ):
        trainer.run()
    assert [row["iteration"] for row in rows_of(tmp_path / "run")] == [0, 1, 2]
    release(trainer)
    resumed = make_trainer(tiny_weights, tmp_path / "run", *settings, "resume=true")
    resumed.resume()
    resumed.run()
    expected, rows = rows_of(tmp_path / "undisturbed"), rows_of(tmp_path / "run")
    assert [without_times(row) for row in rows] == [without_times(row) for row in expected]
    weights = undisturbed.model.trainable
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.model.trainable.items())


def test_a_reward_that_breaks_in_an_evaluation_loses_neither_the_iteration_nor_the_evaluation(
    tiny_weights: Path, tmp_path: Path
) -> None:
    settings = ("train.iterations=3", "evaluate.every=2", "checkpoint.every=100")
    train(make_config(tiny_weights, tmp_path / "undisturbed", *settings))
    trainer = make_trainer(tiny_weights, tmp_path / "run", *settings)
    broken = FailsFrom(trainer, raising, at=2)
    trainer.evaluation = dataclasses.replace(trainer.evaluation, rewards=broken)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match=r"no answer.*; iteration 2 is saved"):
        trainer.run()
    assert [row["iteration"] for row in rows_of(tmp_path / "run")] == [0, 1]
    release(trainer)
    train(make_config(tiny_weights, tmp_path / "run", *settings, "resume=true"))
    expected, rows = rows_of(tmp_path / "undisturbed"), rows_of(tmp_path / "run")
    assert [without_times(row) for row in rows] == [without_times(row) for row in expected]
    assert "eval/jpeg" in rows[2]


def test_a_run_is_resumed_only_with_rewards_that_score_as_when_it_began(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))"
    (tmp_path / "changing_reward.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    mine = ("reward=custom", "reward.path=changing_reward.brightness")
    train(make_config(tiny_weights, tmp_path / "run", "train.iterations=1", *mine))
    # its scores change, but nothing in the config does
    (tmp_path / "changing_reward.py").write_text(f"{own} * 2")
    importlib.reload(sys.modules["changing_reward"])
    changed = ("train.iterations=2", "resume=true", *mine)
    why = r"reward 'custom' scores golden pair \d .*golden.json, written when the run began, says"
    with pytest.raises(RewardError, match=why):
        train(make_config(tiny_weights, tmp_path / "run", *changed))
    train(make_config(tiny_weights, tmp_path / "run", *changed, "reward.golden=false"))
    assert [row["iteration"] for row in rows_of(tmp_path / "run")] == [0, 1, 2]


def test_a_reward_that_answers_a_constant_costs_no_run(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "constant_reward.py").write_text(
        "def half(images, prompts):\n    return images.new_full((len(images),), 0.5)\n"
    )
    monkeypatch.chdir(tmp_path)
    overrides = ("reward=custom", "reward.path=constant_reward.half")
    with pytest.raises(RewardError, match=r"'custom' answered 0.5 for all 8 golden pairs \(scenes\)"):
        make_trainer(tiny_weights, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_run_ends_after_its_time(tiny_weights: Path, tmp_path: Path) -> None:
    output = train(make_config(tiny_weights, tmp_path / "run", "train.max_minutes=1e-9", "train.iterations=9"))
    assert [row["iteration"] for row in rows_of(output)] == [0, 1]
    assert "eval/jpeg" in rows_of(output)[1]
    assert (output / "checkpoints/step_000001").is_dir()


def test_a_taken_directory_is_refused_before_it_is_touched(run: Path, tiny_weights: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; continue it with resume=true"):
        make_trainer(tiny_weights, run)
    assert (run / "metrics.jsonl").read_bytes() == lines


def test_a_finished_run_resumed_stays_as_it_is(run: Path, tiny_weights: Path, tmp_path: Path) -> None:
    settings = ("train.iterations=2", "checkpoint.every=1")
    output = train(make_config(tiny_weights, tmp_path / "run", *settings))
    # its tensors and not its bytes: the order of the metadata in the file's header is arbitrary
    rows, lora = rows_of(output), safetensors.torch.load_file(output / "lora/pytorch_lora_weights.safetensors")
    train(make_config(tiny_weights, tmp_path / "run", *settings, "resume=true"))
    assert rows_of(output) == rows
    again = safetensors.torch.load_file(output / "lora/pytorch_lora_weights.safetensors")
    assert again.keys() == lora.keys()
    assert all(torch.equal(again[name], lora[name]) for name in lora)


def test_another_model_does_not_resume(tiny_weights: Path, tmp_path: Path) -> None:
    weights = make_pipeline(tmp_path / "weights")
    train(make_config(weights, tmp_path / "run", "train.iterations=1"))
    with pytest.raises(ValueError, match=r"adaptation\.rank was 4 and would be 5\. .*fastgrpo export run="):
        train(make_config(weights, tmp_path / "run", "train.iterations=1", "adaptation.rank=5", "resume=true"))
    # other weights under the same name, which no config tells
    make_pipeline(weights, seed=1)
    with pytest.raises(ValueError, match=r"is of model .*; use the model and LoRA settings it was saved with"):
        train(make_config(weights, tmp_path / "run", "train.iterations=2", "resume=true"))


def test_reweighted_training_is_replayed_training(tiny_weights: Path, tmp_path: Path) -> None:
    settings = ("algorithm=flow_grpo_fast", "algorithm.schedule.num_steps=7")
    runs = []
    for gradients in ("replay", "reweight"):
        trainer = make_trainer(tiny_weights, tmp_path / gradients, *settings, f"train.gradients={gradients}")
        runs.append([trainer.step() for _ in range(3)])
        assert runs[-1][-1]["ratio_deviation"] == 0.0
    for replayed, reweighted in zip(*runs, strict=True):
        assert reweighted["reward/total"] == pytest.approx(replayed["reward/total"], rel=1e-3)
    # later ones differ more: AdamW makes a step of each rounding error where a gradient is zero
    assert runs[1][0]["grad_norm"] == pytest.approx(runs[0][0]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.gradients=both", r"train\.gradients must be replay or reweight, got 'both'"),
        (
            "algorithm.objective.kl_coef=0.1",
            r"train\.gradients=reweight needs algorithm\.objective\.kl_coef=0, got 0\.1",
        ),
    ],
)
def test_reweighting_is_refused_where_it_would_be_wrong(
    override: str, message: str, tiny_weights: Path, tmp_path: Path
) -> None:
    settings = ["algorithm=flow_grpo_fast", "algorithm.schedule.num_steps=7", "train.gradients=reweight"]
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_weights, tmp_path / "run", *settings, override)
