"""Servers on loopback for the tests: one that says what it is told to, and the real one in a thread."""

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import numpy as np
import torch
import uvicorn
from PIL import Image
from torch import Tensor

from fastgrpo.commands.serve_reward import UVICORN
from fastgrpo.rewards.remote.limits import Limits
from fastgrpo.rewards.remote.server import RewardServer
from fastgrpo.rewards.reward import Reward
from fastgrpo.rewards.scoring import Scoring


def redness(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    """The mean of the red channel."""
    return images_BCHW[:, 0].mean(dim=(1, 2))


def some_images(num_images: int, seed: int = 0) -> Tensor:
    """Random images [B, 3, 16, 16] that a byte represents exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, 3, 16, 16), generator=generator) / 255


def redness_of_png(image: str) -> float:
    """As a server in another language would: not by our own decoder."""
    pixels_HWC = np.array(Image.open(BytesIO(base64.b64decode(image))))
    return float(pixels_HWC[:, :, 0].mean() / 255)


@dataclass(frozen=True)
class Reply:
    """An answer; of ``claimed_bytes`` only the body is sent, byte by byte if there are seconds between them."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    claimed_bytes: int = 0
    seconds: float = 0.0
    seconds_a_byte: float = 0.0


def scores(*values: object) -> Reply:
    return Reply(json.dumps({"scores": values}).encode())


@dataclass(frozen=True)
class Asked:
    path: str
    headers: dict[str, str]
    content: Any


class Scripted:
    """Gives ``replies`` one after the other, then what ``then`` makes of the request."""

    def __init__(self, *replies: Reply, then: Callable[[Any], Reply] | None = None, port: int = 0) -> None:
        self.asked: list[Asked] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        self._replies = list(replies)
        self._then = then or (lambda content: scores(*map(redness_of_png, content["images"])))
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _reply(self, asked: Asked) -> Reply:
        with self._lock:
            self.asked.append(asked)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            reply = self._replies.pop(0) if self._replies else None
        reply = reply or self._then(asked.content)
        time.sleep(reply.seconds)
        # before the client has its answer, and asks again
        with self._lock:
            self._in_flight -= 1
        return reply

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                reply = scripted._reply(Asked(self.path, dict(self.headers), json.loads(body)))
                # a client that did not wait
                with contextlib.suppress(OSError):
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(reply.claimed_bytes or len(reply.body)))
                    self.end_headers()
                    step = 1 if reply.seconds_a_byte else max(1, len(reply.body))
                    for first in range(0, len(reply.body), step):
                        self.wfile.write(reply.body[first : first + step])
                        time.sleep(reply.seconds_a_byte)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        return Handler


def free_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def served(
    rewards: Mapping[str, Reward], *, token: str = "", limits: Limits | None = None, port: int = 0
) -> Iterator[str]:
    """The address of the real server in a thread."""
    server = RewardServer(
        rewards=rewards, scoring=Scoring(retries=0), limits=limits or Limits(), device="cpu", token=token
    )
    runner = uvicorn.Server(uvicorn.Config(server.app(), **UVICORN))
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            runner.should_exit = runner.force_exit = True
            thread.join()
