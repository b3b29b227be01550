"""The learning rate of each iteration, by hand, and that a run follows it."""

from pathlib import Path

import pytest

from fastgrpo.assembly import build_trainer
from fastgrpo.learning_rate import LearningRate
from tests.tiny_config import make_config


def rates(**settings) -> list[float]:
    rate = LearningRate(peak=8.0, num_iterations=10, **settings)
    return [rate(iteration) for iteration in range(rate.num_iterations)]


def test_it_is_constant_where_nothing_is_said() -> None:
    assert rates() == [8.0] * 10


def test_it_rises_stays_and_falls() -> None:
    assert rates(warmup_iterations=4) == pytest.approx([2, 4, 6, 8] + [8] * 6)
    assert rates(decay_iterations=4, decay_to=0.5) == pytest.approx([8] * 6 + [7, 6, 5, 4])
    assert rates(warmup_iterations=2, decay_iterations=2, decay_to=0.0) == pytest.approx([4] + [8] * 7 + [4, 0])
    # both at once: the one is a share of the other
    assert rates(warmup_iterations=10, decay_iterations=10, decay_to=0.0)[4] == pytest.approx(8 * 0.5 * 0.5)


def test_after_the_end_it_stays_where_it_fell() -> None:
    assert LearningRate(peak=8.0, num_iterations=10, decay_iterations=4, decay_to=0.5)(20) == pytest.approx(4.0)


def test_a_run_follows_it(tiny_weights: Path, tmp_path: Path) -> None:
    settings = ("train.iterations=3", "train.learning_rate=4e-3", "train.warmup_iterations=2")
    trainer = build_trainer(
        make_config(tiny_weights, tmp_path / "run", *settings, "train.decay_share=0.3", "train.decay_to=0.25")
    )
    seen = []
    trainer.update.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    logged = [trainer.step()["learning_rate"] for _ in range(3)]
    assert seen == logged == pytest.approx([2e-3, 4e-3, 1e-3])
