"""The weighted sum against hand-computed numbers, and what it does with answers that cannot be trained on."""

import inspect

import pytest
import torch
from torch import Tensor

from fastgrpo.rewards.reward import RewardError
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.rewards.weighted_sum import Rewards

# two prompts, three images each; every image is one constant
VALUES = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.6, 0.7])
IMAGES = VALUES[:, None, None, None].expand(6, 3, 4, 4).contiguous()


def brightness(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    return images_BCHW.mean(dim=(1, 2, 3))


def length(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    return torch.tensor([len(prompt) for prompt in prompts])


def test_total_is_the_weighted_sum_and_watched_rewards_stay_out_of_it() -> None:
    rewards = Rewards(
        terms={"bright": brightness, "length": length},
        weights={"bright": 2.0, "length": -0.5},
        watch={"again": brightness},
    )
    answer = rewards(IMAGES, ["ab", "abcd"])
    expected_total_PG = torch.tensor([[-1.0, -0.8, -0.6], [-1.0, -0.8, -0.6]])
    torch.testing.assert_close(answer.total_PG, expected_total_PG)
    torch.testing.assert_close(answer.named["bright"], VALUES.reshape(2, 3))
    torch.testing.assert_close(answer.named["length"], torch.tensor([[2.0, 2.0, 2.0], [4.0, 4.0, 4.0]]))
    torch.testing.assert_close(answer.named["again"], answer.named["bright"])
    assert list(answer.named) == ["bright", "length", "again"]


def test_normalized_rewards_count_by_their_weights_whatever_their_scale() -> None:
    """GDPO by hand: each reward's z-scores within its group, weighted and added."""

    def small(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return 1e-2 * torch.tensor([0.0, 1.0, 2.0, 7.0, 7.0, 7.0])

    def large(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return 1e4 * torch.tensor([3.0, 3.0, 0.0, 1.0, 0.0, -1.0])

    rewards = Rewards(terms={"small": small, "large": large}, weights={"small": 2.0, "large": 1.0}, normalize=True)
    answer = rewards(IMAGES, ["a", "b"])
    # population std: of (0, 1, 2) sqrt(2/3), of (3, 3, 0) sqrt(2), of equal rewards 0, of (1, 0, -1) sqrt(2/3)
    steps, half = (2 / 3) ** -0.5, 0.5**0.5
    small_G = [-2 * steps * 0.00816497 / 0.00826497, 0.0, 2 * steps * 0.00816497 / 0.00826497]
    expected_PG = torch.tensor(
        [[small_G[0] + half, small_G[1] + half, small_G[2] - 2 * half], [steps, 0.0, -steps]],
    )
    torch.testing.assert_close(answer.learned_PG, expected_PG, atol=1e-5, rtol=0)
    # what is logged, and what a search compares over its rounds, is the plain sum
    plain = 2 * small(IMAGES, []) + large(IMAGES, [])
    torch.testing.assert_close(answer.total_PG.flatten(), plain)
    torch.testing.assert_close(rewards.score(IMAGES, ["a"] * 6), plain)


def test_without_normalization_the_total_is_what_is_learned() -> None:
    answer = Rewards(terms={"bright": brightness}, weights={"bright": 2.0})(IMAGES, ["a", "b"])
    assert torch.equal(answer.learned_PG, answer.total_PG)


def test_score_is_the_total_and_asks_no_watched_reward() -> None:
    def never(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        raise AssertionError("a watched reward was asked by a search")

    rewards = Rewards(terms={"bright": brightness}, weights={"bright": 3.0}, watch={"never": never})
    torch.testing.assert_close(rewards.score(IMAGES, ["a"] * 6), 3 * VALUES)


@pytest.mark.parametrize("micro_batch", [1, 4, 6, 100])
def test_micro_batches_are_small_enough_and_change_nothing(micro_batch: int) -> None:
    sizes = []

    def counted(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        sizes.append(len(prompts))
        return brightness(images_BCHW, prompts) + length(images_BCHW, prompts)

    rewards = Rewards(terms={"counted": counted}, weights={"counted": 1.0}, scoring=Scoring(micro_batch=micro_batch))
    answer = rewards(IMAGES, ["ab", "abcd"])
    torch.testing.assert_close(answer.total_PG.flatten(), VALUES + torch.tensor([2.0, 2, 2, 4, 4, 4]))
    assert max(sizes) <= micro_batch
    assert sum(sizes) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_names_image_and_prompt(value: float) -> None:
    def spoiled(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return torch.where(brightness(images_BCHW, prompts) == 0.5, value, 1.0)

    rewards = Rewards(
        terms={"good": brightness, "spoiled": spoiled},
        weights={"good": 1.0, "spoiled": 1.0},
        scoring=Scoring(micro_batch=2),
    )
    with pytest.raises(RewardError, match=rf"'spoiled' answered {value} for image 3 \('second'\); 1 of its 6 answers"):
        rewards(IMAGES, ["first", "second"])


class FailsTwice:
    """A reward server that comes back."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        self.calls += 1
        if self.calls <= 2:
            raise ConnectionError("the server is away")
        return brightness(images_BCHW, prompts)


def test_a_reward_that_recovers_within_its_retries_is_used() -> None:
    reward = FailsTwice()
    rewards = Rewards(terms={"server": reward}, weights={"server": 1.0}, scoring=Scoring(retries=2, retry_seconds=0))
    torch.testing.assert_close(rewards(IMAGES, ["a"]).total_PG, VALUES[None])
    assert reward.calls == 3


def test_a_reward_that_fails_once_too_often_stops_with_its_name_and_cause() -> None:
    rewards = Rewards(
        terms={"server": FailsTwice()}, weights={"server": 1.0}, scoring=Scoring(retries=1, retry_seconds=0)
    )
    with pytest.raises(RewardError, match=r"'server' raised ConnectionError: the server is away, 2 times") as caught:
        rewards(IMAGES, ["a"])
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_no_gradient_flows_out_of_a_reward() -> None:
    rewards = Rewards(terms={"bright": brightness}, weights={"bright": 1.0})
    assert not rewards.score(IMAGES.clone().requires_grad_(), ["a"] * 6).requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"terms": {}, "weights": {}}, "no reward to train on"),
        ({"weights": {"other": 1.0}}, "give every term one weight"),
        ({"watch": {"bright": brightness}}, "name the watched ones differently"),
        ({"terms": {"bright": 3}}, "cannot be called"),
        ({"weights": {"bright": 0.0}}, r"reward\.weights are 0 for bright, so nothing would be learned"),
        ({"weights": {"bright": float("nan")}}, r"reward\.weights\.bright must be a finite number, got nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewards(**{"terms": {"bright": brightness}, "weights": {"bright": 1.0}, **settings})


def test_images_that_prompts_do_not_divide_are_refused() -> None:
    rewards = Rewards(terms={"bright": brightness}, weights={"bright": 1.0})
    with pytest.raises(ValueError, match="6 images are not a whole number"):
        rewards(IMAGES, ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="1 prompts; give every image one"):
        rewards.score(IMAGES, ["a"])


def test_prompts_that_a_reward_cannot_judge_are_named_before_any_image_is_made() -> None:
    class Fussy:
        def check_prompt(self, prompt: str) -> None:
            if "cat" not in prompt:
                raise ValueError("there is no cat in it")

        def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
            return brightness(images_BCHW, prompts)

    rewards = Rewards(terms={"bright": brightness}, weights={"bright": 1.0}, watch={"fussy": Fussy()})
    rewards.check_prompts(["a cat", "two cats"])
    with pytest.raises(ValueError, match="reward 'fussy' cannot judge the prompt 'a dog': there is no cat in it"):
        rewards.check_prompts(["a cat", "a dog"])


def test_a_mistake_in_a_check_of_prompts_is_told_with_its_line() -> None:
    class Mistaken:
        def check_prompt(self, prompt: str) -> None:
            prompt.undefined  # type: ignore[attr-defined]  # noqa: B018

        __call__ = staticmethod(brightness)

    rewards = Rewards(terms={"bright": Mistaken()}, weights={"bright": 1.0})
    line = inspect.getsourcelines(Mistaken.check_prompt)[1] + 1
    with pytest.raises(
        ValueError, match=rf"check_prompt of reward 'bright' raised Attr.* 'a dog': .*, line {line}; co"
    ):
        rewards.check_prompts(["a dog"])
