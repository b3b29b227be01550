"""Scores in the making: rewards of images that arrive in portions, computed beside the rollout that makes them.

On a GPU, rewards that compute there run on a side stream, and all others in threads, on one copy in pinned memory; only
``collect`` waits.  On a CPU the threads work beside the rollout and ``collect`` computes what does not run in threads.
Letters: B images, C H W of an image.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import cache, partial
from threading import Semaphore, Thread
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from fastgrpo.on_device import on_device
from fastgrpo.rewards.answers import check_finite
from fastgrpo.rewards.reward import Reward
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.types import Prompt, as_prompts

Collected = TypeVar("Collected")


class Scores(Generic[Collected]):
    """``add`` images in the order of their ``prompts``, one an image, each of one size, then ``collect``."""

    def __init__(
        self,
        scoring: Scoring,
        rewards: Mapping[str, Reward],
        prompts: Sequence[Prompt | str],
        finish: Callable[[dict[str, Tensor]], Collected],
    ) -> None:
        self._scoring, self._rewards, self._finish = scoring, rewards, finish
        self._asked = as_prompts(prompts)
        self._waiting: list[Tensor] = []
        self._num_begun = 0
        self._answers: dict[str, list[Callable[[], Tensor]]] = {name: [] for name in rewards}
        self._free_threads = Semaphore(scoring.threads)

    def add(self, images_BCHW: Tensor) -> None:
        """More images; whole micro-batches are begun at once."""
        if self._waiting and self._waiting[0].shape[1:] != images_BCHW.shape[1:]:
            self._begin_waiting()
        self._waiting.append(images_BCHW)
        while sum(map(len, self._waiting)) >= self._scoring.micro_batch:
            together = torch.cat(self._waiting)
            self._begin(together[: self._scoring.micro_batch])
            self._waiting = [together[self._scoring.micro_batch :]]

    def collect(self) -> Collected:
        """What ``finish`` makes of every reward [B], which lie where the images do.

        ValueError if there are not as many images as prompts; RewardError, naming the reward, for one that failed.
        """
        num_images = self._num_begun + sum(map(len, self._waiting))
        if num_images != len(self._asked):
            raise ValueError(f"{num_images} images but {len(self._asked)} prompts; give every image one")
        self._begin_waiting()
        rewards = {name: torch.cat([answer() for answer in parts]) for name, parts in self._answers.items()}
        for name, reward_B in rewards.items():
            # the one moment at which a GPU is waited for
            check_finite(name, reward_B, [prompt.text for prompt in self._asked])
        return self._finish(rewards)

    def _begin_waiting(self) -> None:
        if any(map(len, self._waiting)):
            self._begin(torch.cat(self._waiting))
        self._waiting = []

    def _begin(self, images_BCHW: Tensor) -> None:
        asked = self._asked[self._num_begun : self._num_begun + len(images_BCHW)]
        self._num_begun += len(images_BCHW)
        # one copy for all rewards that want the images on the CPU, and none if there is no such reward
        on_host = cache(partial(_on_host, images_BCHW))
        for name, reward in self._rewards.items():
            ask = partial(self._scoring, name, reward)
            if getattr(reward, "in_thread", False):
                answer = self._in_thread(partial(_ask_on_host, ask, on_host(), asked), images_BCHW.device)
            elif images_BCHW.is_cuda:
                answer = _on_side_stream(partial(ask, images_BCHW, asked), images_BCHW)
            else:
                answer = partial(ask, images_BCHW, asked)
            self._answers[name].append(answer)

    def _in_thread(self, work: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        """Start ``work`` when a thread is free; the function returned waits for its answer, moved to ``device``."""
        future: Future[Tensor] = Future()

        def run() -> None:
            with self._free_threads:
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)

        # a daemon, since a run that is interrupted shall not wait for a judge that does not answer
        Thread(target=run, daemon=True).start()
        return lambda: on_device(future.result(), device)


def _ask_on_host(
    ask: Callable[[Tensor, list[Prompt]], Tensor], images: Callable[[], Tensor], asked: list[Prompt]
) -> Tensor:
    return ask(images(), asked)


@cache
def _side_stream(device: torch.device, purpose: Literal["rewards", "copies"]) -> torch.cuda.Stream:
    # the same ones in all iterations: each stream has a memory pool of its own
    return torch.cuda.Stream(device)


def _on_side_stream(work: Callable[[], Tensor], images_BCHW: Tensor) -> Callable[[], Tensor]:
    """Queue ``work`` behind the images; the function returned makes the current stream wait for it."""
    stream = _side_stream(images_BCHW.device, "rewards")
    stream.wait_stream(torch.cuda.current_stream(images_BCHW.device))
    images_BCHW.record_stream(stream)
    with torch.cuda.stream(stream):
        answer_B = work()

    def answer() -> Tensor:
        current = torch.cuda.current_stream(images_BCHW.device)
        current.wait_stream(stream)
        answer_B.record_stream(current)
        return answer_B

    return answer


def _on_host(images_BCHW: Tensor) -> Callable[[], Tensor]:
    """Queue a copy of a GPU's images into pinned memory; the function returned waits for it, in whatever thread."""
    if not images_BCHW.is_cuda:
        return lambda: images_BCHW
    stream = _side_stream(images_BCHW.device, "copies")
    stream.wait_stream(torch.cuda.current_stream(images_BCHW.device))
    images_BCHW.record_stream(stream)
    copied = torch.cuda.Event()
    with torch.cuda.stream(stream):
        host_BCHW = torch.empty(images_BCHW.shape, dtype=images_BCHW.dtype, pin_memory=True)
        host_BCHW.copy_(images_BCHW, non_blocking=True)
        copied.record()

    def images() -> Tensor:
        copied.synchronize()
        return host_BCHW

    return images
