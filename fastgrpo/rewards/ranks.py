"""Ranks that only score, for rewards that do not fit beside the policy.

The last n ranks of a job build the rewards of its config and answer for all of them, watched ones too.  The others are
a world of their own and hold a ``RankedReward`` for each; policy rank p asks the (p mod n)-th scoring rank.

A scoring rank first greets, when its rewards are built; what is then asked and answered: ``rank_line.py``.
Letters: B images, C H W of an image.
"""

import json
import logging
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgrpo.distributed.meeting import meet
from fastgrpo.distributed.slurm import slurm_environment
from fastgrpo.distributed.world import RankFailure, World, join_world
from fastgrpo.rewards.rank_line import GOODBYE_SECONDS, Line
from fastgrpo.rewards.reward import Reward, RewardError
from fastgrpo.rewards.self_test import GoldenScores
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.types import Prompt, prompts_of

_log = logging.getLogger(__name__)


def take_part(device: str, timeout_seconds: float, num_scoring: int) -> "PolicyRank | ScoringRank":
    """Join as torchrun or Slurm started this process; the last ``num_scoring`` ranks only score.

    ``timeout_seconds`` is for connecting, for collectives of the policy ranks, and for the answer to a question.
    ValueError unless there is a policy rank for every scoring rank.
    """
    os.environ.update(slurm_environment())
    size = int(os.environ.get("WORLD_SIZE", "1"))
    num_policy = size - num_scoring
    if num_scoring < 0 or (num_scoring and num_policy < num_scoring):
        raise ValueError(
            f"distributed.reward_ranks must lie in 0 to {size // 2}, half of the {size} ranks of this job, got "
            f"{num_scoring}; start more processes, or score beside the policy with 0"
        )
    if num_scoring == 0:
        return PolicyRank(world=join_world(device, timeout_seconds))
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, _ = meet(timeout)
    connect = partial(Line.between, store=store, timeout=timeout)
    if rank < num_policy:
        # the ranks that train are all that torch.distributed knows of: no group, mesh or split has to leave any out
        os.environ["WORLD_SIZE"] = str(num_policy)
        world = join_world(device, timeout_seconds)
        return PolicyRank(world=world, scorer=connect(rank, num_policy + rank % num_scoring, scores=False))
    asking = range(rank - num_policy, num_policy, num_scoring)
    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    return ScoringRank(rank=rank, device=own, lines=[connect(policy, rank, scores=True) for policy in asking])


@dataclass(kw_only=True, eq=False)
class PolicyRank:
    """A rank that trains: ``world`` is that of all policy ranks.  ``with`` says goodbye to the scoring rank."""

    world: World
    scorer: Line | None = None

    @property
    def scores_itself(self) -> bool:
        return self.scorer is None

    def golden_scores(self) -> dict[str, GoldenScores]:
        """Wait until the scoring rank has built and tried its rewards; what they score their golden pairs, by name.

        Call it once, before anything is asked.  ValueError or RewardError for what failed there.
        """
        assert self.scorer is not None
        with _reported(f"scoring rank {self.scorer.other}"):
            greeting = json.loads(self.scorer.receive_text(self.scorer.receive_numbers(1)[0]))
        if failure := greeting["failure"]:
            raise (ValueError if greeting["is_input"] else RewardError)(
                f"scoring rank {self.scorer.other} on {greeting['host']} could not build its rewards: {failure}"
            )
        return {name: GoldenScores(**golden) for name, golden in greeting["golden"].items()}

    def rewards(self, names: Iterable[str]) -> dict[str, Reward]:
        """Rewards of the config, as the scoring rank computes them."""
        assert self.scorer is not None
        return {name: RankedReward(name=name, scorer=self.scorer) for name in names}

    def __enter__(self) -> "PolicyRank":
        return self

    def __exit__(self, *_: object) -> None:
        # a failing run may still be asking: then the scoring rank learns of its end from the connection
        if self.scorer is None or not self.scorer.free.acquire(timeout=GOODBYE_SECONDS):
            return
        try:
            self.scorer.say_goodbye()
        except RuntimeError as error:
            _log.warning("scoring rank %d has left before its policy rank: %s", self.scorer.other, error)


@dataclass(frozen=True, kw_only=True)
class RankedReward:
    """The reward ``name`` of this rank's scoring rank, asked from the threads of ``scores.py``, one call at a time."""

    # its rewards check prompts and golden pairs themselves
    golden_set: ClassVar[str] = "none"
    in_thread: ClassVar[bool] = True

    name: str
    scorer: Line

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        """Whether the reward there asks for metadata is known there alone.

        RewardError for what is raised there, with its traceback, and for a scoring rank that is gone or silent."""
        with self.scorer.free, _reported(f"reward {self.name!r}: scoring rank {self.scorer.other}"):
            about = {"reward": self.name, "texts": prompts, "metadata": list(metadata)}
            self.scorer.ask(about, images_BCHW)
            num_bytes, num_scores = self.scorer.receive_numbers(2, self.scorer.timeout)
            if num_bytes:
                raise RewardError(self.scorer.receive_text(num_bytes))
            return self.scorer.receive(num_scores, dtype=torch.float32)


@dataclass(kw_only=True, eq=False)
class ScoringRank:
    """A rank that only scores, for the policy ranks at the other ends of its ``lines``."""

    rank: int
    device: torch.device
    lines: list[Line]
    # answers of rewards that compute on the device: one at a time, all by the main thread
    _to_do: "SimpleQueue[Callable[[], None] | _End]" = field(default_factory=SimpleQueue)

    def serve(self, build: Callable[[], tuple[Rewards, dict[str, GoldenScores]]]) -> None:
        """Build the rewards and answer until every policy rank has said goodbye.

        What a reward raises is raised on the rank that asked, and this one goes on.  RankFailure if one of them is
        gone without a goodbye.  Signals that stop a run are left to the policy ranks, which still need their rewards.
        """
        with _deaf_to(signal.SIGTERM, signal.SIGUSR1):
            try:
                rewards, golden = build()
            except Exception as error:
                self._refuse(error)
                raise
            greeting = _greeting(golden={name: asdict(scores) for name, scores in golden.items()})
            slots = Semaphore(rewards.scoring.threads)
            for line in self.lines:
                Thread(target=self._attend, args=(line, greeting, rewards, slots), daemon=True).start()
            num_left = len(self.lines)
            while num_left:
                work = self._to_do.get()
                if not isinstance(work, _End):
                    work()
                elif work.error is None:
                    num_left -= 1
                else:
                    raise RankFailure(f"policy rank {work.rank} is gone without a goodbye: {work.error}")

    def _refuse(self, error: Exception) -> None:
        is_input = isinstance(error, ValueError) and not isinstance(error, RewardError)
        for line in self.lines:
            # a policy rank that is gone need not know; this rank fails with the error
            with suppress(RuntimeError):
                line.greet(_greeting(failure=str(error) or type(error).__name__, is_input=is_input))

    def _attend(self, line: Line, greeting: bytes, rewards: Rewards, slots: Semaphore) -> None:
        """Answer one policy rank, until it says goodbye or is gone."""
        try:
            line.greet(greeting)
            while question := line.next_question():
                about, images_BCHW = question
                asked = prompts_of(about["texts"], about["metadata"])
                answer = partial(self._answer, rewards, about["reward"], asked, images_BCHW)
                if getattr(rewards.all[about["reward"]], "in_thread", False):
                    with slots:
                        line.reply(answer())
                else:
                    line.reply(self._by_main_thread(answer))
            self._to_do.put(_End(line.other))
        except Exception as error:
            self._to_do.put(_End(line.other, error))

    def _answer(self, rewards: Rewards, name: str, asked: list[Prompt], images_BCHW: Tensor) -> Tensor | str:
        """Scores [B] on the host, or what was raised."""
        reward: Reward = rewards.all[name]
        try:
            own = images_BCHW if getattr(reward, "in_thread", False) else images_BCHW.to(self.device)
            return rewards.scoring(name, reward, own, asked).cpu()
        except Exception as error:
            where = f"scoring rank {self.rank} on {socket.gethostname()}"
            return f"{error} (raised on {where})\n{traceback.format_exc()}"

    def _by_main_thread(self, answer: Callable[[], Tensor | str]) -> Tensor | str:
        done: Future[Tensor | str] = Future()
        self._to_do.put(lambda: done.set_result(answer()))
        return done.result()


def _greeting(failure: str = "", is_input: bool = False, golden: Mapping[str, Any] | None = None) -> bytes:
    about = {"host": socket.gethostname(), "failure": failure, "is_input": is_input, "golden": golden}
    return json.dumps(about).encode()


@dataclass(frozen=True)
class _End:
    rank: int
    error: Exception | None = None


@contextmanager
def _reported(who: str) -> Iterator[None]:
    """RewardError where a line breaks."""
    try:
        yield
    except RuntimeError as error:
        raise RewardError(f"{who} is gone, or gave no answer in time: {error}; see what it printed") from error


@contextmanager
def _deaf_to(*signals: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # only the main thread is sent signals, and may say who hears them
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
