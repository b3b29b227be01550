"""Estimates of a search are decoded by a small decoder where there is one, and images that are kept never."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusion3Pipeline
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgrpo.algorithm.noise import SEARCH_STREAM, Candidates, NoiseDraw
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.files.locations import resolve_path
from fastgrpo.memory.plan import DECODING
from fastgrpo.models.adapter import estimate_decoding
from fastgrpo.models.estimate_decoder import decoded
from fastgrpo.models.lora import LoRA
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.parts import build_model
from fastgrpo.trainer import Trainer
from fastgrpo.types import Samples
from fastgrpo_kernels import combined
from tests.memory.test_stages import PLENTY, Planned
from tests.tiny_config import make_config

EMBEDDED = "pkg://fastgrpo.shapes/checkpoint"
SHIPPED = Path(resolve_path(EMBEDDED)) / "estimate_decoder"


def make_decoder(directory: Path, seed: int = 7, *, width: int = 4, channels: int = 16, **settings: Any) -> Path:
    """An AutoencoderTiny with random weights, 8 pixels a row of a latent's."""
    torch.manual_seed(seed)
    sizes = {"encoder_block_out_channels": (1,) * 4, "num_encoder_blocks": (0,) * 4}
    sizes |= {"decoder_block_out_channels": (width,) * 4, "num_decoder_blocks": (1, 1, 0, 0)}
    AutoencoderTiny(latent_channels=channels, **(sizes | settings)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("small") / "decoder", scaling_factor=1.5, shift_factor=0.2)


def make_model(weights: Path | str, estimate_decoder: Path | str | None, **settings: Any) -> StableDiffusion3:
    return StableDiffusion3(
        weights=str(weights),
        adaptation=LoRA(rank=1),
        resolution=64,
        max_sequence_length=0,
        use_t5=False,
        estimate_decoder=None if estimate_decoder is None else str(estimate_decoder),
        **settings,
    )


def noise(model: PipelineModel, num: int = 3) -> Tensor:
    return torch.randn(num, *model.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_an_estimates_images_are_those_of_diffusers(
    tiny_weights: Path, small: Path, dtype: str, tolerance: float
) -> None:
    model = make_model(tiny_weights, small, decode_dtype=dtype)
    x_BCHW = noise(model)
    with torch.no_grad():
        sample = AutoencoderTiny.from_pretrained(small).decode(x_BCHW / 1.5 + 0.2).sample
    expected = (sample / 2 + 0.5).clamp(0, 1)
    found = model.decode_estimate(x_BCHW)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    # what is kept is decoded as it was
    assert torch.equal(model.decode(x_BCHW), make_model(tiny_weights, None, decode_dtype=dtype).decode(x_BCHW))
    assert (model.decode(x_BCHW) - found).abs().mean() > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_runs_channels_last_in_the_decoders_type(tiny_weights: Path, small: Path, dtype: str) -> None:
    seen: list[Tensor] = []

    def compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(module: Any, z_BCHW: Tensor) -> Tensor:
            seen.extend([z_BCHW, *(weight for weight in module.parameters() if weight.ndim == 4)])
            return function(module, z_BCHW)

        return run if function is decoded else function

    compile.forward = lambda function: function  # type: ignore[attr-defined]
    model = make_model(tiny_weights, small, decode_dtype=dtype, compile=compile)
    model.decode(noise(model))
    assert seen == []
    model.decode_estimate(noise(model))
    assert len(seen) > 10
    for tensor in seen:
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert tensor.dtype == getattr(torch, dtype)
        assert not tensor.requires_grad


def test_without_one_estimates_are_decoded_in_full(tiny_weights: Path) -> None:
    # nothing lies beside these weights
    for estimate_decoder in (None, "auto"):
        model = make_model(tiny_weights, estimate_decoder)
        x_BCHW = noise(model)
        assert torch.equal(model.decode_estimate(x_BCHW), model.decode(x_BCHW))


def make_trainer(weights: Path, output: Path, *words: str) -> Trainer:
    # of a size that divides eight candidates and six samples
    search = ["algorithm/noise=elite", "algorithm.noise.candidates=4", "algorithm.noise.elites=3"]
    search.append("runtime.micro_batch=2")
    return build_trainer(make_config(weights, output, "reward.golden=false", *search, *words))


def count_decoded(patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Images by the class that decodes them, from now on."""
    counts = {"AutoencoderKL": 0, "AutoencoderTiny": 0}

    def counted(cls: Any) -> Callable[..., Any]:
        decode = cls.decode

        def run(self: Any, z_BCHW: Tensor, *arguments: Any, **settings: Any) -> Any:
            counts[cls.__name__] += len(z_BCHW)
            return decode(self, z_BCHW, *arguments, **settings)

        return run

    for cls in (AutoencoderKL, AutoencoderTiny):
        patch.setattr(cls, "decode", counted(cls))
    return counts


def test_a_search_decodes_small_and_the_images_it_leads_to_in_full(
    tiny_weights: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", f"model.estimate_decoder={small}")
    counts = count_decoded(monkeypatch)
    noise = trainer.start_noise(Samples.all_of(trainer.prompts.at(0), group_size=3))
    # two prompts of four candidates
    assert counts == {"AutoencoderKL": 0, "AutoencoderTiny": 8}
    assert noise.estimates_PG is not None
    trainer.step()
    assert counts == {"AutoencoderKL": 6, "AutoencoderTiny": 16}
    trainer.evaluation()
    assert counts["AutoencoderTiny"] == 16
    assert counts["AutoencoderKL"] > 6


def test_so_does_a_search_of_a_steps_noise(
    tiny_weights: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("reward.golden=false", "algorithm/noise=elite_step", "algorithm.noise.candidates=3")
    config = make_config(
        tiny_weights, tmp_path / "run", f"model.estimate_decoder={small}", "runtime.micro_batch=2", *words
    )
    trainer = build_trainer(config)
    counts = count_decoded(monkeypatch)
    trainer.step()
    # six samples of three candidates
    assert counts == {"AutoencoderKL": 6, "AutoencoderTiny": 18}


@torch.no_grad()
def test_the_scores_of_a_search_are_those_of_small_images(tiny_weights: Path, small: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_weights, tmp_path / "run", f"model.estimate_decoder={small}", "seed=5")
    model, prompts = trainer.model, trainer.prompts.at(0)
    noise = trainer.start_noise(Samples.all_of(prompts, group_size=3))
    assert noise.estimates_PG is not None
    draw = NoiseDraw(5, prompts.ids, 3, model.latent_shape)
    tiny = AutoencoderTiny.from_pretrained(small)
    for p, text in enumerate(prompts.texts):
        x_KCHW = Candidates(draw, SEARCH_STREAM, 4, range(2)).all()[p]
        conditions = model.encode([text] * 4)
        grid = trainer.algorithm.estimate_grid(4)
        for t, t_next in pairwise(grid):
            x_KCHW = x_KCHW + (t_next - t) * combined(model.velocity(x_KCHW, t, conditions))
        images = (tiny.decode(x_KCHW / 1.5 + 0.2).sample / 2 + 0.5).clamp(0, 1)
        best = trainer.rewards.score(images, [text] * 4).sort(descending=True).values[:3]
        torch.testing.assert_close(noise.estimates_PG[p], best, rtol=1e-4, atol=0)


def test_a_model_that_cannot_decode_estimates_is_searched_in_full(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as a model of one's own that has what FlowModel asks for, and no more
    monkeypatch.delattr(PipelineModel, "decode_estimate")
    trainer = make_trainer(tiny_weights, tmp_path / "run")
    counts = count_decoded(monkeypatch)
    x_BCHW = torch.zeros(2, *trainer.model.latent_shape)
    assert torch.equal(estimate_decoding(trainer.model)(x_BCHW), trainer.model.decode(x_BCHW))
    before = counts["AutoencoderKL"]
    trainer.step()
    assert counts == {"AutoencoderKL": before + 8 + 6, "AutoencoderTiny": 0}


def test_a_run_keeps_the_choice_and_may_change_it(tiny_weights: Path, small: Path, tmp_path: Path) -> None:
    from fastgrpo.training import train

    def run(*words: str) -> Any:
        train(make_config(tiny_weights, tmp_path / "run", "reward.golden=false", "train.iterations=1", *words))
        return OmegaConf.load(tmp_path / "run" / "config.yaml")

    assert run("model.estimate_decoder=null").model.estimate_decoder is None
    assert run(f"model.estimate_decoder={small}", "resume=true").model.estimate_decoder == str(small)


def test_the_plan_counts_the_larger_of_the_two_decoders(tiny_weights: Path, tmp_path: Path) -> None:
    def per_sample(*words: str) -> int:
        return Planned(tiny_weights, tmp_path / "run", PLENTY, *words).plan.choices[DECODING].cost.per_sample

    own = per_sample("model.estimate_decoder=null")
    narrow, wide = (make_decoder(tmp_path / str(width), width=width) for width in (1, 64))
    assert per_sample(f"model.estimate_decoder={narrow}") == own
    assert per_sample(f"model.estimate_decoder={wide}") > 2 * own


def test_random_weights_have_a_random_decoder_of_its_sizes(small: Path) -> None:
    words = ["model=sd35_miniature", f"model.estimate_decoder={small}"]
    model, again = (build_model(load_config("train", words)) for _ in range(2))
    x_BCHW = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    images = estimate_decoding(model)(x_BCHW)
    assert torch.equal(images, estimate_decoding(again)(x_BCHW))
    assert images.std() > 0.01
    with torch.no_grad():
        stored = AutoencoderTiny.from_pretrained(small).decode(x_BCHW / 1.5 + 0.2).sample
    assert (images - (stored / 2 + 0.5).clamp(0, 1)).abs().max() > 0.01


def without_weights(directory: Path) -> None:
    (directory / "diffusion_pytorch_model.safetensors").unlink()


def cut_short(directory: Path) -> None:
    path = directory / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def without_a_layer(directory: Path) -> None:
    path = directory / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["decoder.layers.0.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def without_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def of_another_class(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "AutoencoderKL"}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_weights, r"diffusion_pytorch_model\.safetensors is missing; download it again"),
        (cut_short, r"is damaged or cut short"),
        (without_a_layer, r"lacks decoder\.layers\.0\.weight; give the weights of a whole AutoencoderTiny"),
        (without_config, r"config\.json is missing; give the directory or id of an AutoencoderTiny"),
        (of_another_class, r"is of AutoencoderKL, not of an AutoencoderTiny; give one, or null"),
    ],
)
def test_damaged_files_are_refused(
    tiny_weights: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(directory := make_decoder(tmp_path / "decoder"))
    refuse(tiny_weights, directory, says)


def refuse(weights: Path | str, estimate_decoder: Path | str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        make_model(weights, estimate_decoder)
    assert str(raised.value).startswith("model.estimate_decoder")
    assert "\n" not in str(raised.value)


def test_a_decoder_of_other_latents_is_refused(tiny_weights: Path, tmp_path: Path) -> None:
    says = "decodes latents of 4 channels and 8 pixels a row, and the model's have 16 and 8; give one"
    refuse(tiny_weights, make_decoder(tmp_path / "four", channels=4), says)
    half: dict[str, Any] = {"decoder_block_out_channels": (4,) * 3, "num_decoder_blocks": (1, 0, 0)}
    says = "decodes latents of 16 channels and 4 pixels a row, and the model's have 16 and 8; give one"
    refuse(tiny_weights, make_decoder(tmp_path / "half", **half), says)
    refuse(tiny_weights, SHIPPED, "decodes latents of 8 channels and 8 pixels a row")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nowhere/at/all", "'nowhere/at/all' is neither a directory here"),
        ("", "'' is neither a directory here"),
        ("pkg://no.such.package/x", "there is no package 'no.such.package'"),
        ("owner/name", r"owner/name could not be downloaded .* --include config\.json|HF_HUB_OFFLINE=1"),
    ],
)
def test_a_place_without_one_is_refused(tiny_weights: Path, path: str, says: str) -> None:
    refuse(tiny_weights, path, says)


@pytest.mark.parametrize("model", ["flux2_klein_miniature", "qwen_image_miniature", "qwen_image_21_miniature"])
def test_latents_that_none_decodes_are_refused(model: str, small: Path) -> None:
    config = load_config("train", [f"model={model}", f"model.estimate_decoder={small}"])
    with pytest.raises(ValueError, match="no AutoencoderTiny decodes the latents of"):
        build_model(config)


@pytest.mark.parametrize("model", ["flux_miniature", "z_image_miniature"])
def test_the_other_families_decode_by_one(model: str, small: Path) -> None:
    built = build_model(load_config("train", [f"model={model}", f"model.estimate_decoder={small}"]))
    x_BCHW = torch.randn(1, *built.latent_shape, generator=torch.Generator().manual_seed(0))
    images = estimate_decoding(built)(x_BCHW)
    assert images.shape == built.decode(x_BCHW).shape
    assert not torch.equal(images, built.decode(x_BCHW))


def test_the_shipped_one_has_few_weights_and_decodes_as_the_model_does() -> None:
    tiny = AutoencoderTiny.from_pretrained(SHIPPED)
    assert sum(weight.numel() for weight in tiny.decoder.parameters()) == 9539
    weights = load_file(SHIPPED / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 40_000
    # the pipeline beside it is what it was
    pipeline = StableDiffusion3Pipeline.from_pretrained(SHIPPED.parent, text_encoder_3=None, tokenizer_3=None)
    assert "estimate_decoder" not in pipeline.components
    model = make_model(EMBEDDED, "auto")
    with model.sampling(), torch.no_grad():
        x_BCHW = noise(model, 8)
        conditions = model.encode(["a red circle left of a blue square"] * 8)
        for t, t_next in zip((1.0, 0.9, 0.75, 0.5), (0.9, 0.75, 0.5, 0.0), strict=True):
            x_BCHW = x_BCHW + (t_next - t) * combined(model.velocity(x_BCHW, t, conditions))
    images, small_images = model.decode(x_BCHW), model.decode_estimate(x_BCHW)
    assert not torch.equal(images, small_images)
    assert (images - small_images).abs().mean() < 2.5 / 255
    assert (images - images.mean(dim=(2, 3), keepdim=True)).abs().mean() > 10 / 255
