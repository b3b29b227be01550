"""The recipe of the embedded model: ``python -m fastgrpo.shapes.pretrain --out DIR``.

Four stages, each a function of the recipe and its seed, write a ``StableDiffusion3Pipeline`` directory and a CLIP, on
one CPU thread:

    tokenizer.py     a byte-pair vocabulary in which every word of the world is one token
    autoencoder.py   AutoencoderKL, 64x64x3 -> 8x8x8, absolute error + a small KL
    transformer.py   SD3Transformer2DModel and its two CLIP text encoders, flow matching on the latents
    scorer.py        CLIPModel, contrastive, on the same scenes

The captions that the transformer learns from are wrong at a stated rate, as captions from the web are: the model can
draw every scene, but does not always draw the one it was asked for.  That is the room that reinforcement has.
Held-out captions (captions.py) appear in no stage.
"""

import argparse
from pathlib import Path

import torch

from fastgrpo.shapes.pretrain.autoencoder import train_autoencoder
from fastgrpo.shapes.pretrain.recipe import Recipe
from fastgrpo.shapes.pretrain.scorer import save_scorer, train_scorer
from fastgrpo.shapes.pretrain.tokenizer import train_tokenizer
from fastgrpo.shapes.pretrain.transformer import save_pipeline, train_transformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="directory that receives the pipeline and, in scorer/, the CLIP"
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
    pretrain(arguments.pop("out"), Recipe(**arguments))


def pretrain(out: Path, recipe: Recipe) -> None:
    """All four stages; ``out`` receives the pipeline's files and, under ``scorer``, the CLIP's."""
    out.mkdir(parents=True, exist_ok=True)
    # sums in another order round differently: on one thread the weights do not depend on the number of cores
    torch.set_num_threads(1)
    tokenizer = train_tokenizer()
    vae = train_autoencoder(recipe)
    transformer, (encoder, encoder_2) = train_transformer(recipe, vae, tokenizer)
    save_pipeline(out, tokenizer, vae, transformer, encoder, encoder_2)
    save_scorer(out / "scorer", tokenizer, train_scorer(recipe, tokenizer))


if __name__ == "__main__":
    main()
