"""``reward.normalize`` of a run's config reaches the advantages that are trained on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo import types
from fastgrpo.assembly import build_trainer
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.update import Update
from tests.tiny_config import make_config

# the spread of kilobytes is far from that of a mean of pixels, whose weight is not 1 either
WEIGHTS = {"jpeg": 1.0, "red": -2.0}
REWARD = (
    "reward=jpeg_incompressibility",
    "+reward/terms@reward.terms.red=custom",
    "reward.terms.red.path=normalize_rewards.redness",
    "+reward.weights.red=-2.0",
    # it subtracts the mean of the group and divides by nothing
    "algorithm/advantage=no_std",
)


def normalized(reward_PG: Tensor) -> Tensor:
    mean_P1, std_P1 = reward_PG.mean(dim=1, keepdim=True), reward_PG.std(dim=1, correction=0, keepdim=True)
    return (reward_PG - mean_P1) / (std_P1 + 1e-4)


def centered(reward_PG: Tensor) -> Tensor:
    return reward_PG - reward_PG.mean(dim=1, keepdim=True)


@pytest.mark.parametrize(("normalize", "of"), [("true", normalized), ("false", centered)])
def test_advantages_are_the_weighted_sum_of_what_normalize_makes_of_each_reward(
    normalize: str, of: Any, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "normalize_rewards.py").write_text(
        "def redness(images, prompts):\n    return images[:, 0].mean(dim=(1, 2)).tolist()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scored: list[types.Rewards] = []
    trained: list[Tensor] = []
    of_groups, update = Rewards.of_groups, Update.__call__

    def keep_scores(self: Rewards, *arguments: Any) -> types.Rewards:
        scored.append(of_groups(self, *arguments))
        return scored[-1]

    def keep_advantages(
        self: Update, trained_on: Any, conditions: Any, advantages_B: Tensor, *rest: Any, **by: Any
    ) -> Any:
        trained.append(advantages_B)
        return update(self, trained_on, conditions, advantages_B, *rest, **by)

    monkeypatch.setattr(Rewards, "of_groups", keep_scores)
    monkeypatch.setattr(Update, "__call__", keep_advantages)
    config = make_config(tiny_weights, tmp_path / "run", *REWARD, f"reward.normalize={normalize}")
    build_trainer(config).step()
    named_PG = scored[0].named
    expected_PG = sum(weight * of(named_PG[name]) for name, weight in WEIGHTS.items())
    assert isinstance(expected_PG, Tensor)
    torch.testing.assert_close(trained[0].view(expected_PG.shape), expected_PG.clamp(-5, 5), atol=1e-4, rtol=1e-4)
    # the two ways are told apart
    other = centered if of is normalized else normalized
    others_PG = sum(weight * other(named_PG[name]) for name, weight in WEIGHTS.items())
    assert (expected_PG - others_PG).abs().max() > 0.1
