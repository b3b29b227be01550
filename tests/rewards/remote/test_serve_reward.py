"""The command ``fastgrpo serve-reward``: a process that serves, and what it refuses before it does."""

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest
import requests
import torch

from fastgrpo import cli
from fastgrpo.rewards.golden import golden_set
from fastgrpo.rewards.remote.http_reward import HttpReward
from fastgrpo.rewards.remote.wire import to_pixels, to_png
from fastgrpo.rewards.shapes import ShapesReward
from tests.rewards.remote.scripted import free_port, some_images


@contextmanager
def serving(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process, and the address that it prints."""
    command = [sys.executable, "-m", "fastgrpo.cli", "serve-reward", "port=0", "runtime.device=cpu", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+:\d+", line)
        assert found, line + process.communicate()[1]
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def test_it_serves_terms_and_watched_rewards_and_ends_cleanly_on_sigterm() -> None:
    golden = golden_set()
    with serving("reward=shapes") as (process, url):
        assert requests.get(f"{url}/health", timeout=30).json()["rewards"] == ["shapes", "shapes_strict"]
        for name, strict in (("shapes", False), ("shapes_strict", True)):
            remote = HttpReward(endpoints=[url], name=name, batch=5)(golden.images_BCHW, golden.prompts)
            assert torch.equal(remote, ShapesReward(strict=strict)(golden.images_BCHW, golden.prompts))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_it_serves_a_reward_of_the_users_own_beyond_loopback_to_who_has_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_served.py").write_text("def blue(images, prompts):\n    return images[:, 2].mean(dim=(1, 2))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OWN_TOKEN", "t0ken-of-mine")
    port, found = free_port(), Queue[object]()
    url = f"http://127.0.0.1:{port}"

    def visit() -> None:
        try:
            remote = HttpReward(endpoints=[url], name="custom", token_env="OWN_TOKEN")
            remote.greet()
            found.put(requests.post(f"{url}/v1/rewards/custom/score", json={}, timeout=30).status_code)
            found.put(remote(torch.full((2, 3, 8, 8), 0.2), ["a", "b"]))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    words = ["reward=custom", "reward.path=own_served.blue", "host=0.0.0.0", f"port={port}", "token_env=OWN_TOKEN"]
    # whoever runs the tests in the background has it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=visit, daemon=True).start()
        assert cli.main(["serve-reward", "runtime.device=cpu", *words]) == cli.INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.get_nowait() == 401
    torch.testing.assert_close(found.get_nowait(), torch.tensor([0.2, 0.2]))
    said = capsys.readouterr()
    assert f"serving custom on http://0.0.0.0:{port}, to who has the token in OWN_TOKEN" in said.out
    assert "t0ken-of-mine" not in said.out + said.err


def test_a_server_whose_gpu_has_failed_ends_by_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_broken.py").write_text(
        "import torch\n\n\ndef broken(images, prompts):\n"
        '    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    port, found = free_port(), Queue[int]()
    url = f"http://127.0.0.1:{port}"

    def visit() -> None:
        HttpReward(endpoints=[url], name="custom").greet()
        body = {"images": [base64.b64encode(to_png(to_pixels(some_images(1))[0])).decode()], "prompts": ["a"]}
        found.put(requests.post(f"{url}/v1/rewards/custom/score", json=body, timeout=30).status_code)

    threading.Thread(target=visit, daemon=True).start()
    words = ["reward=custom", "reward.path=own_broken.broken", "reward.golden=false", f"port={port}"]
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        cli.main(["serve-reward", "runtime.device=cpu", *words])
    assert found.get(timeout=30) == 500


def fails(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert cli.main(["serve-reward", "runtime.device=cpu", *words]) == cli.BAD_INPUT
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::ffff:0.0.0.0]".strip("[]")])
def test_without_a_token_it_listens_on_loopback_only(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, [f"host='{host}'", "port=0"], "can be reached from other machines; export a token|cannot listen")


def test_an_address_of_this_machine_in_its_network_needs_a_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: outside)
    # a name says nothing: what it resolves to is bound
    fails(capsys, ["host=localhost", "port=0"], "host=localhost can be reached from other machines")


def test_a_token_variable_without_a_token_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_SERVE_TOKEN", raising=False)
    fails(capsys, ["host=0.0.0.0", "token_env=TEST_SERVE_TOKEN"], "TEST_SERVE_TOKEN holds no token; export it")


def test_a_port_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        fails(capsys, [f"port={port}"], f"cannot listen on 127.0.0.1 port {port} .*give host= or port= another")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("port=70000", "port must lie in 0 to 65535"),
        ("host=''", "cannot listen on"),
        ("host=a..b", "cannot listen on a..b port 8000 .*give host= or port= another"),
        ("limits.max_images=0", "limits.max_images must be positive, got 0"),
        ("limits.max_image=3", "unknown key limits.max_image; did you mean limits.max_images"),
        ("reward=nothing", "reward has no option 'nothing'"),
    ],
)
def test_a_bad_setting_is_one_line(word: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, [word], says)


@pytest.mark.parametrize("module", ["fastapi", "uvicorn"])
def test_a_missing_library_names_the_extra(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "fastgrpo.rewards.remote.server", raising=False)
    fails(capsys, ["port=0"], rf"serve-reward needs {module}; install it with pip install 'fastgrpo\[serve\]'")
