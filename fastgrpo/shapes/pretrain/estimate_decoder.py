"""The decoder of estimates: what AutoencoderKL decodes, by a few thousand weights, for images that only a reward sees.

It learns from two kinds of latents: those of drawn scenes, and those that a few steps of the pipeline lead to, which is
what a search asks for.  Their images are those of the pipeline's own decoder.
Letters: N latents of the data set, B batch, C H W of a latent.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from torch import Tensor

from fastgrpo.shapes.captions import training_captions
from fastgrpo.shapes.pretrain.autoencoder import LATENT_CHANNELS, encode
from fastgrpo.shapes.pretrain.recipe import Recipe
from fastgrpo.shapes.pretrain.training import random_scenes, train
from fastgrpo.shapes.pretrain.transformer import SHIFT
from fastgrpo.shapes.world import draw

WIDTH = 8
# of each resolution, 8x8 to 64x64: without one at the last, edges are as coarse as a pixel of 32x32
NUM_BLOCKS = (1, 1, 1, 1)
# of an estimate
_STEPS = (1, 2, 3, 4, 6)
_CHUNK = 256


def train_estimate_decoder(recipe: Recipe, directory: Path) -> AutoencoderTiny:
    """AutoencoderTiny [B, 8, 8, 8] -> [B, 3, 64, 64] of the latents that the transformer knows; only it decodes.

    ``directory`` is that of the pipeline as it is saved, so that the shipped one gives the shipped decoder.
    """
    torch.manual_seed(recipe.seed + 3)
    generator = np.random.default_rng(recipe.seed + 3)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        directory, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    latents_NCHW = torch.cat(
        [
            one
            for _ in range(0, recipe.num_decoded, 2 * _CHUNK)
            for one in (_of_scenes(pipeline, generator), _of_estimates(pipeline, generator))
        ]
    )
    images_NCHW = torch.cat([_decoded(pipeline, part) for part in latents_NCHW.split(_CHUNK)])
    model = AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        # nobody encodes by it: as small as its class can be
        encoder_block_out_channels=(1,) * len(NUM_BLOCKS),
        num_encoder_blocks=(0,) * len(NUM_BLOCKS),
        decoder_block_out_channels=(WIDTH,) * len(NUM_BLOCKS),
        num_decoder_blocks=NUM_BLOCKS,
    ).to(memory_format=torch.channels_last)

    def loss(_: int) -> Tensor:
        index_B = torch.from_numpy(generator.integers(len(latents_NCHW), size=64))
        images_BCHW = images_NCHW[index_B]
        latents_BCHW = latents_NCHW[index_B].contiguous(memory_format=torch.channels_last)
        # the autoencoder's own weights of bright pixels
        return ((model.decode(latents_BCHW).sample - images_BCHW).abs() * (2 + images_BCHW)).mean()

    train("estimate decoder", model.decoder.parameters(), loss, steps=recipe.estimate_decoder_steps, lr=5e-3)
    return model.eval()


def save_estimate_decoder(out: Path, model: AutoencoderTiny) -> None:
    """Write the directory as diffusers reads it, in half precision."""
    model.to(memory_format=torch.contiguous_format).half().save_pretrained(out)


def _of_scenes(pipeline: StableDiffusion3Pipeline, generator: np.random.Generator) -> Tensor:
    config = pipeline.vae.config
    latents_BCHW = encode(pipeline.vae, draw(random_scenes(training_captions(), generator, _CHUNK)))
    return (latents_BCHW - config.shift_factor) * config.scaling_factor


@torch.no_grad()
def _of_estimates(pipeline: StableDiffusion3Pipeline, generator: np.random.Generator) -> Tensor:
    """After a few steps of Euler's from noise, on evenly spaced times under the shift."""
    captions = training_captions()
    texts = [str(captions[i]) for i in generator.integers(len(captions), size=_CHUNK)]
    embeds_BLC, _, pooled_BC, _ = pipeline.encode_prompt(
        prompt=texts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    x_BCHW = torch.randn(_CHUNK, LATENT_CHANNELS, 8, 8)
    even = torch.linspace(1, 0, int(generator.choice(_STEPS)) + 1)
    grid = SHIFT * even / (1 + (SHIFT - 1) * even)
    for t, t_next in pairwise(grid):
        v_BCHW = pipeline.transformer(
            hidden_states=x_BCHW,
            timestep=1000 * t.expand(_CHUNK),
            encoder_hidden_states=embeds_BLC,
            pooled_projections=pooled_BC,
        ).sample
        x_BCHW = x_BCHW + (t_next - t) * v_BCHW
    return x_BCHW


@torch.no_grad()
def _decoded(pipeline: StableDiffusion3Pipeline, x_BCHW: Tensor) -> Tensor:
    """Images in [-1, 1] by the pipeline's own decoder."""
    config = pipeline.vae.config
    return pipeline.vae.decode(x_BCHW / config.scaling_factor + config.shift_factor).sample.clamp(-1, 1)
