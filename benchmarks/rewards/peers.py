"""Rewards as flow_grpo's scorers compute them (its pickscore_scorer.py, imagereward_scorer.py): through Pillow.

Each image goes to the CPU as bytes and through transformers' processor for Pillow images; the network runs in float32,
on all images at once (PickScore there) or one by one (ImageReward there).  Their texts are encoded at every call, which
is left out here, in their favor.  Letters: B images, C H W.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastgrpo.rewards.networks.network_reward import RewardNetwork, TextEncoder


@dataclass(frozen=True, kw_only=True)
class PilScorer:
    """Scores [B] of images in [0, 1], of which the network sees ``size`` x ``size`` pixels.

    ``num_images`` at a time, or all at once if that is 0.
    """

    network: RewardNetwork
    size: int
    encode: TextEncoder
    num_images: int = 0

    @cached_property
    def processor(self) -> CLIPImageProcessorPil:
        # its mean and std are CLIP's unless told
        return CLIPImageProcessorPil(
            size={"shortest_edge": self.size}, crop_size={"height": self.size, "width": self.size}
        )

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, prompts: list[str]) -> Tensor:
        pixels_BHWC = (images_BCHW * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        pictures = [Image.fromarray(pixels_HWC) for pixels_HWC in pixels_BHWC]
        rows, device, step = (
            self.encode(prompts, images_BCHW.device),
            images_BCHW.device,
            self.num_images or len(prompts),
        )
        scores = []
        for first in range(0, len(prompts), step):
            part = slice(first, first + step)
            pixels_BCHW = self.processor(images=pictures[part], return_tensors="pt").pixel_values.to(device)
            # each answer is read before the next image is looked at
            scores.append(self.network(pixels_BCHW, *(row[part] for row in rows)).cpu())
        return torch.cat(scores)
