"""Reward networks of full size and random weights, by dotted path: ``reward=custom reward.path=...PickScoreEager``."""

from typing import ClassVar

from torch import Tensor

from benchmarks.rewards.case import BACKENDS
from benchmarks.rewards.networks import ARCHITECTURES

_BATCH = 8


class _Random:
    """The network of ``architecture`` run by ``backend``; its scores mean nothing."""

    architecture: ClassVar[str]
    backend: ClassVar[str]
    # nothing is on record for random weights
    golden_set = "none"

    def __init__(self) -> None:
        architecture = ARCHITECTURES[self.architecture]
        network = architecture.network(miniature=False)
        self._reward = architecture.reward(network, BACKENDS[self.backend](_BATCH), miniature=False)

    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        return self._reward(images_BCHW, prompts)


class PickScoreEager(_Random):
    architecture, backend = "pick_score", "eager_float32"


class PickScoreInductor(_Random):
    architecture, backend = "pick_score", "inductor_float16"


class PickScoreTensorRT(_Random):
    architecture, backend = "pick_score", "tensorrt_float16"


class HpsInductor(_Random):
    architecture, backend = "hps", "inductor_float16"


class AestheticInductor(_Random):
    architecture, backend = "aesthetic", "inductor_float16"


class ImageRewardInductor(_Random):
    architecture, backend = "image_reward", "inductor_float16"
