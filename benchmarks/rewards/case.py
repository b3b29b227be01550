"""A case: one reward, a batch for it, and the ways to compute it.

A way is built when it is its turn: what is missing on a machine is a reason in the report, and the others go on.
Letters: B images, C H W.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ocr_pictures import samples, to_images
from benchmarks.rewards.networks import ARCHITECTURES, Architecture
from benchmarks.rewards.peers import PilScorer
from fastgrpo.compile.networks import Eager, Inductor
from fastgrpo.rewards.clip_score import clip_score
from fastgrpo.rewards.golden import golden_set
from fastgrpo.rewards.jpeg import JpegSize
from fastgrpo.rewards.networks.network_reward import Backend, RewardNetwork
from fastgrpo.rewards.networks.preprocess import Preprocess
from fastgrpo.rewards.ocr import Ocr
from fastgrpo.rewards.reward import Reward
from fastgrpo.rewards.shapes import ShapesReward
from fastgrpo.tensorrt.backend import TensorRT
from fastgrpo.tensorrt.torch_builder import TorchTensorRTBuilder

ONE_BY_ONE, PIL_BATCHED, AS_IS = "pil_one_by_one", "pil_batched", "as_it_is"
ENGINES = Path.home() / ".cache" / "fastgrpo" / "benchmark_engines"


def _tensorrt(batch: int) -> Backend:
    return TensorRT(builder=TorchTensorRTBuilder(), directory=str(ENGINES), opt_batch=batch, max_batch=batch)


# by the size of the batch
BACKENDS: dict[str, Callable[[int], Backend]] = {
    "eager_float32": lambda batch: Eager(precision="float32"),
    "eager_bfloat16": lambda batch: Eager(precision="bfloat16"),
    "eager_float16": lambda batch: Eager(precision="float16"),
    "inductor_float32": lambda batch: Inductor(precision="float32"),
    "inductor_bfloat16": lambda batch: Inductor(precision="bfloat16"),
    "inductor_float16": lambda batch: Inductor(precision="float16"),
    "tensorrt_float16": _tensorrt,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Images [B, C, H, W] in [0, 1] on their device, a prompt each, and what makes a reward of each variant."""

    reward: str
    # what computes it, with its millions of weights
    model: str
    images_BCHW: Tensor
    prompts: list[str]
    variants: dict[str, Callable[[], Reward]]
    # what the others are compared with and divided by
    baseline: str

    @property
    def batch(self) -> int:
        return len(self.prompts)


def _plain(reward: str, model: str, build: Callable[[], Reward], pictures: tuple[Tensor, list[str]]) -> Case:
    return Case(
        reward=reward,
        model=model,
        images_BCHW=pictures[0],
        prompts=pictures[1],
        variants={AS_IS: build},
        baseline=AS_IS,
    )


def _embedded_clip(backends: Sequence[str], pictures: tuple[Tensor, list[str]]) -> Case:
    images_BCHW, prompts = pictures
    ours = clip_score(path="shapes", backend=Eager())
    assert isinstance(ours.preprocess, Preprocess)
    pil = partial(
        PilScorer,
        network=ours.network.copy_to(images_BCHW.device, torch.float32),
        size=ours.preprocess.short_side,
        encode=ours.encode,
    )
    batch = len(prompts)
    built: dict[str, Callable[[], Reward]] = {name: partial(_embedded_reward, name, batch) for name in backends}
    return Case(
        reward="clip_score_shapes",
        model="the embedded scorer",
        images_BCHW=images_BCHW,
        prompts=prompts,
        variants={ONE_BY_ONE: partial(pil, num_images=1), PIL_BATCHED: pil, **built},
        baseline=ONE_BY_ONE,
    )


def _embedded_reward(backend: str, batch: int) -> Reward:
    return clip_score(path="shapes", backend=BACKENDS[backend](batch))


def _network(
    reward: str,
    architecture: Architecture,
    backends: Sequence[str],
    pictures: tuple[Tensor, list[str]],
    miniature: bool,
) -> Case:
    images_BCHW, prompts = pictures
    network = architecture.network(miniature)
    num_weights = sum(weight.numel() for weight in network.parameters())
    pil = partial(
        PilScorer,
        network=network.copy_to(images_BCHW.device, torch.float32),
        size=architecture.size(miniature),
        encode=architecture.encode[miniature],
    )
    batch = len(prompts)
    built: dict[str, Callable[[], Reward]] = {
        name: partial(_network_reward, architecture, network, name, batch, miniature) for name in backends
    }
    return Case(
        reward=reward,
        model=f"{architecture.name}{' in miniature' * miniature}, {num_weights / 1e6:.3g} M",
        images_BCHW=images_BCHW,
        prompts=prompts,
        variants={ONE_BY_ONE: partial(pil, num_images=1), PIL_BATCHED: pil, **built},
        baseline=ONE_BY_ONE,
    )


def _network_reward(
    architecture: Architecture, network: RewardNetwork, backend: str, batch: int, miniature: bool
) -> Reward:
    return architecture.reward(network, BACKENDS[backend](batch), miniature)


@cache
def written_pictures(batch: int) -> tuple[Tensor, list[str]]:
    """Pictures of words, 512 x 512, and prompts that quote them."""
    drawn = [samples(seed)[0] for seed in range(batch)]
    return to_images([sample.picture for sample in drawn]), [sample.prompt for sample in drawn]


def scenes(batch: int) -> tuple[Tensor, list[str]]:
    """The golden scenes, again and again."""
    golden = golden_set()
    rows = [row % len(golden.prompts) for row in range(batch)]
    return golden.images_BCHW[rows], [golden.prompts[row] for row in rows]


REWARDS = ("shapes", "jpeg", "ocr", "clip_score_shapes", *ARCHITECTURES)


def make_case(reward: str, backends: Sequence[str], batch: int, device: torch.device, miniature: bool) -> Case:
    """The case of that reward, its images on ``device``."""
    images_BCHW, prompts = scenes(batch) if "shapes" in reward else written_pictures(batch)
    pictures = images_BCHW.to(device), prompts
    if reward == "shapes":
        return _plain(reward, "the verifier", ShapesReward, pictures)
    if reward == "jpeg":
        return _plain(reward, "Pillow", JpegSize, pictures)
    if reward == "ocr":
        return _plain(reward, "rapidocr, one core", partial(Ocr, threads=1), pictures)
    if reward == "clip_score_shapes":
        return _embedded_clip(backends, pictures)
    return _network(reward, ARCHITECTURES[reward], backends, pictures, miniature)
