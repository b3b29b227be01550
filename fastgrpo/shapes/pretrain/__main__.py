"""The recipe of the embedded model: ``python -m fastgrpo.shapes.pretrain --out DIR``.

Five stages, each a function of the recipe and its seed, write a ``StableDiffusion3Pipeline`` directory, a CLIP and a
small decoder, on one CPU thread:

    tokenizer.py     a byte-pair vocabulary in which every word of the world is one token
    autoencoder.py   AutoencoderKL, 64x64x3 -> 8x8x8, absolute error + a small KL
    transformer.py   SD3Transformer2DModel and its two CLIP text encoders, flow matching on the latents
    scorer.py        CLIPModel, contrastive, on the same scenes
    estimate_decoder.py
                     AutoencoderTiny, 8x8x8 -> 64x64x3, distilled from the pipeline that was written

The captions that the transformer learns from are wrong at a stated rate, as captions from the web are: the model can
draw every scene, but does not always draw the one it was asked for.  That is the room that reinforcement has.
Held-out captions (captions.py) appear in no stage.
"""

import argparse
from pathlib import Path

import torch

from fastgrpo.shapes.pretrain.autoencoder import train_autoencoder
from fastgrpo.shapes.pretrain.estimate_decoder import save_estimate_decoder, train_estimate_decoder
from fastgrpo.shapes.pretrain.recipe import Recipe
from fastgrpo.shapes.pretrain.scorer import save_scorer, train_scorer
from fastgrpo.shapes.pretrain.tokenizer import train_tokenizer
from fastgrpo.shapes.pretrain.transformer import save_pipeline, train_transformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="directory that receives the pipeline and, in scorer/ and estimate_decoder/, CLIP and the small decoder",
    )
    parser.add_argument(
        "--estimate-decoder-alone", action="store_true", help="the last stage, of the pipeline that is in --out"
    )
    for field, default in Recipe().__dict__.items():
        is_list = isinstance(default, tuple)
        parser.add_argument(
            f"--{field.replace('_', '-')}",
            type=int if is_list else type(default),
            nargs="+" if is_list else None,
            default=default,
        )
    arguments = vars(parser.parse_args())
    out, is_last_alone = arguments.pop("out"), arguments.pop("estimate_decoder_alone")
    (distill if is_last_alone else pretrain)(out, Recipe(**arguments))


def pretrain(out: Path, recipe: Recipe) -> None:
    """All five stages; ``out`` receives the pipeline's files, beside them those of CLIP and of the small decoder."""
    out.mkdir(parents=True, exist_ok=True)
    # sums in another order round differently: on one thread the weights do not depend on the number of cores
    torch.set_num_threads(1)
    tokenizer = train_tokenizer()
    vae = train_autoencoder(recipe)
    transformer, (encoder, encoder_2) = train_transformer(recipe, vae, tokenizer)
    save_pipeline(out, tokenizer, vae, transformer, encoder, encoder_2)
    save_scorer(out / "scorer", tokenizer, train_scorer(recipe, tokenizer))
    distill(out, recipe)


def distill(out: Path, recipe: Recipe) -> None:
    """The last stage, of the pipeline in ``out``."""
    torch.set_num_threads(1)
    save_estimate_decoder(out / "estimate_decoder", train_estimate_decoder(recipe, out))


if __name__ == "__main__":
    main()
