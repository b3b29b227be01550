"""Images that arrive in portions: the same answers as all at once, threads beside the rollout, and what stops them."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import OutOfMemoryError, Tensor

from fastgrpo.rewards.reward import Reward, RewardError
from fastgrpo.rewards.scores import Scores
from fastgrpo.rewards.scoring import Scoring

NUM_IMAGES = 11
NAN = float("nan")
IMAGES = torch.rand(NUM_IMAGES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
TEXTS = ["a" * (i + 1) for i in range(NUM_IMAGES)]


def light(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    lengths_B = torch.tensor([float(len(text)) for text in prompts], device=images_BCHW.device)
    return images_BCHW.mean(dim=(1, 2, 3)) + lengths_B


EXPECTED = light(IMAGES, TEXTS)


class InThread:
    """``light`` in a thread; counts how many of its calls run at a time."""

    in_thread = True

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.running, self.most, self.threads = seconds, 0, 0, set[int]()
        self.lock = threading.Lock()

    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        with self.lock:
            self.running -= 1
        assert images_BCHW.device.type == "cpu"
        return light(images_BCHW, prompts)


def begin(rewards: dict[str, Reward], **settings: Any) -> Scores[dict[str, Tensor]]:
    return Scores(Scoring(**{"retry_seconds": 0.0, **settings}), rewards, TEXTS, dict)


def portions(sizes: list[int]) -> Iterator[Tensor]:
    assert sum(sizes) == NUM_IMAGES
    return iter(IMAGES.split(sizes))


@pytest.mark.parametrize("sizes", [[11], [1] * 11, [3, 5, 2, 1], [0, 10, 0, 1]], ids=str)
@pytest.mark.parametrize("micro_batch", [1, 4, 11, 64])
def test_portions_change_neither_answers_nor_micro_batches(sizes: list[int], micro_batch: int) -> None:
    asked = []

    def counted(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        asked.append(len(prompts))
        return light(images_BCHW, prompts)

    scores = begin({"counted": counted, "threaded": InThread()}, micro_batch=micro_batch)
    for portion in portions(sizes):
        scores.add(portion)
    answers = scores.collect()
    assert torch.equal(answers["counted"], EXPECTED)
    assert torch.equal(answers["threaded"], EXPECTED)
    whole, rest = divmod(NUM_IMAGES, micro_batch)
    assert asked == [micro_batch] * whole + [rest] * bool(rest)


def test_images_of_unlike_sizes_are_asked_about_apart_in_their_order() -> None:
    parts = [torch.rand(n, 3, *size) for n, size in ((3, (4, 8)), (0, (4, 8)), (2, (4, 8)), (6, (8, 4)))]
    asked = []

    def counted(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        asked.append(tuple(images_BCHW.shape[2:]) * len(prompts))
        return light(images_BCHW, prompts)

    scores = begin({"counted": counted, "threaded": InThread()}, micro_batch=4)
    for part in parts:
        scores.add(part)
    answers = scores.collect()
    expected = torch.cat([part.mean(dim=(1, 2, 3)) for part in parts]) + torch.arange(1.0, NUM_IMAGES + 1)
    torch.testing.assert_close(answers["counted"], expected)
    torch.testing.assert_close(answers["threaded"], expected)
    assert asked == [(4, 8) * 4, (4, 8), (8, 4) * 4, (8, 4) * 2]


def test_threads_work_while_images_are_still_to_come() -> None:
    reward = InThread()
    scores = begin({"threaded": reward}, micro_batch=4)
    scores.add(IMAGES[:8])
    deadline = time.monotonic() + 5
    while not reward.threads and time.monotonic() < deadline:
        time.sleep(0.001)
    assert reward.threads
    assert threading.get_ident() not in reward.threads
    scores.add(IMAGES[8:])
    assert torch.equal(scores.collect()["threaded"], EXPECTED)


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_micro_batches_are_out_than_there_are_threads(threads: int) -> None:
    reward = InThread(seconds=0.02)
    scores = begin({"threaded": reward}, micro_batch=1, threads=threads)
    scores.add(IMAGES)
    assert torch.equal(scores.collect()["threaded"], EXPECTED)
    assert reward.most == threads


@pytest.mark.parametrize("in_thread", [False, True])
def test_what_a_reward_raises_is_raised_where_its_scores_are_wanted(in_thread: bool) -> None:
    class Broken:
        def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
            raise ConnectionError("the judge is away")

    broken = Broken()
    broken.in_thread = in_thread  # type: ignore[attr-defined]
    scores = begin({"good": light, "judge": broken}, micro_batch=4, retries=1)
    scores.add(IMAGES)
    with pytest.raises(RewardError, match=r"'judge' raised ConnectionError: the judge is away, 2 times on the same 4"):
        scores.collect()


def test_a_run_that_ends_does_not_wait_for_a_judge_that_hangs() -> None:
    hanging = threading.Event()

    class Hanging(InThread):
        def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
            hanging.wait()
            return light(images_BCHW, prompts)

    scores = begin({"judge": Hanging()}, micro_batch=4)
    before = set(threading.enumerate())
    scores.add(IMAGES)
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    hanging.set()
    assert torch.equal(scores.collect()["judge"], EXPECTED)


def test_too_few_and_too_many_images_are_refused() -> None:
    scores = begin({"light": light})
    scores.add(IMAGES[:10])
    with pytest.raises(ValueError, match="10 images but 11 prompts"):
        scores.collect()
    scores.add(IMAGES[:2])
    with pytest.raises(ValueError, match="12 images but 11 prompts"):
        scores.collect()


def fits(limit: int, asked: list[int]) -> Callable[[Tensor, list[str]], Tensor]:
    def reward(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        asked.append(len(prompts))
        if len(prompts) > limit:
            raise OutOfMemoryError("out of memory")
        return light(images_BCHW, prompts)

    return reward


def test_a_micro_batch_that_does_not_fit_is_halved_until_it_does_and_stays_so() -> None:
    asked: list[int] = []
    scoring = Scoring(micro_batch=8)
    reward = fits(2, asked)
    assert torch.equal(scoring("large", reward, IMAGES, TEXTS), EXPECTED)
    assert asked == [8, 4, 2, 2, 2, 2, 2, 1]
    asked.clear()
    scoring("large", reward, IMAGES[:4], TEXTS[:4])
    assert asked == [2, 2]
    asked.clear()
    scoring("another", fits(8, asked), IMAGES, TEXTS)
    assert asked == [8, 3]


def test_one_image_that_does_not_fit_stops_the_run() -> None:
    with pytest.raises(RewardError, match="'huge' ran out of memory with one image"):
        Scoring(micro_batch=4)("huge", fits(0, []), IMAGES, TEXTS)


def test_a_reward_error_is_final() -> None:
    calls = []

    def gave_up(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        calls.append(len(prompts))
        raise RewardError("gave up after 40 attempts")

    with pytest.raises(RewardError, match="gave up after 40 attempts"):
        Scoring(retries=3, retry_seconds=0)("judge", gave_up, IMAGES, TEXTS)
    assert calls == [NUM_IMAGES]


@pytest.mark.parametrize(
    ("key", "least", "value"),
    [("micro_batch", 1, 0), ("threads", 1, 0), ("retries", 0, -1), ("retry_seconds", 0, -1), ("retry_seconds", 0, NAN)],
)
def test_a_setting_that_cannot_work_is_refused_by_its_key(key: str, least: int, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"reward\.scoring\.{key} must be at least {least}, got {value}"):
        Scoring(**{key: value})  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_before_collect() -> None:
    images_BCHW = IMAGES.cuda()
    lengths_B = torch.tensor([float(len(text)) for text in TEXTS], device="cuda")

    def light_at(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        first = len(prompts[0]) - 1
        return images_BCHW.mean(dim=(1, 2, 3)) + lengths_B[first : first + len(prompts)]

    scores = begin({"gpu": light_at, "threaded": InThread()}, micro_batch=4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for portion in images_BCHW.split(3):
            scores.add(portion)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    answers = scores.collect()
    for answer_B in answers.values():
        assert answer_B.is_cuda
        torch.testing.assert_close(answer_B.cpu(), EXPECTED, atol=1e-6, rtol=0)
