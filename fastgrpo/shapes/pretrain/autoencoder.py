"""The autoencoder: [B, 3, 64, 64] <-> [B, 8, 8, 8].  Letters: B batch, C channels, H W height and width."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fastgrpo.shapes.captions import training_captions
from fastgrpo.shapes.pretrain.recipe import Recipe
from fastgrpo.shapes.pretrain.training import random_scenes, train
from fastgrpo.shapes.world import IMAGE_SIZE, draw

LATENT_CHANNELS = 8


def train_autoencoder(recipe: Recipe) -> AutoencoderKL:
    """AutoencoderKL [B, 3, 64, 64] <-> [B, 8, 8, 8]; its scaling and shift bring the latents to mean 0, std 1."""
    torch.manual_seed(recipe.seed)
    generator = np.random.default_rng(recipe.seed)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    captions = training_captions()

    def loss(_: int) -> Tensor:
        # two scenes in one image, and twice the weight on bright pixels: most of a scene is background
        pairs = zip(random_scenes(captions, generator, 32), random_scenes(captions, generator, 32), strict=True)
        images_BCHW = 2 * draw([one + other for one, other in pairs]) - 1
        posterior = model.encode(images_BCHW).latent_dist
        difference_BCHW = (model.decode(posterior.sample()).sample - images_BCHW).abs()
        error = (difference_BCHW * (2 + images_BCHW)).mean()
        return error + 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    train("autoencoder", model.parameters(), loss, steps=recipe.autoencoder_steps, lr=3e-3)
    latents_BCHW = encode(model.eval(), draw(random_scenes(captions, generator, 512)))
    model.register_to_config(shift_factor=latents_BCHW.mean().item(), scaling_factor=1 / latents_BCHW.std().item())
    return model


@torch.no_grad()
def encode(vae: AutoencoderKL, images_BCHW: Tensor) -> Tensor:
    """Latents [B, 8, 8, 8], not yet normalized, of images in [0, 1]."""
    return vae.encode(2 * images_BCHW - 1).latent_dist.mean
