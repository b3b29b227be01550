"""How good the shipped model is: strict accuracy of its images, its autoencoder, and its CLIP scorer.

python -m benchmarks.embedded_model
"""

import argparse
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import table, write_report
from fastgrpo.assembly import build_evaluation
from fastgrpo.compile.networks import Eager
from fastgrpo.config import load_config
from fastgrpo.files.locations import resolve_path
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.parts import build_model, read_runtime
from fastgrpo.pieces import build
from fastgrpo.prompts import load_prompts
from fastgrpo.rewards.clip_score import clip_score
from fastgrpo.settings import Evaluating
from fastgrpo.shapes.captions import held_out_captions
from fastgrpo.shapes.verifier import verify
from fastgrpo.shapes.world import Caption, draw, sample_scene

NUM_IMAGES = 1024


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    config = load_config("train", ["evaluate.images_per_prompt=16"])
    model = build_model(config)
    assert isinstance(model, StableDiffusion3)
    prompts = load_prompts(resolve_path(config.prompts.held_out))
    results = {}
    for guidance in (1.0, 2.5):
        model.guidance_scale = guidance
        rewards, algorithm = build(config.reward), build(config.algorithm)
        evaluating = Evaluating(**config.evaluate)
        means = build_evaluation(evaluating, read_runtime(config), model, rewards, algorithm, prompts)().means
        results[f"images, guidance {guidance:g}"] = means
    captions, images_BCHW = _drawn()
    vae = model.pipeline.vae
    reconstructed_BCHW = (vae.decode(vae.encode(2 * images_BCHW - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
    results["autoencoder reconstructions"] = _verified(reconstructed_BCHW, captions)
    results["drawn scenes"] = _verified(images_BCHW, captions)
    results["CLIP scorer, top 1 of 64 captions"] = {"accuracy": _top_one(images_BCHW[:128], captions[:128])}
    total = sum(file.stat().st_size for file in _files())
    rows = [[name, ", ".join(f"{key} {value:.3f}" for key, value in means.items())] for name, means in results.items()]
    body = (
        "64 held-out captions, plain noise, 10 ODE steps, 16 images each; scenes are "
        f"{NUM_IMAGES} random ones of the held-out captions.\n\n"
        + table(["what", "means"], rows)
        + f"\n\nShipped files: {total / 1e6:.1f} MB."
    )
    data = {"results": results, "bytes": total}
    print(write_report("embedded_model", title="The embedded model", body=body, data=data).read_text())


def _drawn() -> tuple[list[Caption], Tensor]:
    generator = np.random.default_rng(7)
    held_out = held_out_captions()
    captions = [held_out[i] for i in generator.integers(len(held_out), size=NUM_IMAGES)]
    return captions, draw([sample_scene(caption, generator) for caption in captions])


def _verified(images_BCHW: Tensor, captions: list[Caption]) -> dict[str, float]:
    pairs = zip(images_BCHW.permute(0, 2, 3, 1).numpy(), captions, strict=True)
    graded, strict = np.mean([verify(image, caption) for image, caption in pairs], axis=0)
    return {"graded": float(graded), "strict": float(strict)}


def _top_one(images_BCHW: Tensor, captions: list[Caption]) -> float:
    scorer, texts = clip_score(path="shapes", backend=Eager()), [str(caption) for caption in held_out_captions()]
    scores = torch.stack([scorer(images_BCHW, [text] * len(images_BCHW)) for text in texts])
    chosen = scores.argmax(dim=0).tolist()
    return float(np.mean([texts[i] == str(caption) for i, caption in zip(chosen, captions, strict=True)]))


def _files() -> list:
    root = files("fastgrpo.shapes") / "checkpoint"
    return [path for path in root.rglob("*") if path.is_file()]  # type: ignore[attr-defined]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
