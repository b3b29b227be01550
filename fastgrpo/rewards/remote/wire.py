"""The protocol of remote rewards: JSON with PNGs, over HTTP.  Whoever keeps to this page can serve one.

    POST /v1/rewards/{name}/score
    Content-Type: application/json
    Authorization: Bearer TOKEN                 only if the server wants one

    {"images": ["iVBORw0KGgo...", ...], "prompts": ["a red circle", ...], "metadata": [{"tag": "colors"}, ...]}

    200 {"scores": [0.25, null, ...]}

Request: UTF-8 JSON.  ``images`` are PNGs of 8-bit RGB (color type 2) in base64 (RFC 4648, section 4, no line breaks),
all of one size; ``prompts`` are as many strings.  A pixel is round(255 * value) of an image in [0, 1], half to even, so
a score is that of an image which differs by up to 1/510 from the one that was generated.

``metadata`` is there only where one of the prompts has any: as many objects, each of what the row of its prompt says in
its file beside the text, {} for nothing.  GenEval's evaluator takes a row of its own file again as ``{**metadata[i],
"prompt": prompts[i]}``.  A server that needs none need not know of it, nor keep to a list of keys.

Answer: as many ``scores`` as images, in their order; more is better.  Each is a finite number, or null: this image
could not be scored now.  Images with null are asked about again, alone.  Nothing else may stand for a failure, 0 least
of all.  UTF-8 JSON without compression; a client takes 1 MiB unless told otherwise.

Any other status is a failure, and its body, best {"detail": "why"}, is for people.  408, 425, 429 and 5xx are asked
again, not before Retry-After (seconds or a date) if there is one; so are connections that break, and answers that break
this page.  Everything else ends the run: 401 and 403 (token), 404 (no such name), 413 (too many images, pixels or
bytes), 422 (not a request as above).  Redirects are not followed, so that a token stays where it was sent.

    GET /health
    200 {"status": "ok", "rewards": ["shapes"], "max_images": 64, "max_pixels": 4194304}

needs no token, and lists the names and how many images, of how many pixels each, a request may have.  A client asks it
before a run: any answer but 502, 503 and 504 says that somebody is there.

The same request may come twice, since the client may not have seen the answer.  Nothing is ever unpickled.
Letters: B images, C H W of an image.
"""

import base64
import json
import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fastgrpo.rewards.pixels import to_bytes
from fastgrpo.rewards.reward import RewardError
from fastgrpo.types import Prompt, as_prompts

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def to_pixels(images_BCHW: Tensor) -> np.ndarray:
    """Bytes [B, H, W, 3] on the CPU of images in [0, 1]; RewardError if one is not finite, which no byte shows."""
    finite = images_BCHW.isfinite().flatten(1).all(dim=1).tolist()
    if not all(finite):
        raise RewardError(
            f"{finite.count(False)} of {len(finite)} images have pixels that are not finite, the first is image "
            f"{finite.index(False)}; the policy is broken: lower train.learning_rate"
        )
    return to_bytes(images_BCHW)


def to_png(pixels_HWC: np.ndarray) -> bytes:
    """A PNG of 8-bit RGB."""
    file = BytesIO()
    # compressing harder takes longer than sending what it would save
    Image.fromarray(pixels_HWC).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def write_request(pngs: Sequence[bytes], prompts: Sequence[Prompt | str]) -> bytes:
    """The body of a POST."""
    asked = as_prompts(prompts)
    request: dict[str, Any] = {
        "images": [base64.b64encode(png).decode("ascii") for png in pngs],
        "prompts": [prompt.text for prompt in asked],
    }
    if any(prompt.metadata for prompt in asked):
        request["metadata"] = [prompt.metadata for prompt in asked]
    return json.dumps(request).encode()


def read_scores(answer: Any, num_images: int) -> list[float | None]:
    """The scores in a parsed answer; ValueError if it is not one to that many images."""
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise ValueError('an answer is {"scores": [...]}, and this is not')
    if len(scores) != num_images:
        raise ValueError(f"{len(scores)} scores for {num_images} images")
    return [None if score is None else _read_score(score) for score in scores]


def _read_score(score: Any) -> float:
    # True is an int to Python, and 1e999 a float to JSON; integers of any length overflow in isfinite
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"a score is a {type(score).__name__}, not a number")
    if not abs(score) <= _FLOAT32_MAX or not math.isfinite(score):
        raise ValueError("a score is not finite in float32")
    return float(score)
