"""The directory that a run writes computes in diffusers, peft and ComfyUI what the policy computes, in each family."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline, ZImagePipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgrpo.models.lora import LoRA
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo_kernels import combined
from tests import tiny, tiny_flux, tiny_flux2, tiny_qwen_image, tiny_z_image
from tests.models import comfyui, test_flux, test_flux2, test_qwen_image, test_z_image
from tests.models.test_lora import TEXTS, T, load_pipeline, make_latents, velocity_of
from tests.models.test_lora import make_model as make_sd3
from tests.qwen_families import QWEN_IMAGE

FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Family:
    """How ours and diffusers' draw: images, or for SD3 velocities, of the same noise."""

    make_pipeline: Callable[[Path], Path]
    load: Callable[[Path], Any]
    make_model: Callable[..., Any]
    ours: Callable[[Any], Tensor]
    theirs: Callable[[Any, Any], Tensor]


def of_module(module: Any, make_pipeline: Callable[[Path], Path], pipeline_class: Any) -> Family:
    return Family(
        make_pipeline=make_pipeline,
        load=pipeline_class.from_pretrained,
        make_model=module.make_model,
        ours=module.images_of_ours,
        theirs=lambda model, pipeline: module.images_of_diffusers(pipeline),
    )


def sd3_velocity(model: PipelineModel, pipeline: StableDiffusion3Pipeline) -> Tensor:
    return velocity_of(pipeline.transformer, make_latents(), model.encode(TEXTS))


FAMILIES = {
    "sd3": Family(
        make_pipeline=tiny.make_pipeline,
        load=load_pipeline,
        make_model=lambda weights, **settings: make_sd3(weights, **{"adaptation": LoRA(rank=2)} | settings),
        ours=lambda model: combined(model.velocity(make_latents(), T, model.encode(TEXTS))).detach(),
        theirs=sd3_velocity,
    ),
    "flux": of_module(test_flux, tiny_flux.make_pipeline, FluxPipeline),
    "flux2": of_module(test_flux2, tiny_flux2.make_pipeline, Flux2KleinPipeline),
    "z_image": of_module(test_z_image, tiny_z_image.make_pipeline, ZImagePipeline),
    "qwen_image": Family(
        make_pipeline=tiny_qwen_image.make_pipeline,
        load=QwenImagePipeline.from_pretrained,
        make_model=QWEN_IMAGE.make_model,
        ours=partial(test_qwen_image.images_of_ours, QWEN_IMAGE),
        theirs=lambda model, pipeline: test_qwen_image.images_of_diffusers(QWEN_IMAGE, pipeline),
    ),
}
TARGETS = {
    "sd3": ("to_q", "add_k_proj", "to_out.0", "to_add_out", "net.0.proj", "net.2"),
    "flux": test_flux.TARGETS,
    "flux2": ("to_k", "add_v_proj", "to_out.0", "to_qkv_mlp_proj", "to_out"),
    "z_image": test_z_image.TARGETS,
    "qwen_image": ("to_q", "add_q_proj", "to_add_out", "net.2"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_all_readers_compute_what_the_policy_computes(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    weights, lora = family.make_pipeline(tmp_path / "weights"), tmp_path / "lora"
    # of a scale that is neither 1 nor a power of two
    model = family.make_model(weights, adaptation=LoRA(rank=4, alpha=6.0, targets=TARGETS[name]))
    test_flux.nudge(model.trainable)
    model.save_lora(lora)
    ours, base = family.ours(model), family.theirs(model, family.load(weights))
    # at half its strength it would be another
    assert (ours - base).abs().max() > 1e-3

    def check(pipeline: Any) -> None:
        torch.testing.assert_close(family.theirs(model, pipeline), ours, atol=1e-4, rtol=0)

    in_diffusers = family.load(weights)
    in_diffusers.load_lora_weights(lora, weight_name=FILE)
    check(in_diffusers)
    in_peft = family.load(weights)
    # as flow_grpo loads its checkpoints
    in_peft.transformer = PeftModel.from_pretrained(in_peft.transformer, lora)
    check(in_peft)
    in_comfyui = family.load(weights)
    assert comfyui.add_lora(name, in_comfyui.transformer, lora / FILE) == []
    check(in_comfyui)
    # and ours, by either of its files
    for file in (lora, lora / "adapter_model.safetensors"):
        again = family.make_model(weights, lora=str(file))
        torch.testing.assert_close(family.ours(again), ours, atol=1e-4, rtol=0)


def test_files_say_no_alpha_but_the_rank_and_hold_the_scale_in_b(tiny_weights: Path, tmp_path: Path) -> None:
    model = make_sd3(tiny_weights, LoRA(rank=4, alpha=6.0))
    test_flux.nudge(model.trainable)
    model.save_lora(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {FILE, "adapter_model.safetensors", "adapter_config.json"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 4, "LORA")
    assert config["target_modules"] == sorted({layer.rpartition(".lora_")[0] for layer in model.trainable})
    assert config["base_model_name_or_path"] == str(tiny_weights)
    for file, prefix in ((FILE, "transformer."), ("adapter_model.safetensors", "base_model.model.")):
        written = load_file(tmp_path / file)
        assert written.keys() == {f"{prefix}{layer}" for layer in model.trainable}
        for layer, weight in model.trainable.items():
            scale = 1.5 if layer.endswith("lora_B.weight") else 1.0
            assert torch.equal(written[f"{prefix}{layer}"], scale * weight.detach())


def test_what_an_earlier_version_wrote_keeps_its_strength_in_ours(tiny_weights: Path, tmp_path: Path) -> None:
    model = make_sd3(tiny_weights, LoRA(rank=4, alpha=6.0))
    test_flux.nudge(model.trainable)
    layers = {f"transformer.{layer}": weight.detach() for layer, weight in model.trainable.items()}
    described = {f"transformer.{key}": value for key, value in model.adaptation.lora_config.items()}
    save_file(layers, tmp_path / FILE, metadata={"lora_adapter_metadata": json.dumps(described)})
    ours = FAMILIES["sd3"].ours(model)
    again = FAMILIES["sd3"].ours(make_sd3(tiny_weights, LoRA(rank=2), lora=str(tmp_path)))
    torch.testing.assert_close(again, ours, atol=1e-5, rtol=0)
    # which ComfyUI did not
    pipeline = load_pipeline(tiny_weights)
    comfyui.add_lora("sd3", pipeline.transformer, tmp_path / FILE)
    assert (sd3_velocity(model, pipeline) - ours).abs().max() > 1e-3
