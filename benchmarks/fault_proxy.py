"""A proxy in front of a reward server that fails as it is told: each request goes through the fault of the moment."""

import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count


@dataclass(frozen=True)
class Answer:
    """What is sent back; ``claimed_bytes`` is more than there are in a body that is cut off."""

    status: int
    body: bytes
    claimed_bytes: int = 0


# is given the way to the server's own answer; None breaks the connection
Forward = Callable[[], Answer | None]
Fault = Callable[[Forward], Answer | None]


class FaultProxy:
    """Listens on ``url``; ``plan`` is asked at each request for its fault, None lets it through."""

    def __init__(self, server_port: int) -> None:
        self.plan: Callable[[], Fault | None] = lambda: None
        self.requests = self.faults = 0
        self._server_port = server_port
        self._lock = threading.Lock()
        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._listener.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._listener.server_port}"
        threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    def _answer(self, path: str, body: bytes) -> Answer | None:
        with self._lock:
            self.requests += 1
            fault = self.plan()
            self.faults += fault is not None
        if fault is None:
            return self._forward(path, body)
        return fault(lambda: self._forward(path, body))

    def _forward(self, path: str, body: bytes) -> Answer | None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server_port, timeout=60)
        try:
            connection.request("POST", path, body=body, headers={"Content-Type": "application/json"})
            response = connection.getresponse()
            return Answer(response.status, response.read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                answer = proxy._answer(self.path, self.rfile.read(int(self.headers["Content-Length"])))
                if answer is None:
                    self.close_connection = True
                    return
                try:
                    self.send_response(answer.status)
                    self.send_header("Content-Length", str(answer.claimed_bytes or len(answer.body)))
                    self.end_headers()
                    self.wfile.write(answer.body)
                except OSError:
                    # the client did not wait
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        return Handler


def garbage() -> Fault:
    """Another kind each time: a page, broken or wrong JSON, numbers that are none, errors, a closed connection."""
    kinds = [
        Answer(200, b"<html>It works!</html>"),
        Answer(200, b'{"scores": [0.5, 0.'),
        Answer(200, b'{"scores": "high"}'),
        Answer(200, b'{"scores": [NaN, NaN]}'),
        Answer(200, b'{"scores": [0.0]}'),
        Answer(200, b""),
        Answer(500, b"Internal Server Error"),
        Answer(502, b"<html>Bad Gateway</html>"),
        None,
    ]
    number = count()
    return lambda forward: kinds[next(number) % len(kinds)]


def slow(seconds: float) -> Fault:
    """The right answer, late."""

    def wait(forward: Forward) -> Answer | None:
        time.sleep(seconds)
        return forward()

    return wait


def partial() -> Fault:
    """In turn: null for every other image, one score too few, zeros as strings, a body that breaks off."""
    number = count()

    def take_away(forward: Forward) -> Answer | None:
        answer = forward()
        if answer is None or answer.status != 200:
            return answer
        scores = json.loads(answer.body)["scores"]
        kind = next(number) % 4
        if kind == 0:
            scores = [None if i % 2 == 0 else score for i, score in enumerate(scores)]
        elif kind == 1:
            scores = scores[:-1]
        elif kind == 2:
            scores = ["0.0" for _ in scores]
        body = json.dumps({"scores": scores}).encode()
        return Answer(200, body[: len(body) // 2], len(body)) if kind == 3 else Answer(200, body)

    return take_away
