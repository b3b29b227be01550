"""The protocol as its page describes it: a server of the standard library alone, and the shipped configs."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.config import load_config
from fastgrpo.pieces import build
from fastgrpo.rewards.remote.http_reward import HttpReward
from fastgrpo.rewards.remote.limits import Limits
from fastgrpo.rewards.remote.wire import read_scores, to_pixels, to_png, write_request
from fastgrpo.rewards.reward import RewardError
from tests.rewards.remote.scripted import redness, redness_of_png, some_images


class FortyLines(BaseHTTPRequestHandler):
    """All that an evaluator in an environment of its own needs, such as GenEval's: no fastgrpo, no torch."""

    known = frozenset({"a red circle", "two cats"})

    def do_GET(self) -> None:
        self.reply(200, {"status": "ok", "rewards": ["geneval"], "max_images": 64, "max_pixels": 1 << 22})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/rewards/geneval/score":
            return self.reply(404, {"detail": "no such reward"})
        if unknown := set(request["prompts"]) - self.known:
            return self.reply(422, {"detail": f"not prompts of GenEval: {sorted(unknown)}"})
        images = [np.array(Image.open(BytesIO(base64.b64decode(image)))) for image in request["images"]]
        return self.reply(200, {"scores": [float(image[:, :, 0].mean() / 255) for image in images]})

    def reply(self, status: int, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_a_server_of_the_standard_library_serves_geneval() -> None:
    server = HTTPServer(("127.0.0.1", 0), FortyLines)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    words = ["reward=geneval", f"reward.terms.geneval.endpoints=[http://127.0.0.1:{server.server_port}]"]
    rewards = build(load_config("train", words).reward)
    images_BCHW, prompts = some_images(4), ["a red circle", "two cats"]
    answer = rewards(images_BCHW, prompts)
    torch.testing.assert_close(answer.total_PG.flatten(), redness(images_BCHW, []), atol=1e-6, rtol=0)
    with pytest.raises(RewardError, match=r"status 422: .not prompts of GenEval: \['a dog'\]"):
        rewards(images_BCHW, ["a red circle", "a dog"])
    server.shutdown()
    server.server_close()


def test_the_http_config_names_the_served_reward() -> None:
    with pytest.raises(ValueError, match=r"reward\.terms\.http\.name has no value"):
        load_config("train", ["reward=http"])
    words = ["reward=http", "reward.terms.http.name=red", "reward.terms.http.endpoints=[http://a:1,http://b:2/x/]"]
    reward = build(load_config("train", words).reward).terms["http"]
    assert isinstance(reward, HttpReward)
    assert list(reward.endpoints) == ["http://a:1", "http://b:2/x/"]
    assert reward.in_thread


def test_a_request_is_read_as_it_was_written() -> None:
    pixels_BHWC = to_pixels(some_images(3))
    prompts = ["a", 'quotes " and \u00fc', "\U0001f600"]
    read, texts = Limits().read_request(write_request([to_png(pixels_HWC) for pixels_HWC in pixels_BHWC], prompts))
    assert (read == pixels_BHWC).all()
    assert [prompt.text for prompt in texts] == prompts
    assert redness_of_png(base64.b64encode(to_png(pixels_BHWC[0])).decode()) == pytest.approx(
        pixels_BHWC[0, :, :, 0].mean() / 255
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_those_of_float32_arithmetic(dtype: torch.dtype) -> None:
    images_BCHW = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = np.rint(images_BCHW.double().numpy() * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    assert (to_pixels(images_BCHW) == expected).all()


def test_scores_are_read_as_they_are() -> None:
    assert read_scores({"scores": [1, None, -2.5], "more": 1}, 3) == [1.0, None, -2.5]


@pytest.mark.parametrize("name", Limits.__dataclass_fields__)
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"limits\.{name} must be positive, got 0"):
        Limits(**{name: 0})
