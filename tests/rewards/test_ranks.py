"""Ranks that only score: the scores of a reward beside the policy, to the bit, and failures that reach who asked."""

import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from benchmarks.rounding import metric_differences
from fastgrpo.distributed.world import RankFailure, World
from fastgrpo.records.json_lines import read_rows
from fastgrpo.rewards import rank_line
from fastgrpo.rewards.jpeg import JpegSize
from fastgrpo.rewards.ranks import PolicyRank, RankedReward, ScoringRank, take_part
from fastgrpo.rewards.reward import RewardError
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.rewards.self_test import GoldenScores
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.training import train
from fastgrpo.types import Prompt
from tests.ranks import Ranks, ranks_of_module
from tests.tiny_config import make_config

PROMPTS = ["a red circle", "zwei blaue Quadrate", "丸"]
GROUP_SIZE = 4
GOLDEN = {"network": GoldenScores(identity="network 1", scores=[0.1, 0.7], tolerance=0.02)}


# ``take_part`` itself joins
on_ranks = ranks_of_module(joined=False)


def network(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    """A convolution of the images, its sum weighted by the length of the text."""
    weight = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    features_BC = torch.nn.functional.conv2d(images_BCHW, weight).tanh().mean(dim=(2, 3))
    return features_BC.sum(dim=1) * torch.tensor([float(len(text)) for text in prompts])


def fails_on_circles(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    if any("circle" in text for text in prompts):
        raise ArithmeticError("a circle cannot be squared")
    return network(images_BCHW, prompts)


def make_rewards() -> Rewards:
    return Rewards(
        terms={"network": network, "size": JpegSize(maximize=True)},
        weights={"network": 0.7, "size": 0.1},
        watch={"fails_on_circles": fails_on_circles},
        # 5 images cut differently from 4 a prompt; a reward that fails is not asked again
        scoring=Scoring(micro_batch=5, threads=3, retries=0),
    )


def make_images(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(len(PROMPTS) * GROUP_SIZE, 3, 32, 32, generator=generator)


def without_failing(rewards: Rewards) -> Rewards:
    return replace(rewards, watch={})


def ranked(part: PolicyRank) -> Rewards:
    own = make_rewards()
    return replace(own, terms=part.rewards(own.terms), watch=part.rewards(own.watch))


def score_own(world: World, num_scoring: int) -> tuple[int, int, Tensor] | None:
    part = take_part("cpu", 30, num_scoring)
    if isinstance(part, ScoringRank):
        part.serve(lambda: (make_rewards(), GOLDEN))
        return None
    with part:
        assert part.golden_scores() == GOLDEN
        # twice, since a run asks again and again; in portions, as a rollout adds them
        for images_BCHW in (make_images(100), make_images(part.world.rank)):
            scores = without_failing(ranked(part)).begin([text for text in PROMPTS for _ in range(GROUP_SIZE)])
            for portion in images_BCHW.split([3, 7, 2]):
                scores.add(portion)
            rewards_BR = scores.collect()
        # the policy ranks are a world of their own
        part.world.sum_([total := torch.ones(1)], "policy ranks")
        return part.world.size, int(total), rewards_BR


def from_metadata(images_BCHW: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([10.0 * row["of"] + row["n"][0] for row in metadata])


def score_by_metadata(world: World) -> Tensor | None:
    rewards = Rewards(terms={"mine": from_metadata}, weights={"mine": 1.0}, watch={"plain": network})
    part = take_part("cpu", 30, 1)
    if isinstance(part, ScoringRank):
        part.serve(lambda: (rewards, {}))
        return None
    with part:
        part.golden_scores()
        asked = replace(rewards, terms=part.rewards(rewards.terms), watch=part.rewards(rewards.watch))
        rows = [Prompt("a circle", metadata={"of": part.world.rank, "n": [n]}) for n in range(3)]
        return asked(torch.zeros(6, 3, 8, 8), rows).named["mine"]


def test_metadata_reaches_a_reward_on_another_rank(on_ranks: Ranks) -> None:
    first, second, _ = on_ranks(3, score_by_metadata)
    assert first.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert second.tolist() == [[10, 10], [11, 11], [12, 12]]


@pytest.mark.parametrize(("num_policy", "num_scoring"), [(3, 1), (2, 2)])
def test_scoring_ranks_give_the_scores_of_local_rewards_to_the_bit(
    num_policy: int, num_scoring: int, on_ranks: Ranks
) -> None:
    found = on_ranks(num_policy + num_scoring, score_own, num_scoring)
    assert found[num_policy:] == [None] * num_scoring
    for rank in range(num_policy):
        size, total, rewards_BR = found[rank]
        assert (size, total) == (num_policy, num_policy)
        expected = without_failing(make_rewards())(make_images(rank), PROMPTS).named.values()
        assert torch.equal(rewards_BR, torch.stack([reward_PG.flatten() for reward_PG in expected], dim=1))


def test_without_scoring_ranks_the_world_stays_whole() -> None:
    part = take_part("cpu", 30, 0)
    assert isinstance(part, PolicyRank)
    assert part.world.size == 1
    assert part.scores_itself


@pytest.mark.parametrize("num_scoring", [-1, 3])
def test_more_scoring_than_policy_ranks_are_refused(num_scoring: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(
        ValueError, match=rf"reward_ranks must lie in 0 to 2, .* 5 ranks .* got {num_scoring}; start more"
    ):
        take_part("cpu", 30, num_scoring)


def fail_then_go_on(world: World) -> tuple[str, bool] | None:
    part = take_part("cpu", 30, 1)
    if isinstance(part, ScoringRank):
        part.serve(lambda: (make_rewards(), {}))
        return None
    with part:
        part.golden_scores()
        with pytest.raises(RewardError) as raised:
            ranked(part)(make_images(0), PROMPTS)
        scores_B = part.rewards(["fails_on_circles"])["fails_on_circles"](make_images(0)[:2], ["a square", "丸"])
        return str(raised.value), torch.equal(scores_B, network(make_images(0)[:2], ["a square", "丸"]))


def test_what_a_reward_raises_reaches_who_asked_with_its_traceback_and_the_scoring_rank_goes_on(
    on_ranks: Ranks,
) -> None:
    (text, is_equal), *_ = on_ranks(3, fail_then_go_on)
    assert text.startswith("reward 'fails_on_circles' raised ArithmeticError: a circle cannot be squared, at tests/")
    assert "raised on scoring rank 2 on " in text
    assert "in fails_on_circles" in text
    assert is_equal


def fail_to_build(world: World, error: type[Exception]) -> str:
    def build() -> tuple[Rewards, dict[str, GoldenScores]]:
        raise error("weights.pt does not exist")

    part = take_part("cpu", 30, 1)
    run = partial(part.serve, build) if isinstance(part, ScoringRank) else part.golden_scores
    with pytest.raises(Exception, match="does not exist") as raised:
        run()
    return f"{type(raised.value).__name__}: {raised.value}"


@pytest.mark.parametrize(
    ("error", "expected"), [(ValueError, "ValueError"), (RewardError, "RewardError"), (OSError, "RewardError")]
)
def test_rewards_that_cannot_be_built_stop_the_policy_ranks_too(
    error: type[Exception], expected: str, on_ranks: Ranks
) -> None:
    first, second, scoring = on_ranks(3, fail_to_build, error)
    assert scoring == f"{error.__name__}: weights.pt does not exist"
    assert first == second
    assert first.startswith(f"{expected}: scoring rank 2 on ")
    assert first.endswith("could not build its rewards: weights.pt does not exist")


@mock.patch.object(rank_line, "GOODBYE_SECONDS", 1.0)
def fail_before_the_greeting(world: World) -> tuple[str, float]:
    part = take_part("cpu", 30, 1)
    began = time.monotonic()
    if isinstance(part, ScoringRank):
        run = partial(part.serve, lambda: (make_rewards(), {}))
    else:
        run = partial(leave_at_once, part)
    with pytest.raises((KeyError, RankFailure)) as raised:
        run()
    return type(raised.value).__name__, time.monotonic() - began


def leave_at_once(part: PolicyRank) -> None:
    with part:
        raise KeyError("a mistake in the policy's config")


def test_a_policy_rank_that_fails_while_its_rewards_load_ends_both(on_ranks: Ranks) -> None:
    (policy, policy_seconds), (scoring, scoring_seconds) = on_ranks(2, fail_before_the_greeting)
    assert (policy, scoring) == ("KeyError", "RankFailure")
    assert max(policy_seconds, scoring_seconds) < 10


def be_idle(world: World) -> list[float] | None:
    part = take_part("cpu", 1.5, 1)
    if isinstance(part, ScoringRank):
        time.sleep(1.8)
        part.serve(lambda: (make_rewards(), {}))
        return None
    with part:
        part.golden_scores()
        time.sleep(2)
        return part.rewards(["network"])["network"](make_images(0)[:1], PROMPTS[:1]).tolist()


def test_neither_slow_loading_nor_long_silence_times_out(on_ranks: Ranks) -> None:
    found, _ = on_ranks(2, be_idle)
    assert found == network(make_images(0)[:1], PROMPTS[:1]).tolist()


def be_stopped(world: World) -> list[float] | None:
    part = take_part("cpu", 30, 1)
    if isinstance(part, ScoringRank):

        def build() -> tuple[Rewards, dict[str, GoldenScores]]:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            return make_rewards(), {}

        part.serve(build)
        # outside, a signal ends the process again
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        return None
    with part:
        part.golden_scores()
        return part.rewards(["network"])["network"](make_images(0)[:1], PROMPTS[:1]).tolist()


def test_a_signal_that_stops_the_run_leaves_its_rewards_to_the_policy_ranks(on_ranks: Ranks) -> None:
    found, _ = on_ranks(2, be_stopped)
    assert found == network(make_images(0)[:1], PROMPTS[:1]).tolist()


def ask_who_dies(world: World) -> tuple[float, str] | None:
    def dies(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return network(images_BCHW, prompts)

    part = take_part("cpu", 30, 1)
    if isinstance(part, ScoringRank):
        part.serve(lambda: (replace(make_rewards(), watch={"dies": dies}), {}))
        return None
    with part:
        part.golden_scores()
        began = time.monotonic()
        with pytest.raises(RewardError) as raised:
            part.rewards(["dies"])["dies"](make_images(0), PROMPTS * GROUP_SIZE)
        return time.monotonic() - began, str(raised.value)


def test_a_scoring_rank_that_is_killed_fails_the_question_at_once(on_ranks: Ranks) -> None:
    (seconds, text), _ = on_ranks(2, ask_who_dies, killed=[1])
    assert text.startswith("reward 'dies': scoring rank 1 is gone, or gave no answer in time: ")
    assert seconds < 10


still_open: list[PolicyRank] = []


def leave_without_goodbye(world: World) -> str:
    part = take_part("cpu", 30, 1)
    if isinstance(part, ScoringRank):
        with pytest.raises(RankFailure) as raised:
            part.serve(lambda: (make_rewards(), {}))
        return str(raised.value)
    part.golden_scores()
    if part.world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    # this one's connections stay open until its process ends
    still_open.append(part)
    return ""


def test_a_policy_rank_that_is_killed_ends_its_scoring_rank_at_once(on_ranks: Ranks) -> None:
    _, _, text = on_ranks(3, leave_without_goodbye, killed=[1], seconds=20)
    assert text.startswith("policy rank 1 is gone without a goodbye: ")


def test_a_ranked_reward_is_asked_in_threads_and_tried_on_its_own_rank() -> None:
    assert RankedReward.in_thread
    assert RankedReward.golden_set == "none"


def train_run(world: World, config: DictConfig) -> None:
    # curves take longer than training
    with mock.patch("fastgrpo.records.metrics.draw_curves"):
        train(config)


def test_a_run_with_scoring_ranks_is_the_run_without(tiny_weights: Path, tmp_path: Path, on_ranks: Ranks) -> None:
    config = make_config(tiny_weights, tmp_path / "run", "train.iterations=2", "algorithm=smart_grpo_paper")
    found: list[list[dict[str, Any]]] = []
    for num_scoring in (0, 1):
        config.output, config.distributed.reward_ranks = str(tmp_path / str(num_scoring)), num_scoring
        on_ranks(2 + num_scoring, train_run, config)
        found.append(read_rows(tmp_path / str(num_scoring) / "metrics.jsonl"))
        assert len(found[-1]) == 3
    assert set(metric_differences(*found).values()) == {0.0}
