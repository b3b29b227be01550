"""A judge that is not there is told in seconds before a run, and waited for as long as ever during it."""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from fastgrpo.config import load_config
from fastgrpo.pieces import build
from fastgrpo.rewards.remote.errors import RemoteError
from fastgrpo.rewards.remote.http_reward import HttpReward
from fastgrpo.rewards.reward import Reward
from fastgrpo.rewards.self_test import golden_scores
from fastgrpo.rewards.weighted_sum import Rewards
from tests.rewards.remote.scripted import Reply, Scripted, free_port, redness, served, some_images

DEAD = {
    "http": ["reward=http", "reward.terms.http.name=red"],
    "geneval": ["reward=geneval"],
    "vision_judge": ["reward=vision_judge"],
}


def http_reward(*endpoints: str, **settings: Any) -> HttpReward:
    defaults = {"name": "red", "timeout_seconds": 5.0, "startup_patience_seconds": 0.6}
    return HttpReward(**defaults | settings, endpoints=endpoints)  # type: ignore[arg-type]


def tried(reward: Reward) -> Callable[[], Any]:
    return lambda: golden_scores(Rewards(terms={"mine": reward}, weights={"mine": 1.0}), "cpu")


def seconds_of(call: Callable[[], Any], says: str) -> float:
    """How long a call takes to fail so."""
    begun = time.monotonic()
    with pytest.raises(RemoteError, match=says):
        call()
    return time.monotonic() - begun


@contextmanager
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("name", DEAD)
def test_each_remote_reward_that_nobody_serves_ends_before_a_run(name: str, caplog: pytest.LogCaptureFixture) -> None:
    url, key = f"http://127.0.0.1:{free_port()}", f"reward.terms.{name}"
    words = [*DEAD[name], f"{key}.endpoints=[{url}]", f"{key}.startup_patience_seconds=0.6"]
    rewards = build(load_config("train", words).reward)
    says = (
        rf"nobody answered in 0.6 s \({url}: .*Connection refused\); start the server, correct "
        r"reward.terms.NAME.endpoints, or raise reward.terms.NAME.startup_patience_seconds"
    )
    assert 0.6 <= seconds_of(lambda: golden_scores(rewards, "cpu"), says) < 15
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"waiting up to 0.6 s for {url}: " in said


@pytest.mark.parametrize("name", DEAD)
def test_twenty_seconds_are_the_default(name: str) -> None:
    config = load_config("train", DEAD[name]).reward
    assert OmegaConf.select(config, f"terms.{name}.startup_patience_seconds") == 20
    assert OmegaConf.select(config, f"terms.{name}.patience_seconds") == 600
    assert build(config).terms[name].startup_patience_seconds == 20


def test_a_server_that_takes_connections_and_says_nothing_is_not_there() -> None:
    with silent() as url:
        assert 0.6 <= seconds_of(tried(http_reward(url)), "nobody answered in 0.6 s") < 15


def test_what_a_gateway_says_for_a_server_that_is_not_there_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with Scripted() as server:
        monkeypatch.setattr("fastgrpo.rewards.remote.connection._NOBODY_BEHIND", (501,))
        # a server of the tests knows no GET
        seconds_of(tried(http_reward(server.url)), "nobody answered in 0.6 s .*status 501")


def test_one_of_several_servers_is_enough() -> None:
    with silent() as deaf, served({"red": redness}) as alive:
        reward = http_reward(f"http://127.0.0.1:{free_port()}", deaf, alive, startup_patience_seconds=30.0)
        reward.greet()


def test_a_server_that_comes_within_the_patience_is_waited_for() -> None:
    port = free_port()
    reward = http_reward(f"http://127.0.0.1:{port}", startup_patience_seconds=30.0)
    greeted = threading.Thread(target=reward.greet)
    greeted.start()
    time.sleep(0.3)
    assert greeted.is_alive()
    with served({"red": redness}, port=port):
        greeted.join(30)
    assert not greeted.is_alive()


def test_a_greeting_takes_no_token_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", "s3cret")
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            heard.append(connection.recv(4096))
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        http_reward(f"http://127.0.0.1:{listener.getsockname()[1]}", token_env="TEST_REWARD_TOKEN").greet()
    assert heard[0].startswith(b"GET /health HTTP/1.1\r\n")
    assert b"s3cret" not in heard[0]
    assert b"uthorization" not in heard[0]


def test_before_the_first_answer_a_server_that_fails_is_given_up_early_too() -> None:
    with Scripted(then=lambda _: Reply(status=500)) as server:
        says = "status 500.*raise reward.terms.NAME.startup_patience_seconds"
        assert 0.6 <= seconds_of(tried(http_reward(server.url)), says) < 15


def test_once_it_has_answered_a_question_has_the_patience_of_a_run() -> None:
    with Scripted() as server:
        reward = http_reward(server.url, patience_seconds=1.5, startup_patience_seconds=0.1)
        assert torch.equal(reward(some_images(1), ["a"]) > 0, torch.tensor([True]))
    says = "raise reward.terms.NAME.patience_seconds"
    assert 1.5 <= seconds_of(lambda: reward(some_images(1), ["a"]), says) < 7
