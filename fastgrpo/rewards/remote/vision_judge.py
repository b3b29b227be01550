"""A vision-language model as the reward: it is shown an image, told the prompt, and gives a number.

    reward = (number - low) / (high - low), in [0, 1]

Any server of the OpenAI chat completions API will do, such as vLLM's; UnifiedReward (arXiv:2503.05236) is one model
that is trained for it.  One request an image, at temperature 0.  Letters: B images, C H W of an image.
"""

import base64
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastgrpo.rewards.remote.connection import Connection
from fastgrpo.rewards.remote.endpoints import Endpoints
from fastgrpo.rewards.remote.errors import KEY, AskAgain, RemoteError, ServerFailed
from fastgrpo.rewards.remote.wire import to_pixels, to_png

_MAX_QUOTED = 200


@dataclass(frozen=True, kw_only=True)
class VisionJudge:
    """The number that ``model`` gives an image on its scale from ``low`` to ``high``.

    ``endpoints`` are addresses as OpenAI's clients take them, ending in /v1.  ``template`` is the text beside the
    image, in which {prompt} is replaced by the prompt, letter by letter.  The number is group 1 of the last match of
    ``pattern``: a judge may reason, and repeat the format that it was told, before it concludes.  An answer without a
    match, or with a number off the scale, is asked again; after ``tries`` of them RemoteError quotes the last.

    The other fields are those of ``HttpReward``.
    """

    in_thread: ClassVar[bool] = True
    # batched inference is not exact, and a number of a coarse scale then moves by a whole step
    golden_tolerance: ClassVar[float] = 0.5

    endpoints: Sequence[str]
    model: str
    template: str
    pattern: str
    low: float
    high: float
    max_tokens: int = 512
    tries: int = 3
    timeout_seconds: float = 120.0
    concurrency: int = 16
    patience_seconds: float = 600.0
    token_env: str = ""
    max_answer_bytes: int = 1 << 20
    # of no score, so no part of the name that golden scores are recorded under
    startup_patience_seconds: float = field(default=20.0, repr=False)
    _endpoints: Endpoints = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        endpoints = Endpoints(
            reward=self.model,
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
        self._endpoints.greet("/models")

    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        if len(prompts) != len(images_BCHW):
            raise ValueError(f"{len(images_BCHW)} images but {len(prompts)} prompts; give every image one")
        pixels_BHWC = to_pixels(images_BCHW)
        questions = [_Verdict(self, *pair) for pair in zip(pixels_BHWC, prompts, strict=True)]
        self._endpoints.ask("/chat/completions", questions)
        return torch.tensor([question.score for question in questions], dtype=torch.float32)

    def _check(self) -> None:
        if "{prompt}" not in self.template:
            raise ValueError(f"{KEY}.template must have {{prompt}} in it, got {self.template!r}")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"{KEY}.pattern={self.pattern!r} is not a regular expression: {error}") from error
        if groups < 1:
            raise ValueError(
                f"{KEY}.pattern={self.pattern!r} has no group; put parentheses around the number, as in "
                r"Final Score: ([1-5])"
            )
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"{KEY}.low must be below {KEY}.high, both finite, got {self.low} and {self.high}")
        if not self.model:
            raise ValueError(f"{KEY}.model is empty; give the name that the server knows the judge by")
        for key in ("max_tokens", "tries"):
            if getattr(self, key) < 1:
                raise ValueError(f"{KEY}.{key} must be at least 1, got {getattr(self, key)}")


class _Verdict:
    """The question about one image, and the score once it is there."""

    def __init__(self, judge: VisionJudge, pixels_HWC: np.ndarray, prompt: str) -> None:
        self.score: float | None = None
        self._judge, self._pixels_HWC, self._prompt = judge, pixels_HWC, prompt
        self._unusable = 0

    def body(self) -> bytes:
        image = base64.b64encode(to_png(self._pixels_HWC)).decode("ascii")
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": self._judge.template.replace("{prompt}", self._prompt)},
        ]
        request = {
            "model": self._judge.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self._judge.max_tokens,
        }
        return json.dumps(request).encode()

    def take(self, answer: Any) -> None:
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise ServerFailed("an answer without choices[0].message.content") from error
        if not isinstance(text, str):
            raise ServerFailed(f"an answer whose content is a {type(text).__name__}, not text")
        try:
            self.score = self._read(text)
        except ValueError as error:
            self._unusable += 1
            if self._unusable < self._judge.tries:
                raise AskAgain(str(error)) from error
            raise RemoteError(
                f"reward {self._judge.model!r}: {error}, {self._unusable} times for prompt {self._prompt!r}; "
                "correct template or pattern, or raise max_tokens if it breaks off"
            ) from error

    def _read(self, text: str) -> float:
        judge = self._judge
        matches = list(re.finditer(judge.pattern, text))
        quoted = repr(text if len(text) <= _MAX_QUOTED else "..." + text[-_MAX_QUOTED:])
        if not matches:
            raise ValueError(f"an answer without a match of {judge.pattern!r}: {quoted}")
        try:
            number = float(matches[-1][1])
        except (TypeError, ValueError):
            raise ValueError(f"{matches[-1][1]!r} is not a number, in the answer {quoted}") from None
        if not judge.low <= number <= judge.high:
            raise ValueError(
                f"{number:g} is off the scale from {judge.low:g} to {judge.high:g}, in the answer {quoted}"
            )
        return (number - judge.low) / (judge.high - judge.low)
