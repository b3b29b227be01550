"""What a reward server takes from a stranger: bytes -> images and prompts, checked before they are unpacked.

Letters: B images, H W of an image.
"""

import base64
import binascii
import json
import struct
from dataclasses import dataclass
from io import BytesIO
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from fastgrpo.types import Prompt, prompts_of

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">8sI4sIIBB")
_RGB = 2


class TooLarge(ValueError):
    """More than the limits allow; the message says of what."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``max_bytes`` of a body, ``max_images`` in it, ``max_pixels`` of each, ``max_prompt`` characters of a prompt.

    ``max_requests`` are taken in at a time, and ``body_seconds`` is the time that one has to arrive.
    """

    max_bytes: int = 1 << 26
    max_images: int = 64
    max_pixels: int = 1 << 22
    max_prompt: int = 4096
    max_requests: int = 16
    body_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"limits.{name} must be positive, got {value}")

    def read_request(self, body: bytes) -> tuple[np.ndarray, list[Prompt]]:
        """Pixels [B, H, W, 3] in bytes, and prompts.  TooLarge, or ValueError for what is not a request."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ValueError("the body is not JSON") from error
        images, prompts = (request.get(key) if isinstance(request, dict) else None for key in ("images", "prompts"))
        if not _are_strings(images) or not _are_strings(prompts):
            raise ValueError('the body must be {"images": [base64, ...], "prompts": [text, ...]}')
        if len(images) != len(prompts) or not images:
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts; send as many, and at least one")
        if len(images) > self.max_images:
            raise TooLarge(f"{len(images)} images are more than max_images={self.max_images}")
        metadata = request.get("metadata", [{}] * len(prompts))
        if not _are_objects(metadata) or len(metadata) != len(prompts):
            raise ValueError(f"metadata, if there is any, must be {len(prompts)} objects, one a prompt")
        if max(map(len, prompts)) > self.max_prompt:
            raise TooLarge(f"a prompt is longer than max_prompt={self.max_prompt} characters")
        pngs = [_decoded(row, image) for row, image in enumerate(images)]
        # all headers before the first image is unpacked
        sizes = {self._read_size(row, png) for row, png in enumerate(pngs)}
        if len(sizes) > 1:
            raise ValueError(f"images of one request must be of one size, got {sorted(sizes)}")
        return np.stack([_unpacked(row, png) for row, png in enumerate(pngs)]), prompts_of(prompts, metadata)

    def _read_size(self, row: int, png: bytes) -> tuple[int, int]:
        if len(png) < _HEADER.size or not png.startswith(_SIGNATURE):
            raise ValueError(f"image {row} is not a PNG")
        _, _, chunk, width, height, depth, color = _HEADER.unpack_from(png)
        if chunk != b"IHDR" or (depth, color) != (8, _RGB):
            raise ValueError(f"image {row} is not a PNG of 8-bit RGB")
        if width * height > self.max_pixels:
            raise TooLarge(f"image {row} claims {width} x {height} pixels, more than max_pixels={self.max_pixels}")
        return width, height


def _are_strings(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _are_objects(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _decoded(row: int, image: str) -> bytes:
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image {row} is not base64") from error


def _unpacked(row: int, png: bytes) -> np.ndarray:
    try:
        # pillow's own limits on pixels and text chunks stay in force
        with Image.open(BytesIO(png), formats=["PNG"]) as image:
            return np.array(image)
    except Exception as error:
        # whatever pillow raises on a broken file, the request is at fault
        raise ValueError(f"image {row} is a broken PNG ({type(error).__name__})") from error
