"""The server against strangers: what is too large, broken, secret or not there is refused, and it stays alive."""

import base64
import http.client
import json
import os
import pickle
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from torch import Tensor

from fastgrpo.rewards.remote.errors import RemoteError
from fastgrpo.rewards.remote.http_reward import HttpReward
from fastgrpo.rewards.remote.limits import Limits
from fastgrpo.rewards.remote.wire import to_pixels, to_png
from tests.rewards.remote.scripted import redness, served, some_images

TOKEN = "a-t0ken-of-the-test"
LIMITS = Limits(max_bytes=200_000, max_images=4, max_pixels=1024, max_prompt=50, max_requests=2, body_seconds=0.5)
PATH = "/v1/rewards/red/score"
PNG = to_png(to_pixels(some_images(1))[0])


def broken(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    raise KeyError("a secret of the server")


def sometimes(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    return torch.tensor([float("nan") if text == "nan" else float("inf") if text == "inf" else 0.5 for text in prompts])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    rewards = {"red": redness, "broken": broken, "sometimes": sometimes, "shape": lambda images, prompts: images}
    with served(rewards, token=TOKEN, limits=LIMITS) as url:
        yield url


def ask(
    url: str, content: Any, path: str = PATH, token: str | None = TOKEN, method: str = "POST", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, parsed answer and headers of one request, made by the standard library."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30)
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        sent["Authorization"] = f"Bearer {token}"
    connection.request(method, path, body=body, headers=sent)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if text.startswith(b"{") else text, dict(answer.headers)


def request(*pngs: bytes, prompts: list[str] | None = None) -> dict[str, Any]:
    images = [base64.b64encode(png).decode() for png in pngs]
    return {"images": images, "prompts": prompts if prompts is not None else ["a"] * len(pngs)}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, *extra: bytes, depth: int = 8, color: int = 2, rows: bytes | None = None) -> bytes:
    """A PNG made by hand, with any claims in its header."""
    rows = b"".join(b"\0" + b"\x80" * 3 * width for _ in range(height)) if rows is None else rows
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


FIFTY_MB = zlib.compress(b" " * 50_000_000)


def is_alive(url: str) -> bool:
    status, answer, _ = ask(url, request(PNG))
    return status == 200 and answer["scores"] == pytest.approx(redness(some_images(1), []).tolist())


# the token


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), f"{TOKEN} {TOKEN}"])
def test_without_the_right_token_nothing_is_scored_or_told(url: str, token: str | None) -> None:
    for path in (PATH, "/v1/rewards/nothing/score"):
        status, answer, headers = ask(url, request(PNG), path=path, token=token)
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert TOKEN not in str(answer)


def test_a_token_of_odd_bytes_is_just_wrong(url: str) -> None:
    assert ask(url, request(PNG), token=None, Authorization="Bearer \xff\xfe")[0] == 401
    assert ask(url, request(PNG), token=None, Authorization=f"Basic {TOKEN}")[0] == 401


def test_a_wrong_token_is_refused_before_the_body_is_sent(url: str) -> None:
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), parts.port or 0), timeout=30) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")


def test_the_client_with_a_wrong_token_stops_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", "wrong")
    begun = time.monotonic()
    with pytest.raises(RemoteError, match=r"status 401.*token_env names"):
        HttpReward(endpoints=[url], name="red", token_env="TEST_REWARD_TOKEN")(some_images(1), ["a"])
    assert time.monotonic() - begun < 10.0


def test_the_client_with_the_token_gets_its_scores(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", TOKEN)
    answer = HttpReward(endpoints=[url], name="red", token_env="TEST_REWARD_TOKEN", batch=4)(some_images(6), ["a"] * 6)
    torch.testing.assert_close(answer, redness(some_images(6), []), atol=1e-6, rtol=0)


def test_health_needs_no_token_and_tells_names_and_limits_alone(url: str) -> None:
    status, answer, headers = ask(url, b"", path="/health", token=None, method="GET")
    assert status == 200
    names = ["red", "broken", "sometimes", "shape"]
    assert answer == {"status": "ok", "rewards": names, "max_images": 4, "max_pixels": 1024}
    assert "server" not in headers


# names and routes


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "..",
        ".",
        "%2e%2e",
        "%2e%2e%2fred",
        "..%2f..%2fetc%2fpasswd",
        "red%00",
        "red%0a",
        "__class__",
        "",
        "Red",
        "red/",
    ],
)
def test_a_name_that_is_not_served_is_not_found(url: str, name: str) -> None:
    assert ask(url, request(PNG), path=f"/v1/rewards/{name}/score")[0] == 404


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/redoc", "/v1/rewards", PATH + "/", "//health", "/v1/../health"]
)
def test_there_are_no_other_routes(url: str, path: str) -> None:
    assert ask(url, b"", path=path, method="GET")[0] == 404


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_browser_may_send_unasked_is_refused(url: str, kind: str) -> None:
    assert ask(url, request(PNG), Content_Type=kind)[0] == 415


# sizes


def test_a_body_that_says_it_is_too_large_is_refused(url: str) -> None:
    status, answer, _ = ask(url, b" " * 200_001)
    assert (status, answer) == (413, {"detail": "the body is larger than max_bytes=200000"})
    assert is_alive(url)


def test_a_chunked_body_that_is_too_large_is_refused_as_it_comes(url: str) -> None:
    parts = urlsplit(url)
    sent = 0
    with socket.create_connection((str(parts.hostname), parts.port or 0), timeout=30) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(f"{head}Authorization: Bearer {TOKEN}\r\n\r\n".encode())
        for _ in range(30):
            connection.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
            sent += 10_000
        # it never says that this was all
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert is_alive(url)


@pytest.mark.parametrize("length", ["-1", "1e3", "99999999999999999999999", "0x10"])
def test_an_odd_content_length_is_refused(url: str, length: str) -> None:
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), parts.port or 0), timeout=30) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
        connection.sendall(f"{head}Authorization: Bearer {TOKEN}\r\n\r\n".encode())
        assert connection.recv(1000).split(b" ")[1] in (b"400", b"413")
    assert is_alive(url)


def test_a_body_that_does_not_come_is_not_waited_for(url: str) -> None:
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), parts.port or 0), timeout=30) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
        connection.sendall(f"{head}Authorization: Bearer {TOKEN}\r\n\r\n{{".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    assert is_alive(url)


def test_too_many_images_are_refused(url: str) -> None:
    status, answer, _ = ask(url, request(*[PNG] * 5))
    assert (status, answer) == (413, {"detail": "5 images are more than max_images=4"})
    assert ask(url, request(*[PNG] * 4))[0] == 200


def test_a_long_prompt_is_refused(url: str) -> None:
    assert ask(url, request(PNG, prompts=["a" * 51]))[0] == 413
    assert ask(url, request(PNG, prompts=["\u00fc" * 50]))[0] == 200


def test_the_client_learns_that_its_batch_is_too_large(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", TOKEN)
    reward = HttpReward(endpoints=[url], name="red", token_env="TEST_REWARD_TOKEN", batch=5)
    with pytest.raises(RemoteError, match=r"status 413: .*max_images=4.*lower batch"):
        reward(some_images(5), ["a"] * 5)


# images


IMAGES = {
    "a bomb of 50000 x 50000": (png_of(50_000, 50_000, rows=b""), 413),
    "a bomb whose sides overflow": (png_of(2**31 - 1, 2**31 - 1, rows=b""), 413),
    "a pixel more than allowed": (png_of(1025, 1), 413),
    "as many as allowed": (png_of(1024, 1), 200),
    "text of 50 MB": (png_of(8, 8, chunk(b"zTXt", b"a\0\0" + FIFTY_MB)), 422),
    "international text of 50 MB": (png_of(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + FIFTY_MB)), 422),
    "a color profile of 50 MB": (png_of(8, 8, chunk(b"iCCP", b"a\0\0" + FIFTY_MB)), 422),
    # only as many as the header claims are unpacked
    "pixels of 50 MB": (png_of(8, 8, rows=b"\0" * 50_000_000), 200),
    "no pixels": (png_of(8, 8, rows=b""), 422),
    "zero wide": (png_of(0, 8, rows=b""), 422),
    "gray": (png_of(8, 8, color=0, rows=b"\0" * 72), 422),
    "palette": (png_of(8, 8, color=3, rows=b"\0" * 72), 422),
    "alpha": (png_of(8, 8, color=6, rows=b"\0" * 264), 422),
    "16 bit": (png_of(8, 8, depth=16, rows=b"\0" * 392), 422),
    "cut off": (PNG[: len(PNG) // 2], 422),
    "a header alone": (PNG[:33], 422),
    "nothing": (b"", 422),
    "jpeg": (b"\xff\xd8\xff\xe0" + b"\0" * 100, 422),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', 422),
    "a path": (b"/etc/passwd", 422),
}


@pytest.mark.parametrize(("png", "status"), IMAGES.values(), ids=IMAGES)
def test_only_whole_small_rgb_pngs_are_unpacked(url: str, png: bytes, status: int) -> None:
    content, begun = json.dumps(request(png)).encode(), time.monotonic()
    tracemalloc.start()
    try:
        assert ask(url, content)[0] == status
        # the server is in this process: 50 MB, or gigabytes of pixels, never lay in its memory
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begun < 10.0
    assert is_alive(url)


def test_a_pickle_is_not_an_image_and_is_not_loaded(url: str, tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(loaded),)

    content = pickle.dumps(Bomb())
    assert ask(url, request(content))[0] == 422
    assert ask(url, content)[0] == 422
    assert ask(url, content, Content_Type="application/octet-stream")[0] == 415
    assert not loaded.exists()
    pickle.loads(content)
    assert loaded.exists()


def test_images_of_one_request_have_one_size(url: str) -> None:
    status, answer, _ = ask(url, request(png_of(8, 8), png_of(8, 4)))
    assert status == 422
    assert "one size" in answer["detail"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"images": "abc", "prompts": ["a"]}',
        b'{"images": [], "prompts": []}',
        b'{"images": [1], "prompts": ["a"]}',
        b'{"images": [null], "prompts": ["a"]}',
        b'{"images": ["iVBO"], "prompts": [["a"]]}',
        b'{"images": ["****"], "prompts": ["a"]}',
        b'{"images": ["\xc3\xbc"], "prompts": ["a"]}',
        # a decoder that skips what is not base64 would find an image in it
        json.dumps(request(PNG)).replace("iVBO", "iV*B\\n*O").encode(),
        b'{"images": ["iVBO"], "prompts": []}',
        b'{"images": {"0": "iVBO"}, "prompts": ["a"]}',
        b'{"images": [' + b"9" * 10_000 + b'], "prompts": ["a"]}',
    ],
    ids=lambda content: content[:40].decode("latin-1"),
)
def test_what_is_not_a_request_is_refused(url: str, content: bytes) -> None:
    status, answer, _ = ask(url, content)
    assert status == 422
    assert len(answer["detail"]) < 200
    assert is_alive(url)


# rewards that fail


def test_an_error_of_the_reward_tells_its_class_and_logs_the_rest(url: str, caplog: pytest.LogCaptureFixture) -> None:
    status, answer, _ = ask(url, request(PNG), path="/v1/rewards/broken/score")
    assert (status, answer) == (500, {"detail": "RewardError"})
    assert "a secret of the server" in caplog.text


def test_an_answer_of_the_wrong_shape_is_an_error(url: str) -> None:
    assert ask(url, request(PNG), path="/v1/rewards/shape/score")[0] == 500


def test_scores_that_are_not_finite_are_null(url: str) -> None:
    content = request(*[PNG] * 3, prompts=["nan", "a", "inf"])
    assert ask(url, content, path="/v1/rewards/sometimes/score")[1] == {"scores": [None, 0.5, None]}


# at the same time


class Gate:
    """A reward that waits until it is let go, and counts how many it holds."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.calls, self.holds, self.most = 0, 0, 0
        self.threads: set[int] = set()

    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        self.calls += 1
        self.holds += 1
        self.most = max(self.most, self.holds)
        self.threads.add(threading.get_ident())
        self.go.wait(30)
        time.sleep(0.02)
        self.holds -= 1
        return redness(images_BCHW, prompts)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_while_it_scores_one_request_others_wait_health_answers_and_more_are_sent_away() -> None:
    gate = Gate()
    statuses: list[int] = []
    with served({"red": gate}, limits=LIMITS) as url:
        asking = [
            threading.Thread(target=lambda: statuses.append(ask(url, request(PNG), token=None)[0])) for _ in range(3)
        ]
        for thread in asking:
            thread.start()
        # whichever of the three came last
        until(lambda: statuses == [503])
        status, _, headers = ask(url, request(PNG), token=None)
        assert (status, headers["retry-after"]) == (503, "1")
        begun = time.monotonic()
        assert ask(url, b"", path="/health", token=None, method="GET")[0] == 200
        assert time.monotonic() - begun < 10.0
        assert statuses == [503]
        gate.go.set()
        for thread in asking:
            thread.join()
        assert statuses == [503, 200, 200]
        assert gate.most == 1
        assert len(gate.threads) == 1


def test_a_client_sent_away_comes_back_until_it_has_all_its_scores() -> None:
    gate = Gate()
    gate.go.set()
    with served({"red": gate}, limits=Limits(max_requests=1)) as url:
        answer = HttpReward(endpoints=[url], name="red", batch=1, concurrency=4)(some_images(8), ["a"] * 8)
    torch.testing.assert_close(answer, redness(some_images(8), []), atol=1e-6, rtol=0)


def test_what_nobody_waits_for_any_more_is_not_scored() -> None:
    gate = Gate()
    with served({"red": gate}, limits=Limits(max_requests=2)) as url:
        first = threading.Thread(target=ask, args=(url, request(PNG)))
        first.start()
        until(lambda: gate.calls == 1)
        parts = urlsplit(url)
        body = json.dumps(request(PNG)).encode()
        with socket.create_connection((str(parts.hostname), parts.port or 0)) as connection:
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            # it is taken in now
            assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
            connection.sendall(body)
        # and has hung up before its turn came
        time.sleep(0.1)
        gate.go.set()
        first.join()
        until(lambda: ask(url, request(PNG))[0] == 200)
        assert gate.calls == 2
