"""``adaptation.start``: adapters start as a LoRA of any rank, scale and format, and all of their rows learn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgrpo.models.adapter import started
from fastgrpo.models.lora import ATTENTION, LoRA
from fastgrpo_kernels import combined
from tests import tiny_flux
from tests.models import test_flux
from tests.models.test_lora import TEXTS, T, load_pipeline, make_latents, make_model, train_a_little, velocity_of
from tests.models.test_lora_files import small

# of layers with adapters of their own: a rank and an alpha of some of them are others
PEFT: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 7,
    "target_modules": ["attn.to_q", "to_add_out", "ff.net.2", "attn2.to_k"],
    "rank_pattern": {"ff.net.2": 5},
    "alpha_pattern": {"ff.net.2": 2, r"^transformer_blocks\.1\.attn\.to_q": 9},
    "init_lora_weights": False,
}


def velocity(model: Any) -> Tensor:
    return combined(model.velocity(make_latents(), T, model.encode(TEXTS)))


@pytest.fixture
def lora(tiny_weights: Path, tmp_path: Path) -> Path:
    """As peft writes it."""
    torch.manual_seed(0)
    adapted = get_peft_model(load_pipeline(tiny_weights).transformer, LoraConfig(**PEFT))
    small(adapted)
    adapted.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_the_policy_starts_as_the_lora_and_its_reference_is_the_base(tiny_weights: Path, lora: Path) -> None:
    torch.manual_seed(0)
    theirs = get_peft_model(load_pipeline(tiny_weights).transformer, LoraConfig(**PEFT))
    small(theirs)
    model = make_model(tiny_weights, LoRA(rank=32, alpha=64.0, start=str(lora)))
    x, conditions = make_latents(), model.encode(TEXTS)
    torch.testing.assert_close(
        velocity(model).detach(), velocity_of(theirs.base_model.model, x, conditions), atol=2e-5, rtol=1e-5
    )
    with model.sampling():
        torch.testing.assert_close(velocity(model), velocity(make_model(tiny_weights, LoRA(), lora=str(lora))))
    base = velocity_of(load_pipeline(tiny_weights).transformer, x, conditions)
    reference = combined(model.velocity_and_reference(x, T, conditions)[1])
    torch.testing.assert_close(reference, base, atol=1e-5, rtol=0)
    assert (velocity(model) - base).abs().max() > 1e-2


def test_rank_and_layers_are_the_loras_and_the_scale_is_the_configs(tiny_weights: Path, lora: Path) -> None:
    model = make_model(tiny_weights, LoRA(rank=32, alpha=48.0, start=str(lora)))
    layers = {name.split(".lora_")[0] for name in load_file(lora / "adapter_model.safetensors")}
    assert {name.split(".lora_")[0] for name in model.trainable} == {
        layer.removeprefix("base_model.model.") for layer in layers
    }
    settings = started(model).settings
    assert (settings["rank"], settings["alpha"]) == (5, 7.5)
    # all layers that end so are adapted, but for ff.net.2, which ff_context has too
    assert settings["targets"] == sorted(layer.removeprefix("base_model.model.") for layer in layers)
    assert all(len(weight) == 5 for name, weight in model.trainable.items() if "lora_A" in name)
    # a run that goes on is made of these, without the file
    again = make_model(tiny_weights, LoRA(**dict(settings) | {"targets": tuple(settings["targets"])}))
    assert (again.fingerprint, list(again.trainable)) == (model.fingerprint, list(model.trainable))
    assert started(again).digest == "" != started(model).digest


def test_ends_of_names_are_targets_where_they_say_all(tiny_weights: Path, tmp_path: Path) -> None:
    model = make_model(tiny_weights, LoRA(rank=4, alpha=6.0))
    train_a_little(model)
    model.save_lora(tmp_path)
    again = make_model(tiny_weights, LoRA(rank=2, alpha=3.0, start=str(tmp_path)))
    assert started(again).settings == {"rank": 4, "alpha": 6.0, "targets": sorted(ATTENTION)}
    # folded into B and out of it again
    for name, weight in model.trainable.items():
        torch.testing.assert_close(again.trainable[name], weight)
    torch.testing.assert_close(velocity(again), velocity(model), atol=1e-5, rtol=0)


def test_rows_that_the_lora_does_not_have_learn(tiny_weights: Path, lora: Path, tmp_path: Path) -> None:
    stored = load_file(lora / "adapter_model.safetensors")
    for name, factor in stored.items():
        # filled up with zeros, as some programs do
        padding = [0, 0, 0, 2] if "lora_A" in name else [0, 2]
        stored[name] = torch.nn.functional.pad(factor, padding)
    save_file({name.removeprefix("base_model.model."): factor for name, factor in stored.items()}, tmp_path / "a.sft")
    # rank 7, of which layers of rank 3 have two rows of zeros and lack two
    model = make_model(tiny_weights, LoRA(start=str(tmp_path / "a.sft")))
    before = velocity(model).detach()
    a_RI, b_OR = (model.trainable[f"transformer_blocks.0.attn.to_q.lora_{letter}.weight"] for letter in "AB")
    assert len(a_RI) == 7
    assert not b_OR[:, 3:].any()
    # as new adapters of that rank
    assert a_RI[3:].std().item() == pytest.approx(1 / 7, rel=0.3)
    train_a_little(model)
    assert b_OR[:, 3:].any(dim=0).all()
    assert (velocity(model) - before).abs().max() > 1e-3


def test_feed_forwards_of_single_stream_blocks_are_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights, tensors = tiny_flux.make_pipeline(tmp_path / "weights"), {}
    shapes = {"1.proj_mlp": (128, 32), "0.proj_out": (32, 160), "1.attn.to_k": (32, 32)}
    for layer, (num_outputs, num_inputs) in shapes.items():
        name = f"transformer.single_transformer_blocks.{layer}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, num_inputs) / 8
        tensors[f"{name}.lora_B.weight"] = torch.randn(num_outputs, 2) / 8
    save_file(tensors, tmp_path / "a.safetensors")
    pipeline = FluxPipeline.from_pretrained(weights)
    before = test_flux.images_of_diffusers(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    model = test_flux.make_model(weights, adaptation=LoRA(rank=8, start=str(tmp_path / "a.safetensors")))
    names = {name.split(".lora_")[0].partition(".")[2] for name in model.trainable}
    assert names == shapes.keys()
    ours, theirs = test_flux.images_of_ours(model), test_flux.images_of_diffusers(pipeline)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (theirs - before).abs().max() > 1e-3
    x = test_flux.make_start()
    combined(model.velocity(x, 0.5, model.encode(test_flux.TEXTS))).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.trainable.values())


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (
            "transformer_blocks.0.norm1.linear",
            "changes 1 layers on which no adapters are trained, transformer_blocks.0.",
        ),
        ("proj_out", "use model.lora=.*a.sft, which adds all of it to the frozen weights, and train new adapters"),
        (
            "transformer_blocks.7.attn.to_q",
            "is of another model: a SD3Transformer2DModel lacks 1 of its 1 layers, tran",
        ),
        ("text_encoder.layers.0.q_proj", "changes text encoders too, by text_encoder.layers.0.q_proj"),
    ],
)
def test_what_cannot_be_started_from_names_its_layers(
    layer: str, says: str, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = load_pipeline(tiny_weights).transformer.state_dict().get(f"{layer}.weight", torch.zeros(32, 32)).shape
    factors = {"lora_A.weight": torch.ones(1, shape[1]), "lora_B.weight": torch.ones(shape[0], 1)}
    save_file({f"{layer}.{name}": factor for name, factor in factors.items()}, tmp_path / "a.sft")
    # before weights are read
    monkeypatch.setattr("fastgrpo.models.sd3.StableDiffusion3._make_pipeline", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=says) as raised:
        make_model(tiny_weights, LoRA(start=str(tmp_path / "a.sft")))
    assert str(raised.value).startswith("adaptation.start")
