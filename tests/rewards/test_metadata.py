"""What a row of a prompt file says reaches the rewards that ask for it, and no others: who asks, and by which ways."""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgrpo.config import load_config
from fastgrpo.parts import build_rewards
from fastgrpo.rewards.custom import from_path
from fastgrpo.rewards.golden import GoldenSet, golden_set
from fastgrpo.rewards.remote.http_reward import HttpReward
from fastgrpo.rewards.remote.limits import Limits
from fastgrpo.rewards.remote.wire import to_pixels, to_png, write_request
from fastgrpo.rewards.reward import Reward, RewardError, answer_of, asks_for_metadata
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.rewards.self_test import golden_scores, self_test
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.types import Prompt
from tests.rewards.remote.scripted import Scripted, redness, served, some_images

# rows of one text, which only their metadata tells apart
ASKED = [Prompt("a circle", metadata={"n": n, "include": [{"class": "circle", "count": n}]}) for n in range(5)]
IMAGES = some_images(5)
EXPECTED = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])


def by_place(images: Tensor, prompts: list[str], rows: list[dict[str, Any]]) -> list[int]:
    return [row["n"] for row in rows]


def by_name(images: Tensor, prompts: list[str], strict: bool = False, metadata: Any = None) -> list[int]:
    assert strict is False
    return [row["include"][0]["count"] for row in metadata]


def by_keyword(images: Tensor, prompts: list[str], *, metadata: list[dict[str, Any]]) -> list[int]:
    return [row.pop("n") for row in metadata]


def positional_alone(images: Tensor, prompts: list[str], metadata: Any = None, /) -> list[int]:
    return by_place(images, prompts, metadata)


@dataclass(frozen=True)
class Judge:
    bonus: int = 0

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[int]:
        return [row["n"] + self.bonus for row in metadata]


class Network(nn.Module):
    def forward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return torch.tensor(by_place(images, prompts, metadata))


def plain(images: Tensor, prompts: list[str], only_strict: bool = True) -> Tensor:
    assert only_strict is True
    return images[:, 0].mean(dim=(1, 2))


def anything(*arguments: Any, **others: Any) -> Tensor:
    assert len(arguments) == 2
    assert not others
    return plain(*arguments)


class Plain(nn.Module):
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return plain(images, prompts)


ASKING = [by_place, by_name, by_keyword, positional_alone, Judge(), Judge(bonus=0).__call__, Network()]
ASKING += [partial(by_name, strict=False)]
OTHERS = [plain, anything, redness, Plain(), partial(plain, only_strict=True)]


def rewards_of(reward: Reward, **settings: Any) -> Rewards:
    scoring = Scoring(micro_batch=2, retries=0)
    return Rewards(terms={"mine": reward}, weights={"mine": 1.0}, scoring=scoring, **settings)


@pytest.mark.parametrize("reward", ASKING)
def test_a_reward_that_asks_is_given_the_metadata_of_each_image(reward: Any) -> None:
    assert asks_for_metadata(reward)
    # in batches of two, with a copy that it may spoil
    for _ in range(2):
        assert torch.equal(rewards_of(reward).score(IMAGES, ASKED), EXPECTED)
    assert torch.equal(Scoring(micro_batch=2)("mine", reward, IMAGES, ASKED), EXPECTED)
    found = rewards_of(reward)(IMAGES.repeat_interleave(2, 0), ASKED).named["mine"]
    assert torch.equal(found, EXPECTED[:, None].expand(5, 2))


@pytest.mark.parametrize("reward", OTHERS)
def test_a_reward_that_does_not_ask_is_called_as_ever(reward: Any) -> None:
    assert not asks_for_metadata(reward)
    assert torch.equal(rewards_of(reward).score(IMAGES, ASKED), IMAGES[:, 0].mean(dim=(1, 2)))


def test_a_text_alone_has_no_metadata() -> None:
    seen: list[Any] = []

    def note(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        seen.append(metadata)
        return torch.zeros(len(prompts))

    rewards_of(note).score(IMAGES[:2], ["a", Prompt("b", metadata={"x": 1})])
    assert seen == [[{}, {"x": 1}]]


def test_a_function_of_a_users_file_may_take_a_third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asking_rewards.py").write_text(
        "def third(images, prompts, metadata):\n    return [row['n'] for row in metadata]\n\n\n"
        "def fourth(images, prompts, metadata, scale):\n    return [0.0 for row in metadata]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert answer_of(from_path("asking_rewards.third"), IMAGES, ASKED) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"or as reward\(images, prompts, metadata\) if it takes a third; give it"):
        from_path("asking_rewards.fourth")
    del sys.modules["asking_rewards"]


class Checks:
    def __call__(self, images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        return torch.zeros(len(prompts))

    def check_prompt(self, prompt: str, metadata: Any) -> None:
        if "n" not in metadata:
            raise ValueError("no n in its row")


def test_a_check_of_prompts_may_ask_too() -> None:
    rewards = rewards_of(Checks())
    rewards.check_prompts(ASKED)
    with pytest.raises(ValueError, match="reward 'mine' cannot judge the prompt 'b': no n in its row"):
        rewards.check_prompts([*ASKED, "b"])


class Known(Judge):
    scenes = golden_set()
    golden_set = GoldenSet("own", scenes.images_BCHW, scenes.prompts, [{"n": n * n} for n in range(8)])


class Remote(Judge):
    golden_set = "prompts"


def test_golden_pairs_of_its_own_have_metadata() -> None:
    assert golden_scores(rewards_of(Known()), "cpu")["mine"].scores == [0, 1, 4, 9, 16, 25, 36, 49]


def test_without_pairs_of_its_own_it_is_tried_on_rows_of_the_run_and_must_answer() -> None:
    seen: list[Any] = []

    def note(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        seen.extend(zip(prompts, metadata, strict=True))
        return torch.tensor([0.0 for row in metadata if row["n"] >= 0])

    # the images are of other prompts: it may answer 0 to all, and nothing is recorded
    assert self_test(rewards_of(note), "cpu", ASKED) == {}
    assert seen == [(prompt.text, prompt.metadata) for prompt in [*ASKED, *ASKED[:3]]]
    with pytest.raises(RewardError, match="'mine' raised KeyError: 'n'"):
        self_test(rewards_of(Judge()), "cpu", ["a circle"])
    with pytest.raises(RewardError, match="'mine' raised KeyError: 'n'"):
        self_test(rewards_of(Remote()), "cpu", ["a circle"])
    # where nobody has prompts there is nothing to try it on
    assert self_test(rewards_of(Judge()), "cpu") == {}


def test_it_is_tried_on_the_rows_of_a_run_before_that() -> None:
    config = load_config("evaluate", ["reward=custom", "reward.path=tests.rewards.test_metadata.by_place"])
    assert build_rewards(config, ASKED)[1] == {}
    with pytest.raises(RewardError, match=r"'custom' raised KeyError: 'n', at tests/rewards/test_metadata\.py"):
        build_rewards(config, [*ASKED, Prompt("b", metadata={"m": 1})])


def test_over_http_each_image_has_the_metadata_of_its_prompt() -> None:
    with served({"judge": Judge(), "plain": redness}) as url:
        for batch in (2, 16):
            remote = HttpReward(endpoints=[url], name="judge", batch=batch)
            assert torch.equal(rewards_of(remote).score(IMAGES, ASKED), EXPECTED)
            assert torch.equal(answer_of(remote, IMAGES, ASKED), EXPECTED)
        # a server's reward that does not ask is not given it
        remote = HttpReward(endpoints=[url], name="plain")
        torch.testing.assert_close(rewards_of(remote).score(IMAGES, ASKED), redness(IMAGES, []), atol=1e-6, rtol=0)


def test_geneval_is_sent_the_fields_of_its_rows_and_a_server_of_before_nothing_new(tmp_path: Path) -> None:
    server = Scripted()
    remote = HttpReward(endpoints=[server.url], name="geneval", golden_set="none")
    rewards_of(remote).score(IMAGES[:2], ASKED[1:3])
    rewards_of(remote).score(IMAGES[:1], ["a circle"])
    with_fields, without = (asked.content for asked in server.asked)
    assert with_fields["metadata"] == [ASKED[1].metadata, ASKED[2].metadata]
    assert with_fields["prompts"] == ["a circle", "a circle"]
    assert without.keys() == {"images", "prompts"}


@pytest.mark.parametrize("metadata", [[{}], [{}, {}, {}], [{}, 3], {"a": {}, "b": {}}, "ab", None])
def test_a_server_refuses_metadata_that_is_not_one_object_a_prompt(metadata: Any) -> None:
    body = json.loads(write_request([to_png(pixels) for pixels in to_pixels(IMAGES[:2])], ASKED[:2]))
    assert Limits().read_request(json.dumps(body).encode())[1] == ASKED[:2]
    with pytest.raises(ValueError, match="metadata, if there is any, must be 2 objects"):
        Limits().read_request(json.dumps(body | {"metadata": metadata}).encode())
