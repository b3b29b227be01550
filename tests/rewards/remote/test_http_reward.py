"""HttpReward against servers that work, fail, lie, or come late: the scores are right or there are none."""

import json
import logging
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgrpo.rewards.golden import golden_set
from fastgrpo.rewards.remote.errors import RemoteError
from fastgrpo.rewards.remote.http_reward import HttpReward
from fastgrpo.rewards.reward import RewardError
from fastgrpo.rewards.scoring import Scoring
from fastgrpo.rewards.shapes import ShapesReward
from tests.rewards.remote.scripted import (
    Reply,
    Scripted,
    free_port,
    redness,
    redness_of_png,
    scores,
    served,
    some_images,
)


def http_reward(*endpoints: str, **settings: Any) -> HttpReward:
    return HttpReward(
        **{"name": "red", "timeout_seconds": 5.0, "patience_seconds": 4.0, **settings}, endpoints=endpoints
    )


def check(reward: HttpReward, num_images: int = 3) -> None:
    """The reward scores ``num_images`` as redness does in this process."""
    images_BCHW = some_images(num_images)
    answer = reward(images_BCHW, ["a"] * num_images)
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, redness(images_BCHW, []), atol=1e-6, rtol=0)


# what it asks


def test_a_served_reward_scores_as_in_this_process() -> None:
    golden = golden_set()
    reward = ShapesReward(strict=False)
    with served({"shapes": reward}) as url:
        answer = http_reward(url, name="shapes", batch=3)(golden.images_BCHW, golden.prompts)
    assert torch.equal(answer, reward(golden.images_BCHW, golden.prompts))
    assert answer.unique().numel() > 2


def test_pixels_are_rounded_to_bytes_half_to_even() -> None:
    # 255 * x is 0.5, 1.5, 2.5, 254.4, and beyond both ends
    values = torch.tensor([0.5, 1.5, 2.5, 254.4, -30.0, 300.0]).double() / 255
    images_BCHW = values[:, None, None, None].expand(-1, 3, 4, 4)
    with Scripted() as server:
        answer = http_reward(server.url)(images_BCHW, ["a"] * 6)
    torch.testing.assert_close(answer * 255, torch.tensor([0.0, 2.0, 2.0, 254.0, 0.0, 255.0]))


def test_requests_have_batch_images_with_their_prompts_and_scores_keep_their_order() -> None:
    images_BCHW, prompts = some_images(11), [f"prompt {i} \u00fc \U0001f600" for i in range(11)]
    with Scripted() as server:
        answer = http_reward(server.url, batch=4)(images_BCHW, prompts)
    torch.testing.assert_close(answer, redness(images_BCHW, []), atol=1e-6, rtol=0)
    assert sorted(len(asked.content["images"]) for asked in server.asked) == [3, 4, 4]
    assert {asked.path for asked in server.asked} == {"/v1/rewards/red/score"}
    pairs = [
        pair for asked in server.asked for pair in zip(asked.content["prompts"], asked.content["images"], strict=True)
    ]
    assert {text: pytest.approx(redness_of_png(png)) for text, png in pairs} == dict(
        zip(prompts, answer.tolist(), strict=True)
    )


def test_no_images_are_no_request() -> None:
    assert http_reward(f"http://127.0.0.1:{free_port()}")(torch.zeros(0, 3, 8, 8), []).shape == (0,)


def test_concurrency_bounds_the_requests_of_all_callers_together() -> None:
    with Scripted(then=lambda content: Reply(scores(*[0.5] * len(content["images"])).body, seconds=0.1)) as server:
        reward = http_reward(server.url, batch=1, concurrency=3)
        threads = [threading.Thread(target=reward, args=(some_images(4), ["a"] * 4)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert server.most_in_flight == 3
    assert len(server.asked) == 8


# several servers


def test_work_is_spread_over_the_servers() -> None:
    slow = lambda content: Reply(scores(*[0.5] * len(content["images"])).body, seconds=0.02)  # noqa: E731
    with Scripted(then=slow) as first, Scripted(then=slow) as second:
        http_reward(first.url, second.url, batch=1, concurrency=2)(some_images(12), ["a"] * 12)
    assert min(len(first.asked), len(second.asked)) >= 4


def test_a_dead_server_is_left_out_and_the_other_takes_over() -> None:
    with Scripted() as alive:
        reward = http_reward(f"http://127.0.0.1:{free_port()}", alive.url, batch=1)
        check(reward, 10)
        assert len(alive.asked) == 10


def test_a_server_that_fails_gets_one_question_at_a_time_until_it_answers() -> None:
    together: list[int] = []

    def answer(content: Any) -> Reply:
        time.sleep(0.1)
        together.append(server._in_flight)
        return scores(*map(redness_of_png, content["images"]))

    # the first four fail together, so what comes next is the one question
    with Scripted(*[Reply(status=500, seconds=0.1)] * 4, then=answer) as server:
        check(http_reward(server.url, batch=1, concurrency=4), 8)
    assert together[0] == 1
    assert max(together) > 1


def test_a_server_that_sends_away_what_is_too_much_gets_what_it_takes() -> None:
    sent_away: list[int] = []

    def at_most_two(content: Any) -> Reply:
        if server._in_flight > 2:
            sent_away.append(server._in_flight)
            return Reply(status=503)
        return Reply(scores(*map(redness_of_png, content["images"])).body, seconds=0.05)

    with Scripted(then=at_most_two) as server:
        check(http_reward(server.url, batch=1, concurrency=8), 24)
    # the six of the first eight, and a try now and then whether it takes more
    assert 1 <= len(sent_away) <= 12


def test_a_server_that_is_killed_and_restarted_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    reward = http_reward(f"http://127.0.0.1:{port}")
    with served({"red": redness}, port=port):
        check(reward)
    answers: list[Tensor] = []
    waiting = threading.Thread(target=lambda: answers.append(reward(some_images(3), ["a"] * 3)))
    waiting.start()
    time.sleep(0.3)
    assert not answers
    with served({"red": redness}, port=port):
        waiting.join()
    torch.testing.assert_close(answers[0], redness(some_images(3), []), atol=1e-6, rtol=0)
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2
    assert "Connection refused" in said[0]
    assert said[1].endswith("answers again")


def test_an_interruption_does_not_wait_for_a_dead_server() -> None:
    program = (
        # whoever runs the tests in the background has SIGINT ignored
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import threading, torch; from fastgrpo.rewards.remote.http_reward import HttpReward; "
        f"reward = HttpReward(endpoints=['http://127.0.0.1:{free_port()}'], name='red', patience_seconds=60.0); "
        "ask = lambda: reward(torch.zeros(2, 3, 8, 8), ['a'] * 2); "
        # as the trainer does it, and in the main thread too
        "threading.Thread(target=ask, daemon=True).start(); print('asking', flush=True); ask()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "asking\n"
    time.sleep(0.2)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    # a fraction of its patience
    assert time.monotonic() - begun < 20.0
    assert "KeyboardInterrupt" in said


# answers that are none


GARBAGE = {
    "html": Reply(b"<html>502</html>"),
    "broken json": Reply(b'{"scores": [0.1, 0.2'),
    "not an object": Reply(b"[0.1, 0.2, 0.3]"),
    "no scores": Reply(b'{"score": [0.1, 0.2, 0.3]}'),
    "too few": scores(0.1, 0.2),
    "too many": scores(0.1, 0.2, 0.3, 0.4),
    "strings": scores("0.1", "0.2", "0.3"),
    "booleans": scores(True, False, True),
    "nan": scores(0.1, float("nan"), 0.3),
    "infinity": scores(0.1, float("inf"), 0.3),
    "a float that overflows": Reply(b'{"scores": [0.1, 1e999, 0.3]}'),
    "beyond float32": scores(0.1, 1e39, 0.3),
    "an integer of 4000 digits": Reply(b'{"scores": [0.1, ' + b"9" * 4000 + b", 0.3]}"),
    "lists": scores([0.1], [0.2], [0.3]),
    "nesting": Reply(b"[" * 100_000),
    "not utf-8": Reply(b'{"scores": [0.1, 0.2, "\xff\xfe"]}'),
    "empty": Reply(b""),
    "no content": Reply(status=204),
    "cut off": Reply(scores(0.1, 0.2, 0.3).body, claimed_bytes=500),
    "gigantic": Reply(b'{"scores": [9, 9, 9]' + b" " * (2 << 20) + b"}"),
    "compressed": Reply(scores(0.1, 0.2, 0.3).body, headers={"Content-Encoding": "gzip"}),
    "500": Reply(b'{"detail": "CudaError"}', status=500),
    "503": Reply(status=503),
    "408": Reply(status=408),
    "all null": scores(None, None, None),
}


@pytest.mark.parametrize("reply", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_asked_again(reply: Reply) -> None:
    with Scripted(reply, reply) as server:
        check(http_reward(server.url))
        assert len(server.asked) == 3


@pytest.mark.parametrize("reply", GARBAGE.values(), ids=GARBAGE)
def test_garbage_to_the_end_is_an_error_that_says_where_and_why(reply: Reply) -> None:
    with Scripted(then=lambda _: reply) as server:
        reward = http_reward(server.url, patience_seconds=0.2)
        with pytest.raises(RemoteError, match=r"reward 'red' at .*: no answer after \d+ attempts in \d+ s") as raised:
            reward(some_images(3), ["a"] * 3)
        assert server.url in str(raised.value)
        assert len(str(raised.value)) < 800
        assert len(server.asked) >= 2


def test_only_images_without_a_score_are_asked_again() -> None:
    def half(content: Any) -> Reply:
        values = [redness_of_png(image) for image in content["images"]]
        return scores(*[None if i % 2 else value for i, value in enumerate(values)])

    with Scripted(then=half) as server:
        check(http_reward(server.url), 8)
    assert [len(asked.content["images"]) for asked in server.asked] == [8, 4, 2, 1]


def test_an_image_that_never_gets_its_score_leaves_no_score_at_all() -> None:
    with Scripted(then=lambda content: scores(*[None if p == "bad" else 1.0 for p in content["prompts"]])) as server:
        with pytest.raises(RemoteError, match=r"no score for 1 of 1 images, the first of 'bad'"):
            http_reward(server.url, patience_seconds=0.3)(some_images(3), ["a", "bad", "c"])
        # a server that answers is not at fault: it does not rest
        check_other = http_reward(server.url)(some_images(1), ["a"])
        assert check_other.tolist() == [1.0]


def test_a_late_answer_is_asked_again() -> None:
    with Scripted(Reply(scores(9.0, 9.0, 9.0).body, seconds=10.0)) as server:
        begun = time.monotonic()
        check(http_reward(server.url, timeout_seconds=0.2))
        assert time.monotonic() - begun < 5.0


def test_an_answer_that_trickles_in_does_not_hold_the_request() -> None:
    # each byte is in time, all of them take 5 s
    with Scripted(Reply(b" " * 100, seconds_a_byte=0.05)) as server:
        begun = time.monotonic()
        with pytest.raises(RemoteError, match=r"not complete after 0.3 s"):
            http_reward(server.url, timeout_seconds=0.3, patience_seconds=0.0)(some_images(1), ["a"])
        assert time.monotonic() - begun < 4.0


@pytest.mark.parametrize(
    "after", [lambda: "1", lambda: time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))]
)
def test_retry_after_is_respected(after: Callable[[], str]) -> None:
    with Scripted(Reply(status=429, headers={"Retry-After": after()})) as server:
        begun = time.monotonic()
        check(http_reward(server.url))
        assert 0.9 < time.monotonic() - begun < 10.0


def test_patience_bounds_the_wait_for_a_dead_server() -> None:
    begun = time.monotonic()
    with pytest.raises(
        RemoteError, match=r"after \d+ attempts in \d s.*Connection refused.*raise reward.terms.NAME.patience_seconds"
    ):
        http_reward(f"http://127.0.0.1:{free_port()}", patience_seconds=0.7, batch=1)(some_images(6), ["a"] * 6)
    # once, not for each of the six
    assert 0.7 <= time.monotonic() - begun < 3.5


def test_retry_after_a_year_waits_no_longer_than_patience() -> None:
    with Scripted(then=lambda _: Reply(status=503, headers={"Retry-After": "31536000"})) as server:
        begun = time.monotonic()
        with pytest.raises(RemoteError, match="status 503"):
            http_reward(server.url, patience_seconds=0.5)(some_images(1), ["a"])
        assert 0.5 <= time.monotonic() - begun < 10.0


# answers that no retry changes


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (400, "correct the endpoint"),
        (401, "environment variable that token_env names"),
        (403, "environment variable that token_env names"),
        (404, "correct the endpoint, or the name"),
        (413, "lower batch"),
        (422, "the same protocol"),
        (301, "give the address itself"),
        (307, "give the address itself"),
    ],
)
def test_a_refusal_stops_at_once_and_says_what_to_do(status: int, says: str) -> None:
    body = json.dumps({"detail": "because"}).encode()
    with Scripted(then=lambda _: Reply(body, status=status)) as server:
        with pytest.raises(RemoteError, match=f"reward 'red' at {server.url}: status {status}: .*because.*{says}"):
            http_reward(server.url)(some_images(1), ["a"])
        assert len(server.asked) == 1


def test_the_scorer_does_not_ask_again_after_it() -> None:
    with Scripted(then=lambda _: Reply(status=404)) as server:
        with pytest.raises(RewardError):
            Scoring(retries=5)("red", http_reward(server.url), some_images(1), ["a"])
        assert len(server.asked) == 1


def test_the_first_request_that_fails_for_good_ends_the_others() -> None:
    with Scripted(Reply(status=404, seconds=0.2), then=lambda _: Reply(status=500)) as server:
        begun = time.monotonic()
        with pytest.raises(RemoteError, match="status 404"):
            http_reward(server.url, batch=1, concurrency=2, patience_seconds=60.0)(some_images(40), ["a"] * 40)
        assert time.monotonic() - begun < 20.0
        time.sleep(0.1)
        num_asked = len(server.asked)
        time.sleep(0.5)
        assert len(server.asked) == num_asked < 40


# secrets


def test_the_token_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    token = "s3cret-t0ken-of-the-test"
    monkeypatch.setenv("TEST_REWARD_TOKEN", token)
    caplog.set_level(logging.DEBUG)

    def echo(status: int) -> Reply:
        return Reply(b"your token is Bearer " + token.encode() + b" " * 300, status=status)

    with Scripted(echo(500), echo(200), then=lambda _: echo(401)) as server:
        reward = http_reward(server.url, token_env="TEST_REWARD_TOKEN")
        with pytest.raises(RemoteError, match=r"\[token\]") as raised:
            reward(some_images(1), ["a"])
        assert [asked.headers["Authorization"] for asked in server.asked] == [f"Bearer {token}"] * 3
    chain, error = [str(raised.value)], raised.value.__cause__
    while error is not None:
        chain, error = [*chain, str(error)], error.__cause__ or error.__context__
    assert token not in repr(reward) + caplog.text + " ".join(chain)
    assert "[token]" in caplog.text


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_no_token_along(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", "s3cret")
    with Scripted() as thief:
        location = {"Location": f"{thief.url}/v1/rewards/red/score"}
        with Scripted(then=lambda _: Reply(status=status, headers=location)) as server:
            with pytest.raises(RemoteError, match="redirects are not followed"):
                http_reward(server.url, token_env="TEST_REWARD_TOKEN")(some_images(1), ["a"])
            assert len(server.asked) == 1
        assert not thief.asked


def test_without_a_token_none_is_sent_not_even_that_of_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password s3cret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with Scripted() as server:
        check(http_reward(server.url))
        assert "Authorization" not in server.asked[0].headers


def test_a_proxy_does_not_see_what_is_not_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    with Scripted() as server, Scripted() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        check(http_reward(server.url))
        assert not proxy.asked


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "line\nbreak", "t\u00f6ken"])
def test_a_token_that_cannot_be_sent_is_refused_without_being_shown(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEST_REWARD_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("TEST_REWARD_TOKEN", value)
    with pytest.raises(ValueError, match="TEST_REWARD_TOKEN") as raised:
        http_reward("http://127.0.0.1:1", token_env="TEST_REWARD_TOKEN")
    secret = (value or "").strip()
    assert not secret or secret not in str(raised.value)


# mistakes


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("127.0.0.1:8000", "reward.terms.NAME.endpoints has addresses like"),
        ("ftp://127.0.0.1", "reward.terms.NAME.endpoints has addresses like"),
        ("file:///etc/passwd", "reward.terms.NAME.endpoints has addresses like"),
        ("http://", "reward.terms.NAME.endpoints has addresses like"),
        ("http://host:port", "reward.terms.NAME.endpoints has addresses like"),
        ("http://host?token=1", "reward.terms.NAME.endpoints has addresses like"),
        ("http://a host", "reward.terms.NAME.endpoints has addresses like"),
        ("http://me:s3cret@host", "use token_env"),
    ],
)
def test_an_address_that_is_none_is_refused(endpoint: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        http_reward(endpoint)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"endpoints": "http://127.0.0.1:8000"}, "reward.terms.NAME.endpoints is a list"),
        ({"endpoints": []}, "endpoints is a list"),
        ({"name": "../../etc"}, "reward.terms.NAME.name has letters, digits"),
        ({"name": ".."}, "letters, digits"),
        ({"name": ""}, "letters, digits"),
        ({"batch": 0}, "reward.terms.NAME.batch must be at least 1 image, got 0"),
        ({"concurrency": 0}, "reward.terms.NAME.concurrency must be at least 1, got 0"),
        ({"max_answer_bytes": 0}, "reward.terms.NAME.max_answer_bytes must be at least 1, got 0"),
        ({"timeout_seconds": 0.0}, "reward.terms.NAME.timeout_seconds must be positive and finite, got 0.0"),
        ({"timeout_seconds": math.inf}, "reward.terms.NAME.timeout_seconds must be positive and finite, got inf"),
        ({"patience_seconds": -1.0}, "reward.terms.NAME.patience_seconds must be at least 0, got -1.0"),
        ({"patience_seconds": math.nan}, "reward.terms.NAME.patience_seconds must be at least 0, got nan"),
        ({"startup_patience_seconds": -1.0}, "reward.terms.NAME.startup_patience_seconds must be at least 0, got -1"),
        (
            {"golden_set": "scens"},
            "reward.terms.NAME.golden_set must be one of scenes, texts, prompts, none, got 'scens'",
        ),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        HttpReward(**{"endpoints": ["http://127.0.0.1:1"], "name": "red", **settings})


def test_images_that_are_not_finite_are_no_black_ones() -> None:
    images_BCHW = some_images(3)
    images_BCHW[1, 0, 0, 0] = float("nan")
    with Scripted() as server:
        with pytest.raises(RewardError, match="1 of 3 images have pixels that are not finite, the first is image 1"):
            http_reward(server.url)(images_BCHW, ["a"] * 3)
        assert not server.asked


def test_waiting_leaves_the_global_generators_alone() -> None:
    import random

    random.seed(7)
    expected, state = random.Random(7).random(), torch.get_rng_state()
    with Scripted(Reply(status=500), Reply(status=500)) as server:
        check(http_reward(server.url))
    assert random.random() == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert np.isfinite(expected)
