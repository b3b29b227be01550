"""The transformer and its text encoders: flow matching on normalized latents.

Letters: N scenes of the data set, B batch, L tokens, C H W of a latent.
"""

import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from fastgrpo.shapes.captions import misread, training_captions
from fastgrpo.shapes.pretrain.autoencoder import LATENT_CHANNELS, encode
from fastgrpo.shapes.pretrain.recipe import Recipe
from fastgrpo.shapes.pretrain.tokenizer import TEXT_WIDTH, text_config, tokens
from fastgrpo.shapes.pretrain.training import train
from fastgrpo.shapes.world import IMAGE_SIZE, draw, sample_scene

WIDTH = 128
SHIFT = 3.0


def train_transformer(
    recipe: Recipe, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> tuple[SD3Transformer2DModel, list[CLIPTextModelWithProjection]]:
    """Flow matching on normalized latents, x_t = (1 - t) x_0 + t noise; the EMA weights come back."""
    torch.manual_seed(recipe.seed + 1)
    generator = np.random.default_rng(recipe.seed + 1)
    encoders = [CLIPTextModelWithProjection(text_config(tokenizer)) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        # the width must stay well above the patch dimension, 2 * 2 * 8: a narrow model has no room beside the noise
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        caption_projection_dim=WIDTH,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=IMAGE_SIZE // 16,
        dual_attention_layers=(),
        qk_norm="rms_norm",
    )
    modules = nn.ModuleList([transformer, *encoders])
    for cycle, steps in enumerate(recipe.transformer_cycles):
        if cycle > 0:
            # a warm restart: new scenes, a new optimizer, a new warm-up
            torch.manual_seed(recipe.seed + 1 + 10 * cycle)
            generator = np.random.default_rng(recipe.seed + 1 + 10 * cycle)
        captioned = _captioned_latents(recipe, vae, tokenizer, generator)
        _train_flow(modules, captioned, tokenizer, generator, steps)
    modules.eval()
    return transformer, encoders


def _captioned_latents(
    recipe: Recipe, vae: AutoencoderKL, tokenizer: CLIPTokenizer, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Normalized latents [N, C, H, W] of random scenes and their captions' tokens [N, L], some of them wrong."""
    captions = training_captions()
    drawn = [captions[i] for i in generator.integers(len(captions), size=recipe.num_scenes)]
    latents_NCHW = torch.cat(
        [
            encode(vae, draw([sample_scene(caption, generator) for caption in drawn[i : i + 250]]))
            for i in range(0, len(drawn), 250)
        ]
    )
    latents_NCHW = (latents_NCHW - vae.config.shift_factor) * vae.config.scaling_factor
    known = {str(caption) for caption in captions}
    texts = [str(caption) for caption in drawn]
    # a wrong caption is wrong for good, as in a data set
    for i in np.flatnonzero(generator.random(len(drawn)) < recipe.wrong_captions):
        while (wrong := str(misread(drawn[i], generator))) not in known:
            pass
        texts[i] = wrong
    return latents_NCHW, tokens(tokenizer, texts)


def _train_flow(
    modules: nn.ModuleList,
    captioned: tuple[Tensor, Tensor],
    tokenizer: CLIPTokenizer,
    generator: np.random.Generator,
    steps: int,
) -> None:
    """One cosine cycle of flow matching; leaves the moving average in ``modules``."""
    transformer, *encoders = modules
    latents_NCHW, tokens_NL = captioned
    empty_L = tokens(tokenizer, [""])[0]

    def loss(_: int) -> Tensor:
        index_B = torch.from_numpy(generator.integers(len(tokens_NL), size=128))
        # 10% are dropped anew each time, for guidance
        tokens_BL = torch.where(torch.rand(128, 1) < 0.1, empty_L, tokens_NL[index_B])
        image_BCHW = latents_NCHW[index_B]
        noise_BCHW = torch.randn_like(image_BCHW)
        # logit-normal under the shift that the sampler has: half its steps lie above t = .79
        t_B = torch.sigmoid(torch.randn(128) + math.log(SHIFT))
        t_B111 = t_B[:, None, None, None]
        outputs = [encoder(tokens_BL, output_hidden_states=True) for encoder in encoders]
        velocity_BCHW = transformer(
            hidden_states=(1 - t_B111) * image_BCHW + t_B111 * noise_BCHW,
            timestep=1000 * t_B,
            encoder_hidden_states=torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
            pooled_projections=torch.cat([output.text_embeds for output in outputs], dim=-1),
        ).sample
        return (velocity_BCHW - (noise_BCHW - image_BCHW)).square().mean()

    averaged = deepcopy(modules).requires_grad_(False)

    def average(step: int) -> None:
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averaged.parameters()), [p.detach() for p in modules.parameters()], 1 - decay)

    train("transformer", modules.parameters(), loss, steps=steps, lr=1e-3, after=average)
    modules.load_state_dict(averaged.state_dict())


def save_pipeline(
    out: Path,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    transformer: SD3Transformer2DModel,
    encoder: CLIPTextModelWithProjection,
    encoder_2: CLIPTextModelWithProjection,
) -> None:
    """Write a StableDiffusion3Pipeline directory in half precision."""
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).to(torch.float16).save_pretrained(out)
