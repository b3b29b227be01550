"""Our rollout of Stable Diffusion 3 is diffusers' own pipeline, and what a wrong setting answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fastgrpo.algorithm.schedule import SD3Schedule
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.resolution import Resolution
from fastgrpo.sampler import Sampler
from fastgrpo.types import Conditions, Prompts, Samples
from fastgrpo_kernels import GuidedVelocity, combined
from tests.tiny import make_pipeline

# diffusers wants to be told of encoders that a directory lacks
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}
TEXTS = ["a red circle", "two blue squares", "a red circle"]


def make_model(weights: Path, **settings: Any) -> StableDiffusion3:
    defaults: dict[str, Any] = {"weights": str(weights), "adaptation": LoRA(rank=4), "resolution": 64, "use_t5": False}
    return StableDiffusion3(**defaults | settings)


@pytest.fixture(scope="module")
def scaled_weights(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a latent scale and shift that matter, as SD3's autoencoder has them."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_weights, **WITHOUT_T5)
    pipeline.vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    directory = tmp_path_factory.mktemp("scaled")
    pipeline.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def t5_weights(scaled_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a T5 as third encoder, whose tokenizer knows the words of the texts."""
    words = ["<pad>", "</s>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]
    words += [f"<extra_{i}>" for i in range(40)]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    pipeline = StableDiffusion3Pipeline.from_pretrained(scaled_weights, **WITHOUT_T5)
    width = pipeline.transformer.config.joint_attention_dim
    torch.manual_seed(5)
    config = T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipeline.register_modules(
        text_encoder_3=T5EncoderModel(config).eval(),
        tokenizer_3=PreTrainedTokenizerFast(tokenizer_object=model, **special),
    )
    directory = tmp_path_factory.mktemp("t5")
    pipeline.save_pretrained(directory)
    return directory


def images_of_diffusers(weights: Path, components: dict, start: torch.Tensor, **settings) -> torch.Tensor:
    pipeline = StableDiffusion3Pipeline.from_pretrained(weights, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(TEXTS, latents=start, num_inference_steps=10, output_type="pt", **settings).images


def images_of_ours(model: StableDiffusion3, start: torch.Tensor) -> torch.Tensor:
    sampler = Sampler(model=model, grid=SD3Schedule(10)(), batch_sizes=BatchSizes.of(2))
    return sampler(Samples.all_of(Prompts(TEXTS, ids=[0, 1, 2]), 1), model.encode(TEXTS), start)


def make_start(height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(len(TEXTS), 16, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("encoders", ["two encoders", "two encoders and zeros for T5", "three encoders"])
def test_the_ode_gives_the_images_of_diffusers(
    encoders: str, guidance_scale: float, scaled_weights: Path, t5_weights: Path
) -> None:
    use_t5 = encoders == "three encoders"
    weights = t5_weights if use_t5 else scaled_weights
    settings = {"guidance_scale": guidance_scale, "max_sequence_length": 0 if encoders == "two encoders" else 7}
    start = make_start()
    ours = images_of_ours(make_model(weights, use_t5=use_t5, **settings), start)
    theirs = images_of_diffusers(weights, {} if use_t5 else WITHOUT_T5, start, **settings)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # the images are no constant, so that equality means something
    assert ours.std() > 0.01


@pytest.mark.parametrize(("height", "width"), [(48, 96), (128, 32)])
def test_images_that_are_not_square_are_those_of_diffusers(height: int, width: int, scaled_weights: Path) -> None:
    model = make_model(scaled_weights, resolution=[height, width], guidance_scale=4.5, max_sequence_length=0)
    assert model.latent_shape == (16, height // 8, width // 8)
    start = make_start(height // 8, width // 8)
    ours = images_of_ours(model, start)
    settings = {"guidance_scale": 4.5, "max_sequence_length": 0, "height": height, "width": width}
    theirs = images_of_diffusers(scaled_weights, WITHOUT_T5, start, **settings)
    assert ours.shape == (3, 3, height, width)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    # drawn by a model whose own resolution is another, too
    square = make_model(scaled_weights, resolution=64, guidance_scale=4.5, max_sequence_length=0)
    assert square.latent_shape_of(Resolution(height, width)) == model.latent_shape
    assert square.latent_shape == square.latent_shape_of(None) == (16, 8, 8)
    assert torch.equal(images_of_ours(square, start), ours)


def test_the_third_encoder_and_guidance_change_the_image(t5_weights: Path) -> None:
    start = make_start()
    plain = images_of_ours(make_model(t5_weights, max_sequence_length=7, use_t5=True), start)
    without_t5 = images_of_ours(make_model(t5_weights, max_sequence_length=7), start)
    guided = images_of_ours(make_model(t5_weights, max_sequence_length=7, use_t5=True, guidance_scale=4.5), start)
    assert (plain - without_t5).abs().max() > 1e-3
    assert (plain - guided).abs().max() > 1e-3


def test_guidance_sends_no_gradient_through_the_unconditional_branch(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, guidance_scale=4.5)
    x, conditions = make_start(), model.encode(TEXTS)
    cotangent = torch.randn_like(x)
    (combined(model.velocity(x, 0.6, conditions)) * cotangent).sum().backward()
    guided = {name: weight.grad for name, weight in model.trainable.items()}
    for weight in model.trainable.values():
        weight.grad = None
    model.guidance_scale = 1.0
    (combined(model.velocity(x, 0.6, conditions)) * 4.5 * cotangent).sum().backward()
    for name, weight in model.trainable.items():
        torch.testing.assert_close(guided[name], weight.grad, rtol=1e-4, atol=1e-6)


def test_the_conditional_branch_alone_gives_the_gradient_of_both(tiny_weights: Path) -> None:
    # float64 tells rounding from error; a few of diffusers' own operations are float32 all the same
    model = make_model(tiny_weights, guidance_scale=4.5, dtype="float64")
    x, conditions, empty = make_start().double(), model.encode(TEXTS), model.encode([""] * len(TEXTS))
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    guided = model.velocity(x, 0.6, conditions)
    assert isinstance(guided, GuidedVelocity)
    v, v_empty = guided.conditional, guided.unconditional
    ((v_empty + 4.5 * (v - v_empty)) * cotangent).sum().backward()
    # the text queries of the last block lead nowhere, so their adapters have none
    ours = {name: weight.grad for name, weight in model.trainable.items() if weight.grad is not None}
    for weight in model.trainable.values():
        weight.grad = None
    # as flow_grpo does: both branches in one graph, then the unconditional one is detached
    both = conditions.cat(empty)
    v, v_empty = model.transformer(
        torch.cat([x, x]), both.embeds_BLC, both.pooled_BC, torch.full((2 * len(x),), 600.0), return_dict=False
    )[0].chunk(2)
    v_empty = v_empty.detach()
    ((v_empty + 4.5 * (v - v_empty)) * cotangent).sum().backward()
    theirs = {name: weight.grad for name, weight in model.trainable.items() if weight.grad is not None}
    assert ours.keys() == theirs.keys()
    largest = max(grad.abs().max().item() for grad in theirs.values())
    assert largest > 1e-3
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("adaptation", [LoRA(rank=4), FullFineTuning()], ids=lambda piece: type(piece).__name__)
def test_checkpointing_keeps_fewer_activations_and_the_same_gradient(adaptation, tiny_weights: Path) -> None:
    x, cotangent = make_start(), torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    results, saved = [], []
    for checkpointing in (False, True):
        model = make_model(tiny_weights, adaptation=adaptation, checkpointing=checkpointing)
        kept: list[int] = []

        def keep(part: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(part.nbytes)
            return part

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part):
            v = combined(model.velocity(x, 0.6, model.encode(TEXTS)))
        (v * cotangent).sum().backward()
        results.append([v, *(weight.grad for weight in model.trainable.values() if weight.grad is not None)])
        saved.append(sum(kept))
    for whole, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, whole, rtol=1e-5, atol=1e-7)
    assert saved[1] < 0.5 * saved[0]


def test_a_text_is_encoded_once(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    run = StableDiffusion3.run_encoders

    def counting(model: StableDiffusion3, text: str) -> Conditions:
        encoded.append(text)
        return run(model, text)

    monkeypatch.setattr(StableDiffusion3, "run_encoders", counting)
    model = make_model(tiny_weights)
    first = model.encode(TEXTS)
    again = model.encode(["two blue squares", "a red circle", "a green circle"])
    assert encoded == ["a red circle", "two blue squares", "a green circle"]
    assert torch.equal(first.embeds_BLC[0], again.embeds_BLC[1])
    assert torch.equal(first.pooled_BC[1], again.pooled_BC[0])


def test_an_encoding_does_not_depend_on_its_company(tiny_weights: Path) -> None:
    alone, together = make_model(tiny_weights), make_model(tiny_weights)
    rows = together.encode(["two red squares", "a green triangle", "a red circle", "two blue squares"])
    for row, text in ((2, "a red circle"), (3, "two blue squares")):
        assert torch.equal(alone.encode([text]).embeds_BLC[0], rows.embeds_BLC[row])
        assert torch.equal(alone.encode([text]).pooled_BC[0], rows.pooled_BC[row])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "float8"}, r"model\.dtype must be one of float32, bfloat16, float16, float64, got 'float8'"),
        (
            {"decode_dtype": "int8"},
            r"model\.decode_dtype must be one of float32, bfloat16, float16, float64, got 'int8'",
        ),
        ({"guidance_scale": 0.5}, r"model\.guidance_scale must be at least 1, got 0\.5"),
        ({"guidance_scale": -1.0}, r"model\.guidance_scale must be at least 1, got -1\.0"),
        ({"guidance_scale": float("nan")}, r"model\.guidance_scale must be at least 1, got nan"),
        ({"max_sequence_length": -1}, r"model\.max_sequence_length must lie in 0 to 512, .*, got -1"),
        ({"max_sequence_length": 513}, r"model\.max_sequence_length must lie in 0 to 512, .*, got 513"),
        ({"resolution": 40}, r"model\.resolution=40: .* multiples of 16; 32 and 48 are the nearest to 40$"),
        ({"resolution": [40, 64]}, r"model\.resolution=\[40, 64\]: .*; 32 and 48 are the nearest to 40$"),
        (
            {"resolution": [63, 65]},
            r"=\[63, 65\]: height and width must be multiples of 16; "
            r"48 and 64 are the nearest to 63, 64 and 80 are the nearest to 65$",
        ),
        ({"resolution": 0}, r"model\.resolution=0: height and width must be multiples of 16; 16 is the nearest to 0$"),
        ({"resolution": -16}, r"model\.resolution=-16: .*; 16 is the nearest to -16$"),
        ({"resolution": [64]}, r"model\.resolution must be a whole number or \[height, width\], got \[64\]$"),
        ({"resolution": [64, 64, 64]}, r"model\.resolution must be a whole number or \[height, width\], got \[64, 64"),
        ({"resolution": "64,96"}, r"model\.resolution must be a whole number or \[height, width\], got '64,96'$"),
        ({"resolution": [64.0, 96]}, r"model\.resolution must be a whole number or \[height, width\], got \[64\.0"),
        ({"resolution": True}, r"model\.resolution must be a whole number or \[height, width\], got True$"),
        # its table has 8 positions in a row, of 2 latent pixels, which are 8 pixels each
        (
            {"resolution": 144},
            r"model\.resolution=144: .* must be at most 128; this model has no more positions$",
        ),
        ({"resolution": [64, 144]}, r"model\.resolution=\[64, 144\]: .* must be at most 128; this model"),
        ({"resolution": 4096}, r"model\.resolution=4096: height and width must be at most 128"),
        ({"attention": "magic"}, r"runtime\.attention must be auto or one of sdpa, .* got 'magic'"),
        ({"weights": "random"}, r"model\.weights=random needs model\.architecture"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name_before_weights_are_read(
    setting: dict, message: str, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion3, "_make_pipeline", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        make_model(**{"weights": tiny_weights} | setting)


def test_the_largest_resolution_that_is_not_refused_is_drawn(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, resolution=128)
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    v = combined(model.velocity(x, 0.5, model.encode(["a red circle"])))
    assert v.shape == x.shape == (1, 16, 16, 16)
    assert v.std() > 0.01


def test_the_fingerprint_tells_base_weights_and_adapters_apart(tiny_weights: Path, tmp_path: Path) -> None:
    fingerprint = make_model(tiny_weights).fingerprint
    assert make_model(tiny_weights).fingerprint == fingerprint
    assert make_model(tiny_weights, adaptation=LoRA(rank=5)).fingerprint != fingerprint
    assert make_model(make_pipeline(tmp_path, seed=1)).fingerprint != fingerprint


def test_with_conditions_on_disk_text_encoders_are_never_loaded(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"guidance_scale": 2.0, "condition_cache": str(tmp_path / "conditions")}
    first = make_model(tiny_weights, **settings)
    assert first.pipeline.text_encoder is None
    encoded = first.encode([*TEXTS, ""])
    assert first.pipeline.text_encoder is not None
    again = make_model(tiny_weights, **settings)
    found = again.encode([*TEXTS, ""])
    assert torch.equal(found.embeds_BLC, encoded.embeds_BLC)
    assert torch.equal(found.pooled_BC, encoded.pooled_BC)
    assert found.keys == encoded.keys
    assert len(set(found.keys)) == 3
    again.velocity(make_start(), 0.5, again.encode(TEXTS))
    assert again.pipeline.text_encoder is None
    # an export wants them all the same
    again.save_merged(tmp_path / "merged")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged", **WITHOUT_T5)
    assert torch.equal(pipeline.text_encoder.text_projection.weight, first.pipeline.text_encoder.text_projection.weight)


def test_other_encoders_do_not_find_each_others_conditions(tiny_weights: Path, tmp_path: Path) -> None:
    directory = str(tmp_path / "conditions")
    one = make_model(tiny_weights, condition_cache=directory)
    other = make_model(make_pipeline(tmp_path / "other", seed=1), condition_cache=directory)
    assert (one.encode(TEXTS).embeds_BLC - other.encode(TEXTS).embeds_BLC).abs().max() > 1e-3
