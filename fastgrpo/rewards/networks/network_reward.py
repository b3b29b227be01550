"""A reward that is a network: all images of a micro-batch at once, on the device that they are on.

    score_B = network(preprocess(images_BCHW), *rows of the texts)

The network is what a backend compiles (eager, torch.compile, TensorRT); texts are encoded once a prompt and kept on the
device.  Nothing here waits for the GPU.  Letters: B images, U different texts, C H W of an image.
"""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from fastgrpo.rewards.golden import golden_set
from fastgrpo.rewards.networks.preprocess import PadToSquare, Preprocess
from fastgrpo.rewards.reward import RewardError

# texts go through their encoder in batches of one shape, so that a row does not depend on which others are new
_TEXTS_AT_ONCE = 8
_CACHED_TEXTS = 16_384


class RewardNetwork(nn.Module):
    """(pixels [B, C, H, W] of the trunk's dtype, rows [B, ...] of the texts) -> float32 scores [B].

    ``trunk`` holds nearly all of the work and is cast to the backend's dtype; the rest, which makes scores of its
    output, stays float32.  forward must pass ``torch.export`` with a dynamic batch.
    """

    trunk: nn.Module

    def copy_to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """A copy on ``device`` whose trunk computes in ``dtype``."""
        network = copy.deepcopy(self).to(device)
        network.trunk.to(dtype)
        return network.eval().requires_grad_(False)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the network's class, and of the names, types, shapes and bytes of its weights."""
        digest = hashlib.sha256(type(self).__qualname__.encode())
        for name, weight in sorted(self.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


class Backend(Protocol):
    """What runs a network: the pieces of ``fastgrpo.compile.networks`` and ``fastgrpo.tensorrt.backend``."""

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """What the trunk computes in there, and the dtype that it wants its pixels in."""
        ...

    def __call__(self, network: RewardNetwork, golden: tuple[Tensor, ...], /) -> Callable[..., Tensor]:
        """A function of the same inputs that scores as ``network`` does, for any batch size.

        ``network`` is float32 on the CPU and is left as it is.  ``golden`` are inputs of 8 images, float32 pixels and
        rows of texts, on the device that the function will run on: examples to compile with and to be verified by.
        """
        ...


class TextEncoder(Protocol):
    """Texts -> one row a text of each thing that the network wants to know about it, on ``device``."""

    def __call__(self, texts: list[str], device: torch.device, /) -> tuple[Tensor, ...]: ...


def no_texts(texts: list[str], device: torch.device) -> tuple[Tensor, ...]:
    """The encoder of a network that looks at images alone."""
    return ()


@dataclass(frozen=True, kw_only=True)
class NetworkReward:
    """Scores [B] of images in [0, 1]; the first call on a device compiles for it, or raises RewardError."""

    network: RewardNetwork
    preprocess: Preprocess | PadToSquare
    backend: Backend
    encode: TextEncoder = no_texts
    # of a network that knows certain prompts only
    check_prompt: Callable[[str], None] | None = None
    _compiled: dict[torch.device, Callable[..., Tensor]] = field(default_factory=dict, init=False, repr=False)
    _rows: OrderedDict[tuple[str, torch.device], tuple[Tensor, ...]] = field(
        default_factory=OrderedDict, init=False, repr=False
    )

    @property
    def fingerprint(self) -> str:
        """What identifies the weights."""
        return self.network.fingerprint

    @property
    def golden_tolerance(self) -> float:
        """How far golden scores may lie from recorded ones: half precision on another GPU is another number.

        Of the devices that it has scored on.
        """
        is_exact = all(self.backend.dtype_on(device) == torch.float32 for device in self._compiled)
        return 1e-3 if is_exact else 0.05

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        device = images_BCHW.device
        if device not in self._compiled:
            self._compiled[device] = self._compile(device)
        pixels_BCHW = self.preprocess(images_BCHW, self.backend.dtype_on(device))
        return self._compiled[device](pixels_BCHW, *self._text_rows(prompts, device))

    def _compile(self, device: torch.device) -> Callable[..., Tensor]:
        golden = golden_set()
        pixels_BCHW = self.preprocess(golden.images_BCHW.to(device))
        try:
            return self.backend(self.network, (pixels_BCHW, *self._text_rows(golden.prompts, device)))
        except ValueError as error:
            # final: building once more would take minutes and end alike
            raise RewardError(str(error)) from error

    def _text_rows(self, prompts: list[str], device: torch.device) -> tuple[Tensor, ...]:
        """Rows [B, ...] of the prompts' texts; those seen before come from the cache."""
        new = [text for text in dict.fromkeys(prompts) if (text, device) not in self._rows]
        for first in range(0, len(new), _TEXTS_AT_ONCE):
            texts = new[first : first + _TEXTS_AT_ONCE]
            padded = texts + texts[:1] * (_TEXTS_AT_ONCE - len(texts))
            encoded = self.encode(padded, device)
            for row, text in enumerate(texts):
                self._rows[text, device] = tuple(part[row].clone() for part in encoded)
        rows = [self._rows[text, device] for text in prompts]
        while len(self._rows) > _CACHED_TEXTS:
            self._rows.popitem(last=False)
        return tuple(torch.stack(part) for part in zip(*rows, strict=True))
