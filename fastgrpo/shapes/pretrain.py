"""The recipe of the embedded model: ``python -m fastgrpo.shapes.pretrain --out DIR``.

Four stages, each a function of the seed alone, write a ``StableDiffusion3Pipeline`` directory and a CLIP scorer:

    tokenizer      a byte-pair vocabulary in which every word of the world is one token
    autoencoder    AutoencoderKL, 64x64x3 -> 8x8x8, absolute error + a small KL
    transformer    SD3Transformer2DModel and its two CLIP text encoders, flow matching on the latents
    scorer         CLIPModel, contrastive, on the same scenes

The captions that the transformer learns from are wrong at a stated rate, as captions from the web are: the model can
draw every scene, but does not always draw the one it was asked for.  That is the room that reinforcement has.
Held-out captions (captions.py) appear in no stage.  Letters: B batch, C channels, H W latent height and width.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from fastgrpo.shapes.captions import misread, training_captions
from fastgrpo.shapes.world import IMAGE_SIZE, Caption, Shape, all_captions, draw, sample_scene

MAX_TOKENS = 12
WIDTH = 128
LATENT_CHANNELS = 8
SHIFT = 3.0
_TEXT_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes of the three trainings; images per second are about 130, 500 and 300 on two CPU cores."""

    seed: int = 0
    autoencoder_steps: int = 1300
    transformer_cycles: tuple[int, ...] = (3200, 4200)
    scorer_steps: int = 800
    num_scenes: int = 20000
    wrong_captions: float = 0.15


def train_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary has every word of the world as one token."""
    words = sorted({word for caption in all_captions() for word in str(caption).split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    bpe.train_from_iterator(
        words * 2,
        trainers.BpeTrainer(
            vocab_size=1000,
            initial_alphabet=alphabet,
            special_tokens=special,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    vocab = bpe.get_vocab()
    # CLIP keeps its two special tokens last: its text model takes the largest id as the end of the text
    ordered = sorted((word for word in vocab if word not in special), key=vocab.__getitem__) + special
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(ordered)}, merges=merges, model_max_length=MAX_TOKENS)
    assert max(len(tokenizer(str(c)).input_ids) for c in all_captions()) <= MAX_TOKENS
    return tokenizer


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
        pairs = zip(_scenes(captions, generator, 32), _scenes(captions, generator, 32), strict=True)
        images_BCHW = 2 * draw([one + other for one, other in pairs]) - 1
        posterior = model.encode(images_BCHW).latent_dist
        difference_BCHW = (model.decode(posterior.sample()).sample - images_BCHW).abs()
        error = (difference_BCHW * (2 + images_BCHW)).mean()
        return error + 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    _train("autoencoder", model.parameters(), loss, steps=recipe.autoencoder_steps, lr=3e-3)
    latents_BCHW = _encode(model.eval(), draw(_scenes(captions, generator, 512)))
    model.register_to_config(shift_factor=latents_BCHW.mean().item(), scaling_factor=1 / latents_BCHW.std().item())
    return model


def train_transformer(
    recipe: Recipe, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> tuple[SD3Transformer2DModel, list[CLIPTextModelWithProjection]]:
    """Flow matching on normalized latents, x_t = (1 - t) x_0 + t noise; the EMA weights come back."""
    torch.manual_seed(recipe.seed + 1)
    generator = np.random.default_rng(recipe.seed + 1)
    encoders = [CLIPTextModelWithProjection(_text_config(tokenizer)) for _ in range(2)]
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
        joint_attention_dim=2 * _TEXT_WIDTH,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=IMAGE_SIZE // 16,
        dual_attention_layers=(),
        qk_norm="rms_norm",
    )
    modules = nn.ModuleList([transformer, *encoders])
    for cycle, steps in enumerate(recipe.transformer_cycles):
        if cycle > 0:
            # from what the cycle before would have shipped, with new scenes, a new optimizer and a new warm-up
            modules.half().float()
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
            _encode(vae, draw([sample_scene(caption, generator) for caption in drawn[i : i + 250]]))
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
    return latents_NCHW, _tokens(tokenizer, texts)


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
    empty_L = _tokens(tokenizer, [""])[0]

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

    _train("transformer", modules.parameters(), loss, steps=steps, lr=1e-3, after=average)
    modules.load_state_dict(averaged.state_dict())


def _tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids [B, L], padded."""
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


def train_scorer(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPModel:
    """CLIP in miniature, contrastive over batches of distinct captions, all of them right."""
    torch.manual_seed(recipe.seed + 2)
    generator = np.random.default_rng(recipe.seed + 2)
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=_TEXT_WIDTH,
    )
    model = CLIPModel(
        CLIPConfig(
            text_config=_text_config(tokenizer).to_dict(), vision_config=vision.to_dict(), projection_dim=_TEXT_WIDTH
        )
    )
    captions = training_captions()
    mean, std = (torch.tensor(x)[:, None, None] for x in (_CLIP_MEAN, _CLIP_STD))

    def loss(_: int) -> Tensor:
        batch = [captions[i] for i in generator.permutation(len(captions))[:64]]
        tokens_BL = _tokens(tokenizer, [str(caption) for caption in batch])
        images_BCHW = draw([sample_scene(caption, generator) for caption in batch])
        logits_BB = model(input_ids=tokens_BL, pixel_values=(images_BCHW - mean) / std).logits_per_image
        target_B = torch.arange(64)
        return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2

    _train("scorer", model.parameters(), loss, steps=recipe.scorer_steps, lr=1e-3)
    return model.eval()


_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=4 * _TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=_TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _scenes(captions: list[Caption], generator: np.random.Generator, count: int) -> list[list[Shape]]:
    return [sample_scene(captions[i], generator) for i in generator.integers(len(captions), size=count)]


@torch.no_grad()
def _encode(vae: AutoencoderKL, images_BCHW: Tensor) -> Tensor:
    return vae.encode(2 * images_BCHW - 1).latent_dist.mean


def _train(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW with warm-up and cosine decay, gradients clipped to 1."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    started, running = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        after(step)
        running = value.item() if step == 0 else 0.98 * running + 0.02 * value.item()
        if (step + 1) % 100 == 0:
            print(f"{name} {step + 1}/{steps} loss {running:.4f} {time.monotonic() - started:.0f}s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory that receives pipeline/ and clip/")
    for field, default in Recipe().__dict__.items():
        is_list = isinstance(default, tuple)
        parser.add_argument(
            f"--{field.replace('_', '-')}",
            type=int if is_list else type(default),
            nargs="+" if is_list else None,
            default=default,
        )
    arguments = vars(parser.parse_args())
    pretrain(arguments.pop("out"), Recipe(**arguments))


def pretrain(out: Path, recipe: Recipe) -> None:
    """All four stages; ``out`` receives the pipeline's directory and, under ``scorer``, the CLIP's."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    vae = train_autoencoder(recipe)
    transformer, (encoder, encoder_2) = train_transformer(recipe, vae, tokenizer)
    save_pipeline(out, tokenizer, vae, transformer, encoder, encoder_2)
    save_scorer(out / "scorer", tokenizer, train_scorer(recipe, tokenizer))


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


def save_scorer(out: Path, tokenizer: CLIPTokenizer, model: CLIPModel) -> None:
    """Write a CLIP directory as transformers reads it, in half precision."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=_CLIP_MEAN, image_std=_CLIP_STD
    ).save_pretrained(out)


if __name__ == "__main__":
    main()
