"""Groups that are made again: which, from which noises, and what their samples keep, beside a computation by hand."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.distributed.spread import Spread
from fastgrpo.parts import RunParts
from fastgrpo.retry import Made
from fastgrpo.rollout import StepRollout
from fastgrpo.trainer import Trainer
from fastgrpo.types import Samples, TrainedImages, TrainedSteps
from fastgrpo_kernels import combined, philox_normal
from tests.tiny_config import make_config, make_overrides

IMAGES = ("algorithm=nft", "algorithm.schedule.num_steps=3", "algorithm/noise=retries", "reward.golden=false")
STEPS = ("algorithm.noise.tries=2", "reward.golden=false")
SEED, G, P = 5, 3, 2


def below(success: float) -> tuple[str, str]:
    """Groups whose best image is worth no more are made again; no two rewards here are the same."""
    return "algorithm.noise.where=below", f"algorithm.noise.success={success}"


def make_trainer(weights: Path, output: Path, *words: str) -> Trainer:
    return build_trainer(make_config(weights, output, f"seed={SEED}", *words))


def made_first(trainer: Trainer, samples: Samples) -> Made:
    """The iteration's first images, as the trainer makes them."""
    conditions = trainer.model.encode(samples.texts)
    scores = trainer.rewards.begin(samples.texts)
    trajectories = trainer.rollout(samples, conditions, trainer.start_noise(samples), 0, scores.add)
    return Made(trajectories, scores.collect())


def retried(trainer: Trainer, samples: Samples, first: Made) -> Made:
    return trainer.retry(samples, Spread.evenly(len(samples), 1), 0, first)


@torch.no_grad()
def images_by_hand(trainer: Trainer, samples: Samples, attempt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Start noises, images and rewards [P, G] of an attempt: noise a * G + g of each prompt, by Euler's steps."""
    shape = trainer.model.latent_shape
    numel = shape[0] * shape[1] * shape[2]
    ids_G = torch.arange(attempt * G, (attempt + 1) * G)
    start_BCHW = philox_normal(SEED, 0, torch.tensor(samples.prompts.ids), ids_G, numel).view(-1, *shape)
    x_BCHW, conditions = start_BCHW, trainer.model.encode(samples.texts)
    for t, t_next in pairwise(trainer.algorithm.grid):
        x_BCHW = x_BCHW + (t_next - t) * combined(trainer.model.velocity(x_BCHW, t, conditions))
    images_BCHW = trainer.model.decode(x_BCHW)
    return start_BCHW, images_BCHW, trainer.rewards.score(images_BCHW, samples.texts).view(P, G)


def between(first_PG: Tensor, failing: int) -> float:
    """A threshold of success below which only the best image of one of two groups lies."""
    best = first_PG.max(dim=1).values
    assert best[failing] < best[1 - failing]
    return best.mean().item()


@pytest.fixture
def one_fails(tiny_weights: Path, tmp_path: Path) -> tuple[Trainer, Samples, int]:
    """A trainer whose first iteration has one group without success, and which."""
    trainer = make_trainer(tiny_weights, tmp_path / "probe", *IMAGES)
    samples = Samples.all_of(trainer.prompts.at(0), G)
    _, _, first_PG = images_by_hand(trainer, samples, 0)
    failing = int(first_PG.max(dim=1).values.argmin())
    success = between(first_PG, failing)
    words = (*below(success), "algorithm.noise.tries=1")
    return make_trainer(tiny_weights, tmp_path / "run", *IMAGES, *words), samples, failing


def test_a_group_without_success_keeps_the_better_image_of_each_sample(
    one_fails: tuple[Trainer, Samples, int],
) -> None:
    trainer, samples, failing = one_fails
    first = made_first(trainer, samples)
    made = retried(trainer, samples, first)
    starts, images, rewards = zip(*(images_by_hand(trainer, samples, attempt) for attempt in (0, 1)), strict=True)
    is_new_PG = rewards[1] > rewards[0]
    is_new_PG[1 - failing] = False
    # some of both, or nothing would be seen
    assert 0 < is_new_PG[failing].sum() < G
    is_new_B = is_new_PG.flatten()
    for found, of_attempts in (
        (made.trajectories.start_BCHW, starts),
        (made.trajectories.images_BCHW, images),
    ):
        expected = torch.where(is_new_B[:, None, None, None], of_attempts[1], of_attempts[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    total_B = torch.where(is_new_PG, rewards[1], rewards[0]).flatten()
    torch.testing.assert_close(made.rewards_BR[:, 0], total_B, rtol=1e-4, atol=1e-4)
    # what is trained on is the latent of the image that is kept
    assert isinstance(made.trajectories.trained, TrainedImages)
    assert made.trajectories.trained.samples is samples
    again = trainer.model.decode(made.trajectories.trained.x_0_BCHW)
    torch.testing.assert_close(again, made.trajectories.images_BCHW, rtol=1e-4, atol=1e-4)
    gain = (total_B.mean() - rewards[0].mean()).item()
    assert made.metrics == {
        "search/share": 0.5,
        "search/gain": pytest.approx(gain, rel=1e-3),
        "search/images": 0.5,
    }
    # what is shown of the search: the group that was made again, in both attempts
    assert [(one.places, one.is_of_images) for one in made.scored] == [((failing,), True), ((failing,), True)]
    for one, of_attempt in zip(made.scored, rewards, strict=True):
        torch.testing.assert_close(one.scores_PK, of_attempt[failing][None], rtol=1e-4, atol=1e-4)


def test_groups_with_success_cost_nothing(one_fails: tuple[Trainer, Samples, int]) -> None:
    trainer, samples, _ = one_fails
    object.__setattr__(trainer.algorithm.noise, "success", -1e6)
    first = made_first(trainer, samples)
    made = retried(trainer, samples, first)
    assert made.trajectories is first.trajectories
    assert made.rewards_BR is first.rewards_BR
    assert made.metrics == {"search/share": 0.0, "search/gain": 0.0, "search/images": 0.0}
    assert made.scored == ()


def test_tries_end_where_a_group_has_success_and_go_on_where_it_has_none(tiny_weights: Path, tmp_path: Path) -> None:
    words = (*below(1e6), "algorithm.noise.tries=3")
    trainer = make_trainer(tiny_weights, tmp_path / "never", *IMAGES, *words)
    samples = Samples.all_of(trainer.prompts.at(0), G)
    made = retried(trainer, samples, made_first(trainer, samples))
    rewards = torch.stack([images_by_hand(trainer, samples, attempt)[2] for attempt in range(4)])
    torch.testing.assert_close(made.rewards_BR[:, 0], rewards.max(dim=0).values.flatten(), rtol=1e-4, atol=1e-4)
    assert made.metrics["search/images"] == 3.0
    # a threshold that the second attempt of each group passes, if the first does not
    after_PG = rewards[:2].max(dim=0).values
    assert (after_PG.max(dim=1).values > rewards[0].max(dim=1).values).any()
    success = rewards[0].max().item() + 1e-6
    words = (*below(success), "algorithm.noise.tries=3")
    trainer = make_trainer(tiny_weights, tmp_path / "some", *IMAGES, *words)
    made = retried(trainer, samples, made_first(trainer, samples))
    best_TP = torch.stack([rewards[: n + 1].amax(dim=(0, 2)) for n in range(4)])
    num_tried = sum((best_TP[n] <= success).sum().item() for n in range(3))
    assert made.metrics["search/images"] == num_tried / P
    assert 0 < num_tried < 3 * P


def test_contrast_keeps_better_images_of_one_half_and_worse_ones_of_the_other(
    tiny_weights: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", *IMAGES, "algorithm/noise=best_and_worst")
    samples = Samples.all_of(trainer.prompts.at(0), G)
    made = retried(trainer, samples, made_first(trainer, samples))
    first_PG, second_PG = (images_by_hand(trainer, samples, attempt)[2] for attempt in (0, 1))
    best_PG, worst_PG = torch.maximum(first_PG, second_PG), torch.minimum(first_PG, second_PG)
    # of three the first two
    expected = torch.cat([best_PG[:, :2], worst_PG[:, 2:]], dim=1).flatten()
    torch.testing.assert_close(made.rewards_BR[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert made.metrics["search/share"] == made.metrics["search/images"] == 1.0


def test_another_try_may_start_from_the_noise_whose_estimate_is_best(tiny_weights: Path, tmp_path: Path) -> None:
    words = ("algorithm.noise.candidates=3", "algorithm.noise.estimate_steps=1", "algorithm.noise.where=everywhere")
    trainer = make_trainer(tiny_weights, tmp_path / "run", *IMAGES, *words, "algorithm.noise.tries=2")
    samples = Samples.all_of(trainer.prompts.at(0), G)
    shape = trainer.model.latent_shape
    big = Samples(samples.prompts, 3 * G, tuple(p * 3 * G + 2 * G + g for p in range(P) for g in range(G)))
    noise = trainer.start_noise.again(big, 0, [0, 1], 2)
    # the second try draws from a stream of its own
    drawn_PKCHW = philox_normal(SEED, 2, torch.tensor(samples.prompts.ids), torch.arange(9), math.prod(shape))
    drawn_PKCHW = drawn_PKCHW.view(P, 9, *shape)
    conditions = trainer.model.encode([text for text in samples.prompts.texts for _ in range(9)])
    with torch.no_grad():
        flat = drawn_PKCHW.flatten(0, 1)
        images = trainer.model.decode(flat - combined(trainer.model.velocity(flat, 1.0, conditions)))
    scores = trainer.rewards.score(images, [text for text in samples.prompts.texts for _ in range(9)])
    best_PG = scores.view(P, G, 3).argmax(dim=2) + 3 * torch.arange(G)
    expected = torch.stack([drawn_PKCHW[p, best_PG[p]] for p in range(P)]).flatten(0, 1)
    torch.testing.assert_close(noise.start_BCHW, expected)
    assert noise.num_scored == 18


def test_stored_steps_are_those_of_the_image_that_is_kept(tiny_weights: Path, tmp_path: Path) -> None:
    words = ("algorithm/noise=retries", *below(1e6), *STEPS)
    trainer = make_trainer(tiny_weights, tmp_path / "run", *words)
    samples = Samples.all_of(trainer.prompts.at(0), G)
    first = made_first(trainer, samples)
    # what is made again takes its place
    attempts = [deepcopy(first.trajectories)]
    made = retried(trainer, samples, first)
    trained = made.trajectories.trained
    assert isinstance(trained, TrainedSteps)
    rewards = [first.rewards_BR[:, 0]]
    for attempt in (1, 2):
        rows = tuple((p * 3 + attempt) * G + g for p in range(P) for g in range(G))
        again = Samples(samples.prompts, 3 * G, rows)
        scores = trainer.rewards.begin(again.texts)
        noise = trainer.start_noise.again(again, 0, [0, 1], attempt)
        attempts.append(trainer.rollout(again, trainer.model.encode(again.texts), noise, 0, scores.add))
        rewards.append(scores.collect()[:, 0])
    best_B = torch.stack(rewards).argmax(dim=0)
    assert len(set(best_B.tolist())) > 1
    for b, best in enumerate(best_B.tolist()):
        for found, expected in zip(trained.tensors, attempts[best].trained.tensors, strict=True):
            if len(found):
                assert torch.equal(found[:, b], expected[:, b])
    # the steps' noise of an attempt is its own as well
    eps = [a.trained.x_next_TBCHW[0] - a.trained.x_TBCHW[0] for a in attempts]
    assert not torch.allclose(eps[0], eps[1], atol=1e-2)


def test_an_iteration_learns_from_what_was_kept(
    one_fails: tuple[Trainer, Samples, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, samples, _ = one_fails
    made = retried(trainer, samples, made_first(trainer, samples))
    seen = []
    begin = trainer.update.replay.begin

    def spy(trained, *rest):
        seen.append(trained)
        return begin(trained, *rest)

    monkeypatch.setattr(type(trainer.update.replay), "begin", lambda self, *rest: spy(*rest))
    row = trainer.step()
    torch.testing.assert_close(seen[0].x_0_BCHW, made.trajectories.trained.x_0_BCHW, rtol=1e-4, atol=1e-4)
    assert row["reward/total"] == pytest.approx(made.rewards_BR[:, 0].mean().item(), rel=1e-4)
    assert row["search/share"] == 0.5
    assert row["seconds/search"] > 0


def test_what_cannot_be_made_again_is_refused(tiny_weights: Path, tmp_path: Path) -> None:
    words = ("algorithm/noise=retries", "train.gradients=reweight", "algorithm.objective.kl_coef=0")
    with pytest.raises(ValueError, match=r"makes some of them again; use train.gradients=replay"):
        RunParts.read(load_config("train", make_overrides(tiny_weights, tmp_path / "run", *words)))


def test_all_tries_are_the_old_policys(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "train.old_policy_growth=0.3",
        *below(1e6),
        "algorithm.noise.tries=2",
    )
    trainer = make_trainer(tiny_weights, tmp_path / "run", *IMAGES, *words)
    applied, seen = [False], []

    @contextmanager
    def marked() -> Iterator[None]:
        applied[0] = True
        yield
        applied[0] = False

    rollout = type(trainer.rollout).__call__

    def spy(self, *arguments, **settings):
        seen.append(applied[0])
        return rollout(self, *arguments, **settings)

    monkeypatch.setattr(trainer.old_policy, "applied", marked)
    monkeypatch.setattr(type(trainer.rollout), "__call__", spy)
    trainer.step()
    assert seen == [True] * 3


@pytest.mark.parametrize(
    ("signal", "num_rows", "most", "expected"),
    [
        # a batch of update's size at least, but no more rows than the first attempt had
        ("steps", 3, 12, 4),
        ("steps", 9, 12, 9),
        ("steps", 1, 2, 2),
        # quarters of sampling's batch, which is 12 here, or of all rows where they are less
        ("images", 4, 12, 6),
        ("images", 1, 12, 3),
        ("images", 11, 12, 12),
        ("images", 13, 24, 15),
        ("images", 1, 2, 1),
    ],
)
def test_samples_that_are_made_again_come_in_few_sizes(
    signal: str, num_rows: int, most: int, expected: int, tiny_weights: Path, tmp_path: Path
) -> None:
    words = IMAGES if signal == "images" else ("algorithm/noise=retries", *STEPS)
    sizes = ("train.prompts_per_iteration=4", "runtime.sampling_batch=12")
    trainer = make_trainer(tiny_weights, tmp_path / "run", *words, *sizes)
    assert trainer.retry._filled(num_rows, most) == expected


def test_a_single_group_is_stored_in_batches_of_updates_size(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 groups of 3, in batches of 4: the ratio is 1 because rollout and update compute alike."""
    words = ("algorithm/noise=retries", *STEPS, "train.prompts_per_iteration=4")
    trainer = make_trainer(tiny_weights, tmp_path / "run", *words)
    monkeypatch.setattr(type(trainer.algorithm.noise), "groups", lambda self, total_PG: [2])
    sizes: list[int] = []
    rollout = trainer.rollout
    assert isinstance(rollout, StepRollout)
    stochastic = type(rollout)._stochastic

    def spy(self, x_BCHW, *rest):
        sizes.append(len(x_BCHW))
        return stochastic(self, x_BCHW, *rest)

    monkeypatch.setattr(type(rollout), "_stochastic", spy)
    row = trainer.step()
    # three batches, and one for each of two tries
    assert sizes == [4] * 5
    assert row["ratio_deviation"] == 0
