"""Rewards of this process over the protocol of ``wire.py``.

One request at a time is scored, in one thread, so that a GPU is not shared and the event loop stays free to answer.
The next is unpacked meanwhile, and the others wait packed.  Letters: B images, C H W of an image.
"""

import asyncio
import hmac
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from fastgrpo.device_error import is_device_error
from fastgrpo.rewards.remote.limits import Limits, TooLarge
from fastgrpo.rewards.reward import Reward
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.types import Prompt

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RewardServer:
    """``rewards`` by name, for whoever knows ``token``; anyone if there is none.

    on_device_error: is told that the GPU has failed, after which no request of this process will be answered.
    """

    rewards: Mapping[str, Reward]
    scoring: Scoring
    limits: Limits
    device: str
    token: str = field(default="", repr=False)
    on_device_error: Callable[[Exception], None] = lambda _: None
    _in_flight: set[int] = field(default_factory=set, init=False, repr=False)
    _unpacked: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2), init=False, repr=False)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock, init=False, repr=False)
    # one, since compiled networks and CUDA graphs belong to the thread that first ran them
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "reward"), init=False, repr=False)

    def app(self) -> FastAPI:
        """The routes of the protocol and no others."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        app.add_api_route("/health", self._health, methods=["GET"])
        app.add_api_route("/v1/rewards/{name}/score", self._score, methods=["POST"])
        return app

    async def _health(self) -> dict[str, Any]:
        limits = self.limits
        return {
            "status": "ok",
            "rewards": list(self.rewards),
            "max_images": limits.max_images,
            "max_pixels": limits.max_pixels,
        }

    async def _score(self, name: str, request: Request) -> JSONResponse:
        self._check_head(name, request)
        if len(self._in_flight) >= self.limits.max_requests:
            raise HTTPException(503, "busy", headers={"Retry-After": "1"})
        self._in_flight.add(id(request))
        try:
            body = await self._read_body(request)
            async with self._unpacked:
                pixels_BHWC, asked = await asyncio.to_thread(self.limits.read_request, body)
                async with self._turn:
                    if await request.is_disconnected():
                        # it has given up waiting, and asks again
                        raise HTTPException(408, "the client is gone")
                    scores = await asyncio.get_running_loop().run_in_executor(
                        self._thread, self._ask, name, pixels_BHWC, asked
                    )
        except TooLarge as error:
            raise HTTPException(413, str(error)) from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        finally:
            self._in_flight.discard(id(request))
        return JSONResponse({"scores": scores})

    def _check_head(self, name: str, request: Request) -> None:
        """What can be said before a byte of the body is read."""
        given = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if self.token and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise HTTPException(401, "a bearer token is needed", headers={"WWW-Authenticate": "Bearer"})
        if name not in self.rewards:
            raise HTTPException(404, "no such reward")
        # a web page in a browser on this machine cannot send this type without asking first, which is not answered
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the Content-Type must be application/json")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length[:20]) > self.limits.max_bytes:
            raise HTTPException(413, f"the body is larger than max_bytes={self.limits.max_bytes}")

    async def _read_body(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                # counted as it comes: a chunked body does not say its length
                async for piece in request.stream():
                    body += piece
                    if len(body) > self.limits.max_bytes:
                        raise TooLarge(f"the body is larger than max_bytes={self.limits.max_bytes}")
        except TimeoutError as error:
            raise HTTPException(408, f"the body took longer than {self.limits.body_seconds:g} s") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the body broke off") from error
        return bytes(body)

    def _ask(self, name: str, pixels_BHWC: np.ndarray, asked: list[Prompt]) -> list[float | None]:
        """In the reward's thread: scores, null where they are not finite; 500 without details if it raises."""
        try:
            images_BCHW = (
                torch.from_numpy(pixels_BHWC).to(self.device).permute(0, 3, 1, 2).float().div(255).contiguous()
            )
            scores = self.scoring(name, self.rewards[name], images_BCHW, asked).tolist()
        except Exception as error:
            _log.exception("reward %r failed", name)
            if is_device_error(error):
                self.on_device_error(error)
            raise HTTPException(500, type(error).__name__) from error
        return [score if math.isfinite(score) else None for score in scores]
