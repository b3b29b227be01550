"""VisionJudge against an OpenAI-compatible server: what it sends, which number it takes, and what it refuses."""

import base64
import json
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.config import load_config
from fastgrpo.rewards.remote.errors import RemoteError
from fastgrpo.rewards.remote.vision_judge import VisionJudge
from tests.rewards.remote.scripted import Reply, Scripted, some_images


def judge(url: str, **settings: Any) -> VisionJudge:
    defaults: dict[str, Any] = {
        "model": "a-judge",
        "template": "Caption: [{prompt}] Say {Score: X}",
        "pattern": r"Score:\s*([-0-9.]+)",
        "low": 1.0,
        "high": 5.0,
        "timeout_seconds": 5.0,
        "patience_seconds": 3.0,
    }
    return VisionJudge(**defaults | settings, endpoints=[f"{url}/v1"])


def says(text: object) -> Reply:
    message = {"role": "assistant", "content": text}
    return Reply(json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode())


def test_it_sends_the_image_the_filled_template_and_nothing_random() -> None:
    images_BCHW = some_images(1)
    prompt = 'a {prompt} of {0} "braces" {and} 100% \\n $x'
    with Scripted(then=lambda _: says("Score: 3")) as server:
        answer = judge(server.url)(images_BCHW, [prompt])
    assert answer.tolist() == [0.5]
    asked = server.asked[0]
    assert asked.path == "/v1/chat/completions"
    assert (asked.content["model"], asked.content["temperature"], asked.content["max_tokens"]) == ("a-judge", 0, 512)
    image, text = asked.content["messages"][0]["content"]
    assert text == {"type": "text", "text": f"Caption: [{prompt}] Say {{Score: X}}"}
    head, _, png = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    pixels_HWC = np.array(Image.open(BytesIO(base64.b64decode(png))))
    assert torch.equal(torch.from_numpy(pixels_HWC), (images_BCHW[0] * 255).round().byte().permute(1, 2, 0))


def test_every_image_gets_the_score_of_its_own_verdict() -> None:
    def by_prompt(content: Any) -> Reply:
        verdict = says(f"Score: {1 + len(content['messages'][0]['content'][1]['text']) % 5}")
        # long enough for the next question to come, however busy the machine is
        return replace(verdict, seconds=0.1)

    prompts = ["a" * length for length in range(12)]
    with Scripted(then=by_prompt) as server:
        answer = judge(server.url, concurrency=4)(some_images(12), prompts)
        base = len("Caption: [] Say {Score: X}")
    assert answer.tolist() == [((base + length) % 5) / 4 for length in range(12)]
    assert server.most_in_flight > 1


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 1", 0.0),
        ("Score: 5", 1.0),
        ("Score: 4.5 of 5", 0.875),
        ("I was told to write Score: 1. It is good, though.\nScore: 4", 0.75),
        ("Score: X would be wrong. Score: 2", 0.25),
    ],
)
def test_the_last_match_is_mapped_to_the_scale(text: str, score: float) -> None:
    with Scripted(then=lambda _: says(text)) as server:
        assert judge(server.url)(some_images(1), ["a"]).tolist() == [score]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("I cannot judge this image.", "without a match"),
        ("", "without a match"),
        ("Score: 6", "6 is off the scale from 1 to 5"),
        ("Score: 0", "0 is off the scale from 1 to 5"),
        ("Score: -3", "-3 is off the scale from 1 to 5"),
        ("Score: 1.2.3", "'1.2.3' is not a number"),
        ("x" * 5000, "without a match"),
    ],
)
def test_an_answer_without_a_score_is_asked_again_then_quoted(text: str, why: str) -> None:
    with Scripted(says(text), says(text), then=lambda _: says("Score: 3")) as server:
        assert judge(server.url)(some_images(1), ["a"]).tolist() == [0.5]
    with Scripted(then=lambda _: says(text)) as server:
        with pytest.raises(
            RemoteError, match=f"{why}.*3 times for prompt 'a cat'; correct template or pattern"
        ) as raised:
            judge(server.url)(some_images(1), ["a cat"])
        assert len(server.asked) == 3
    assert text[-150:] in str(raised.value)
    assert len(str(raised.value)) < 600


GARBAGE = {
    "no choices": Reply(b"{}"),
    "empty choices": Reply(b'{"choices": []}'),
    "a list": Reply(b"[]"),
    "null content": says(None),
    "parts": says([{"type": "text", "text": "Score: 3"}]),
    "html": Reply(b"<html>"),
    "rate limit": Reply(b'{"error": {"message": "slow down"}}', status=429),
}


@pytest.mark.parametrize("reply", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_asked_again(reply: Reply) -> None:
    with Scripted(reply, reply, reply, then=lambda _: says("Score: 3")) as server:
        assert judge(server.url)(some_images(1), ["a"]).tolist() == [0.5]
        assert len(server.asked) == 4


def test_a_model_that_is_not_there_stops_the_run() -> None:
    missing = Reply(b'{"error": {"message": "no model a-judge"}}', status=404)
    says_so = r"status 404.*no model a-judge.*name of the reward or model"
    with Scripted(then=lambda _: missing) as server, pytest.raises(RemoteError, match=says_so):
        judge(server.url)(some_images(1), ["a"])


def test_the_token_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_TOKEN", "t0ken")
    with Scripted(then=lambda _: says("Score: 3")) as server:
        judge(server.url, token_env="TEST_JUDGE_TOKEN")(some_images(1), ["a"])
        assert server.asked[0].headers["Authorization"] == "Bearer t0ken"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"template": "no place for it"}, "must have {prompt} in it"),
        ({"pattern": "Score: (["}, "is not a regular expression"),
        ({"pattern": "Score: [1-5]"}, "has no group"),
        ({"low": 5.0, "high": 1.0}, "reward.terms.NAME.low must be below .*high, both finite, got 5.0 and 1.0"),
        ({"high": float("inf")}, "reward.terms.NAME.low must be below .*high, both finite, got 1.0 and inf"),
        ({"model": ""}, "reward.terms.NAME.model is empty; give the name"),
        ({"tries": 0}, "reward.terms.NAME.tries must be at least 1, got 0"),
        ({"max_tokens": 0}, "reward.terms.NAME.max_tokens must be at least 1, got 0"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        judge("http://127.0.0.1:1", **settings)


def test_the_shipped_config_reads_answers_in_the_manner_of_unified_reward() -> None:
    from fastgrpo.pieces import build

    with Scripted(then=lambda _: says("The cat is red.\n\n**Final Score:** 4.5")) as server:
        words = ["reward=vision_judge", f"reward.terms.vision_judge.endpoints=[{server.url}/v1]"]
        rewards = build(load_config("train", words).reward)
        assert rewards.score(some_images(2), ["a {red} cat", "b"]).tolist() == [0.875, 0.875]
    texts = {asked.content["messages"][0]["content"][1]["text"].splitlines()[-1] for asked in server.asked}
    assert texts == {"Text Caption: [a {red} cat]", "Text Caption: [b]"}
