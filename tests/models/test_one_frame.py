"""A decoder of videos that is made one of images decodes as it did, and leaves the autoencoder as it was."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

from fastgrpo.models.one_frame import OneFrame
from fastgrpo.models.qwen_image import QwenImage
from fastgrpo.models.random_weights import random_module
from tests.tiny_qwen_image import make_autoencoder


def make(dtype: torch.dtype) -> AutoencoderKLQwenImage:
    vae = random_module(make_autoencoder, device="cpu", dtype=dtype, seed=0).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    # random weights have biases of zero
    for name, weight in vae.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=0.1, generator=generator)
    found: AutoencoderKLQwenImage = vae
    return found


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str)
def test_an_image_is_the_first_frame_of_its_video(dtype: torch.dtype, tolerance: float) -> None:
    vae = make(dtype)
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    z = torch.randn(2, 16, 6, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    expected = vae.decode(z[:, :, None], return_dict=False)[0][:, :, 0]
    found = QwenImage.decoded(OneFrame(vae), z)
    assert found.shape == (2, 3, 48, 32)
    assert expected.std() > 0.1
    # diffusers clamps what it decodes
    torch.testing.assert_close(found.clamp(-1, 1), expected, atol=tolerance, rtol=0)
    assert all(torch.equal(weight, before[name]) for name, weight in vae.state_dict().items())


def test_no_convolution_over_time_is_left_and_other_weights_are_shared() -> None:
    vae = make(torch.float32)
    images = OneFrame(vae)
    assert not any(isinstance(module, QwenImageCausalConv3d) for module in images.modules())
    assert any(isinstance(module, QwenImageCausalConv3d) for module in vae.decoder.modules())
    own = {weight.data_ptr() for weight in vae.parameters()}
    copied = {name for name, weight in images.named_parameters() if weight.data_ptr() not in own}
    # a convolution of one time is one of images as it is
    over_time = {name for name, weight in vae.decoder.named_parameters() if weight.ndim == 5 and weight.shape[2] == 3}
    assert copied == {f"decoder.{name}" for name in over_time}
