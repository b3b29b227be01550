"""A reward on another machine, over the protocol of ``wire.py``: what ``fastgrpo serve-reward`` and GenEval answer.

Letters: B images, C H W of an image.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastgrpo.rewards.golden import golden_sets
from fastgrpo.rewards.remote.connection import Connection
from fastgrpo.rewards.remote.endpoints import Endpoints
from fastgrpo.rewards.remote.errors import KEY, AskAgain, ServerFailed
from fastgrpo.rewards.remote.wire import read_scores, to_pixels, to_png, write_request
from fastgrpo.types import Prompt, prompts_of


@dataclass(frozen=True, kw_only=True)
class HttpReward:
    """The reward called ``name`` of servers that score alike; a request has up to ``batch`` images.

    Up to ``concurrency`` requests are under way; one that fails is asked again for ``patience_seconds``, of the server
    that is least busy, and for ``startup_patience_seconds`` until any has answered.  ``token_env`` names the variable
    of the environment with the bearer token; '' sends none.  ``golden_set`` are the pairs that it is tried on before a
    run: ``scenes``, ``texts`` for a reward that reads, ``prompts``, the run's own, for one that needs their metadata,
    or ``none``.  Metadata is sent where a prompt has any: whether the server asks for it is its own affair.

    Scores of one call come all or not at all.  RemoteError, naming the endpoint and the cause, if they do not come.
    """

    in_thread: ClassVar[bool] = True

    endpoints: Sequence[str]
    name: str
    timeout_seconds: float = 60.0
    batch: int = 16
    concurrency: int = 4
    patience_seconds: float = 600.0
    token_env: str = ""
    max_answer_bytes: int = 1 << 20
    golden_set: str = "scenes"
    # of no score, so no part of the name that golden scores are recorded under
    startup_patience_seconds: float = field(default=20.0, repr=False)
    _endpoints: Endpoints = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"{KEY}.name has letters, digits, _ . and -, as the server has it, got {self.name!r}")
        if self.batch < 1:
            raise ValueError(f"{KEY}.batch must be at least 1 image, got {self.batch}")
        if self.golden_set not in (choices := [*golden_sets(), "prompts", "none"]):
            raise ValueError(f"{KEY}.golden_set must be one of {', '.join(choices)}, got {self.golden_set!r}")
        endpoints = Endpoints(
            reward=self.name,
            urls=self.endpoints,
            connection=Connection(
                timeout_seconds=self.timeout_seconds, max_answer_bytes=self.max_answer_bytes, token_env=self.token_env
            ),
            concurrency=self.concurrency,
            patience_seconds=self.patience_seconds,
            startup_patience_seconds=self.startup_patience_seconds,
        )
        object.__setattr__(self, "_endpoints", endpoints)

    def greet(self) -> None:
        """RemoteError unless one of the servers is there."""
        self._endpoints.greet("/health")

    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        if len(prompts) != len(images_BCHW):
            raise ValueError(f"{len(images_BCHW)} images but {len(prompts)} prompts; give every image one")
        pixels_BHWC = to_pixels(images_BCHW)
        parts = [slice(first, first + self.batch) for first in range(0, len(prompts), self.batch)]
        asked = prompts_of(prompts, metadata)
        questions = [_Batch(pixels_BHWC[part], asked[part]) for part in parts]
        self._endpoints.ask(f"/v1/rewards/{self.name}/score", questions)
        return torch.tensor([score for question in questions for score in question.scores], dtype=torch.float32)


class _Batch:
    """The images of one request, and their scores as they come; what was answered is not asked again."""

    def __init__(self, pixels_BHWC: np.ndarray, asked: list[Prompt]) -> None:
        self.scores: list[float | None] = [None] * len(asked)
        self._pixels_BHWC, self._asked = pixels_BHWC, asked

    def body(self) -> bytes:
        rows = self._missing()
        return write_request([to_png(self._pixels_BHWC[row]) for row in rows], [self._asked[row] for row in rows])

    def take(self, answer: Any) -> None:
        rows = self._missing()
        try:
            scores = read_scores(answer, len(rows))
        except ValueError as error:
            raise ServerFailed(f"an answer that breaks the protocol: {error}") from error
        for row, score in zip(rows, scores, strict=True):
            self.scores[row] = score
        if missing := self._missing():
            raise AskAgain(
                f"no score for {len(missing)} of {len(rows)} images, the first of {self._asked[missing[0]].text!r}"
            )

    def _missing(self) -> list[int]:
        return [row for row, score in enumerate(self.scores) if score is None]
