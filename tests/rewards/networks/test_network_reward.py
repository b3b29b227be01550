"""The five networks: texts are encoded once and alone, networks export with any batch, and half precision is close."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from fastgrpo.compile.networks import DriftError, Eager
from fastgrpo.rewards.aesthetic import aesthetic
from fastgrpo.rewards.clip_score import clip_score
from fastgrpo.rewards.hps import hps
from fastgrpo.rewards.image_reward import image_reward
from fastgrpo.rewards.networks.network_reward import NetworkReward
from fastgrpo.rewards.pick_score import pick_score
from fastgrpo.rewards.reward import RewardError
from fastgrpo.rewards.scoring import Scoring
from tests.rewards.fixtures.random_inputs import random_image
from tests.rewards.miniatures import save_aesthetic_head, save_clip, save_hps, save_image_reward, to_images

WORDS = ["of", "red", "square", "blue", "a", "circle"]
TEXTS = [" ".join(word for i, word in enumerate(WORDS) if n >> i & 1) for n in range(1, 41)]


def build_aesthetic(path: str) -> NetworkReward:
    return aesthetic(path=path, head=path, head_file="aesthetic-model.pth", backend=Eager())


REWARDS: dict[str, tuple[Callable[[Path], Path], Callable[[str], NetworkReward]]] = {
    "clip_score": (save_clip, lambda path: clip_score(path=path, backend=Eager())),
    "pick_score": (save_clip, lambda path: pick_score(path=path, processor=path, backend=Eager())),
    "aesthetic": (lambda path: save_aesthetic_head(save_clip(path)), build_aesthetic),
    "hps": (save_hps, lambda path: hps(path=path, file="HPS_v2.1_compressed.pt", tokenizer=path, backend=Eager())),
    "image_reward": (
        save_image_reward,
        lambda path: image_reward(path=path, file="ImageReward.pt", tokenizer=path, backend=Eager()),
    ),
}
WITH_TEXTS = [name for name in REWARDS if name != "aesthetic"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name)) for name, (save, _) in REWARDS.items()}


@pytest.fixture
def build(directories: dict[str, Path]) -> Callable[[str], NetworkReward]:
    return lambda name: REWARDS[name][1](str(directories[name]))


def images(num: int) -> torch.Tensor:
    return to_images(np.stack([random_image(40, 40 + i)[:, :40] for i in range(num)]))


def inputs_of(reward: NetworkReward, num: int) -> tuple[torch.Tensor, ...]:
    texts = reward.encode(TEXTS[:num], torch.device("cpu"))
    return (reward.preprocess(images(num)), *texts)


def export(reward: NetworkReward) -> torch.export.ExportedProgram:
    network, inputs = reward.network.copy_to("cpu", torch.float32), inputs_of(reward, 8)
    return torch.export.export(network, inputs, dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in inputs))


@pytest.mark.parametrize("name", REWARDS)
def test_an_export_scores_as_eager_does_for_any_batch(name: str, build: Callable[[str], NetworkReward]) -> None:
    reward = build(name)
    exported = export(reward).module()
    for num in (1, 2, 5, 8):
        inputs = inputs_of(reward, num)
        with torch.no_grad():
            expected_B = reward.network(*inputs)
        assert expected_B.shape == (num,)
        torch.testing.assert_close(exported(*inputs), expected_B, atol=1e-5, rtol=0)


# pick_score's network is clip_score's
@pytest.mark.parametrize("name", ["clip_score", "aesthetic", "hps", "image_reward"])
def test_an_onnx_export_scores_as_eager_does_for_any_batch(
    name: str, build: Callable[[str], NetworkReward], tmp_path: Path
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    reward = build(name)
    program = torch.onnx.export(export(reward), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for num in (1, 5, 8):
        inputs = inputs_of(reward, num)
        with torch.no_grad():
            expected_B = reward.network(*inputs)
        feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        np.testing.assert_allclose(session.run(None, feed)[0], expected_B.numpy(), atol=1e-4)


# of the spread between images: bfloat16 has 8 bits, and these miniatures are untrained
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.08), (torch.float16, 0.015)], ids=str)
@pytest.mark.parametrize("name", REWARDS)
def test_half_precision_stays_close(
    name: str, dtype: torch.dtype, tolerance: float, build: Callable[[str], NetworkReward]
) -> None:
    reward = build(name)
    pixels_BCHW, *texts = inputs_of(reward, 8)
    with torch.no_grad():
        expected_B = reward.network(pixels_BCHW, *texts)
        half_B = reward.network.copy_to("cpu", dtype)(pixels_BCHW.to(dtype), *texts)
    assert half_B.dtype == torch.float32
    torch.testing.assert_close(half_B, expected_B, atol=tolerance * expected_B.std().item(), rtol=0)
    assert not torch.equal(half_B, expected_B)


def test_a_network_that_its_backend_refuses_is_not_built_again(build: Callable[[str], NetworkReward]) -> None:
    attempts = []

    class Drifting(Eager):
        def __call__(self, network: Any, golden: tuple[torch.Tensor, ...]) -> Callable[..., torch.Tensor]:
            attempts.append(len(golden[0]))
            raise DriftError("the engine drifts by 12% of the spread")

    reward = build("aesthetic")
    object.__setattr__(reward, "backend", Drifting())
    with pytest.raises(RewardError, match="drifts by 12% of the spread"):
        Scoring(retries=3, retry_seconds=0)("aesthetic", reward, images(2), TEXTS[:2])
    assert attempts == [8]


@pytest.mark.parametrize("name", WITH_TEXTS)
def test_a_text_is_encoded_once(name: str, build: Callable[[str], NetworkReward], monkeypatch: Any) -> None:
    reward = build(name)
    seen: list[str] = []
    encode = reward.encode

    def counted(texts: list[str], device: torch.device) -> tuple[torch.Tensor, ...]:
        seen.extend(dict.fromkeys(texts))
        return encode(texts, device)

    object.__setattr__(reward, "encode", counted)
    reward(images(3), TEXTS[:3])
    golden = [text for text in seen if text not in TEXTS]
    first = reward(images(4), [TEXTS[2], TEXTS[2], TEXTS[3], TEXTS[0]])
    again = reward(images(4), [TEXTS[2], TEXTS[2], TEXTS[3], TEXTS[0]])
    assert sorted(text for text in seen if text not in golden) == sorted(TEXTS[:4])
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", WITH_TEXTS)
def test_a_score_does_not_depend_on_which_texts_are_new(name: str, build: Callable[[str], NetworkReward]) -> None:
    whole, resumed = build(name), build(name)
    texts = TEXTS[:16]
    whole(images(16), texts)
    # the same texts come in other groups and other places of their batch, as after a resume
    for part in ([15, 3], [7], [0, 8, 9, 10, 1], [2, 4, 5, 6, 11, 12, 13, 14]):
        resumed(images(len(part)), [texts[i] for i in part])
    assert torch.equal(whole(images(16), texts), resumed(images(16), texts))


@pytest.mark.parametrize("name", REWARDS)
def test_scores_tell_images_apart_and_texts_where_they_count(name: str, build: Callable[[str], NetworkReward]) -> None:
    reward = build(name)
    assert reward(images(6), TEXTS[:1] * 6).unique().numel() == 6
    distinct = reward(images(1).expand(4, -1, -1, -1), TEXTS[:4]).unique().numel()
    assert distinct == (1 if name == "aesthetic" else 4)


def test_networks_of_other_weights_or_scales_have_other_fingerprints(build: Callable[[str], NetworkReward]) -> None:
    assert build("hps").fingerprint == build("hps").fingerprint
    # clip_score and pick_score share a directory's weights and differ in their scale
    assert len({build(name).fingerprint for name in REWARDS}) == len(REWARDS)


@pytest.mark.parametrize("name", REWARDS)
def test_the_config_builds_the_reward_from_a_directory(
    name: str, build: Callable[[str], NetworkReward], directories: dict[str, Path]
) -> None:
    overrides = [f"reward={name}", f"reward.terms.{name}.path={directories[name]}"]
    if name == "aesthetic":
        overrides.append(f"reward.terms.aesthetic.head={directories[name]}")
    with initialize_config_module("fastgrpo_configs", version_base="1.3"):
        rewards = instantiate(compose("train", overrides=overrides).reward)
    named_PG = rewards(images(4), TEXTS[:2]).named[name]
    expected_B = build(name)(images(4), [TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[1]])
    torch.testing.assert_close(named_PG.flatten(), expected_B, atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", REWARDS)
def test_the_host_never_waits_for_the_gpu(name: str, build: Callable[[str], NetworkReward]) -> None:
    reward = build(name)
    images_BCHW = images(8).cuda()
    expected_B = reward(images_BCHW, TEXTS[:8])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores_B = reward(images_BCHW, TEXTS[:8])
        reward(images_BCHW, TEXTS[8:16])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(scores_B, expected_B)
    torch.testing.assert_close(scores_B.cpu(), build(name)(images(8), TEXTS[:8]), atol=1e-3, rtol=1e-3)
