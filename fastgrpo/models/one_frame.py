"""The decoder of an autoencoder of videos, for images: of a causal convolution over one frame, one time is left.

    sum over k of W[..., k] * frame[t + k - K + 1]      at t = 0, where frames before the first are zeros: W[..., K - 1]

So each is a convolution of the image, by a third of the products and by the kernels that are made for images.
"""

import copy
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn
from torch.nn import functional as F


class OneFrame(nn.Module):
    """``post_quant_conv`` and ``decoder`` of an AutoencoderKLQwenImage, which stays as it is and shares all else."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = _of_images(vae.post_quant_conv)
        self.decoder = _of_images(vae.decoder)
        self.dtype: torch.dtype = vae.dtype


class _Convolution(nn.Module):
    """[B, C, 1, H, W] -> [B, C, 1, H, W]."""

    def __init__(self, causal: QwenImageCausalConv3d) -> None:
        super().__init__()
        last = causal.weight.detach()[:, :, -1].contiguous()
        self.weight, self.bias = nn.Parameter(last, requires_grad=False), causal.bias
        # of width, height and time, before and behind each
        across, _, down, *_ = causal._padding
        self._padding = down, across

    def forward(self, x_BC1HW: Tensor, cache: None = None) -> Tensor:
        return F.conv2d(x_BC1HW.squeeze(2), self.weight, self.bias, padding=self._padding).unsqueeze(2)


def _of_images(module: nn.Module) -> nn.Module:
    if isinstance(module, QwenImageCausalConv3d):
        return _Convolution(module)
    # the same weights: a copy is made of what holds them
    copied = copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if isinstance(child, QwenImageCausalConv3d):
                setattr(parent, name, _Convolution(child))
    return copied
