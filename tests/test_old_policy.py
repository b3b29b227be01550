"""The old policy: the policy itself, or one that follows it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fastgrpo.assembly import build_trainer
from fastgrpo.old_policy import OldPolicy
from tests.tiny_config import make_config

IMAGES = ("algorithm=nft", "algorithm.schedule.num_steps=3", "train.learning_rate=1e-1")


def make_weights(value: float) -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.full((2,), value))}


def test_it_follows_by_what_its_decay_leaves() -> None:
    weights = make_weights(1.0)
    old = OldPolicy(weights, growth=0.25, limit=0.5)
    seen = []
    for _ in range(4):
        with torch.no_grad():
            weights["a"].add_(1.0)
        old.follow()
        seen.append(old.weights["a"][0].item())
    # decay .25, .5, .5, .5 towards 2, 3, 4, 5
    assert seen == pytest.approx([1.75, 2.375, 3.1875, 4.09375])


def test_inside_the_model_holds_it_and_the_policy_comes_back() -> None:
    weights = make_weights(1.0)
    old = OldPolicy(weights, growth=0.5)
    with torch.no_grad():
        weights["a"].fill_(0.1)
    with old.applied():
        assert weights["a"].tolist() == [1.0, 1.0]
    assert torch.equal(weights["a"], torch.full((2,), 0.1))
    with pytest.raises(RuntimeError, match="broken"), old.applied():
        raise RuntimeError("broken")
    assert torch.equal(weights["a"], torch.full((2,), 0.1))


def test_without_growth_it_is_the_policy_and_keeps_nothing() -> None:
    weights = make_weights(1.0)
    old = OldPolicy(weights)
    with torch.no_grad():
        weights["a"].fill_(3.0)
    old.follow()
    with old.applied():
        assert weights["a"].tolist() == [3.0, 3.0]
    assert (old.lags, old.weights) == (False, {})


@pytest.mark.parametrize("growth", [0.0, 0.5])
def test_rollouts_are_of_the_old_policy(growth: float, tiny_weights: Path, tmp_path: Path) -> None:
    """In the second iteration, when the policy has moved."""
    trainer = build_trainer(make_config(tiny_weights, tmp_path / "run", *IMAGES, f"train.old_policy_growth={growth}"))
    sampled, rollout = [], trainer.rollout

    def watching(*arguments, **settings):
        sampled.append({name: weight.detach().clone() for name, weight in trainer.model.trainable.items()})
        return rollout(*arguments, **settings)

    trainer.rollout = watching  # type: ignore[assignment]
    trainer.step()
    policy = {name: weight.detach().clone() for name, weight in trainer.model.trainable.items()}
    wanted = {name: weight.clone() for name, weight in (trainer.old_policy.weights or policy).items()}
    trainer.step()
    assert all(torch.equal(weight, wanted[name]) for name, weight in sampled[1].items())
    is_policy = all(torch.equal(weight, policy[name]) for name, weight in sampled[1].items())
    assert is_policy == (growth == 0.0)


def test_steps_cannot_be_learned_from_another_policy(tiny_weights: Path, tmp_path: Path) -> None:
    config = make_config(tiny_weights, tmp_path / "run", "train.old_policy_growth=0.1")
    with pytest.raises(ValueError, match=r"^train\.old_policy_growth=0\.1 .* ratio must begin at 1"):
        build_trainer(config)
    assert not (tmp_path / "run").exists()
