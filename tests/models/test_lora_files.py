"""A LoRA made elsewhere computes in our model what it computes in the library that wrote it, whichever its format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline, ZImagePipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgrpo.commands.trained import with_run
from fastgrpo.config import load_config
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.flux import Flux
from fastgrpo.models.flux2 import Flux2Klein
from fastgrpo.models.lora import LoRA
from fastgrpo.models.qwen_image import QwenImage
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.models.z_image import ZImage
from fastgrpo.parts import build_model
from fastgrpo_kernels import combined
from tests import tiny, tiny_flux, tiny_flux2, tiny_qwen_image, tiny_z_image
from tests.models import test_flux, test_z_image
from tests.models.test_lora import TEXTS, T, load_pipeline, make_latents, train_a_little, velocity_of

# layers of all kinds, also of those that ours never has: embeddings, modulations, a convolution
TARGETS = [
    "attn.to_q",
    "to_add_out",
    "ff.net.2",
    "pos_embed.proj",
    "norm1.linear",
    "proj_out",
    "timestep_embedder.linear_1",
]
# attention of 0 and 1 alike, but for one layer; other ranks in the feed-forward
PEFT: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 7,
    "target_modules": TARGETS,
    "rank_pattern": {"ff.net.2": 5},
    "alpha_pattern": {"ff.net.2": 2, r"^transformer_blocks\.1\.attn\.to_q": 9},
    "init_lora_weights": False,
}
FAMILIES: dict[str, tuple[Any, Any, Callable[[Path], Path]]] = {
    "sd3": (StableDiffusion3, StableDiffusion3Pipeline, tiny.make_pipeline),
    "flux": (Flux, FluxPipeline, tiny_flux.make_pipeline),
    "flux2": (Flux2Klein, Flux2KleinPipeline, tiny_flux2.make_pipeline),
    "z_image": (ZImage, ZImagePipeline, tiny_z_image.make_pipeline),
    "qwen_image": (QwenImage, QwenImagePipeline, tiny_qwen_image.make_pipeline),
}


def make_model(weights: Path, lora: Path | None, **settings: Any) -> StableDiffusion3:
    defaults: dict[str, Any] = {"adaptation": LoRA(rank=4), "resolution": 64, "max_sequence_length": 0, "use_t5": False}
    return StableDiffusion3(**defaults | {"weights": str(weights), "lora": lora and str(lora)} | settings)


def velocity_of_ours(model: StableDiffusion3) -> Tensor:
    with model.sampling():
        return combined(model.velocity(make_latents(), T, model.encode(TEXTS)))


def check_velocity(weights: Path, lora: Path, transformer: nn.Module) -> None:
    """Ours with the LoRA's file is theirs with the LoRA, which is not that of the base model."""
    model = make_model(weights, lora)
    x, conditions = make_latents(), model.encode(TEXTS)
    theirs = velocity_of(transformer, x, conditions)  # type: ignore[arg-type]
    torch.testing.assert_close(velocity_of_ours(model), theirs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(combined(model.velocity(x, T, conditions)).detach(), theirs, atol=2e-5, rtol=1e-5)
    assert (velocity_of_ours(make_model(weights, None)) - theirs).abs().max() > 1e-2


def small(module: nn.Module) -> None:
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.1)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_computes_what_it_does_there(rslora: bool, tiny_weights: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}} if rslora else {}
    adapted = get_peft_model(load_pipeline(tiny_weights).transformer, LoraConfig(**PEFT | patterns, use_rslora=rslora))
    small(adapted)
    # flow_grpo's checkpoints have it in lora/
    adapted.save_pretrained(tmp_path / "lora")
    names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert "base_model.model.pos_embed.proj.lora_A.weight" in names
    for place in (tmp_path, tmp_path / "lora", tmp_path / "lora" / "adapter_model.safetensors"):
        check_velocity(tiny_weights, place, adapted.base_model.model)


def test_an_adapter_of_diffusers_computes_what_it_does_there(tiny_weights: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    written, read = load_pipeline(tiny_weights), load_pipeline(tiny_weights)
    written.transformer.add_adapter(config := LoraConfig(**PEFT))
    small(written.transformer)
    layers = get_peft_model_state_dict(written.transformer)
    metadata = config.to_dict() | {"target_modules": TARGETS}
    # whose adapter it is that is described is said by its prefix; without a description alpha is the rank
    for directory, described in ((tmp_path / "described", metadata), (tmp_path / "not", None)):
        written.save_lora_weights(directory, layers, transformer_lora_adapter_metadata=described)
        read.unload_lora_weights()
        read.load_lora_weights(directory, weight_name="pytorch_lora_weights.safetensors")
        check_velocity(tiny_weights, directory, read.transformer)
    first, second = (velocity_of_ours(make_model(tiny_weights, tmp_path / name)) for name in ("described", "not"))
    assert (first - second).abs().max() > 1e-2


def test_our_own_adapters_are_added_as_they_are_merged(tiny_weights: Path, tmp_path: Path) -> None:
    # a scale of 1/2 is folded into B without rounding
    model = make_model(tiny_weights, None, adaptation=LoRA(rank=5, alpha=2.5))
    train_a_little(model)
    model.save_lora(tmp_path / "lora")
    pipeline = load_pipeline(tiny_weights)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    check_velocity(tiny_weights, tmp_path / "lora", pipeline.transformer)
    assert torch.equal(velocity_of_ours(make_model(tiny_weights, tmp_path)), velocity_of_ours(model))


@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_images_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, pipeline_class, make_pipeline = FAMILIES[name]
    weights, module = make_pipeline(tmp_path / "weights"), {"flux": test_flux, "z_image": test_z_image}[name]
    pipeline = pipeline_class.from_pretrained(weights)
    targets = ["to_q", "ff.net.2", "norm1.linear", "w2", "layers.0.adaLN_modulation.0"]
    pipeline.transformer.add_adapter(config := LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    layers = get_peft_model_state_dict(pipeline.transformer)
    layers = {layer: 0.2 * torch.randn_like(weight) for layer, weight in layers.items()}
    metadata = config.to_dict() | {"target_modules": targets}
    pipeline.save_lora_weights(tmp_path / "lora", layers, transformer_lora_adapter_metadata=metadata)
    base = pipeline_class.from_pretrained(weights)
    before = module.images_of_diffusers(base)
    base.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    theirs = module.images_of_diffusers(base)
    ours = module.images_of_ours(module.make_model(weights, lora=str(tmp_path / "lora")))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (theirs - before).abs().max() > 1e-3


# layers by the names that programs give them, their outputs and inputs: those of the miniatures
KOHYA_FLUX = {
    "lora_unet_double_blocks_1_img_attn_qkv": (96, 32),
    "lora_unet_double_blocks_0_txt_attn_proj": (32, 32),
    "lora_unet_double_blocks_0_img_mlp_2": (32, 128),
    "lora_unet_single_blocks_1_linear2": (32, 160),
}
XLABS = {
    "double_blocks.0.processor.qkv_lora1": (96, 32),
    "double_blocks.1.processor.proj_lora2": (32, 32),
}
KOHYA_Z_IMAGE = {"lora_unet_layers_0_attention_qkv": (144, 48), "lora_unet_layers_1_attention_to_out_0": (48, 48)}
COMFY_Z_IMAGE = {
    "diffusion_model.layers.1.attention.to_k": (48, 48),
    "diffusion_model.noise_refiner.0.feed_forward.w2": (48, 128),
}
FLUX2 = {"diffusion_model.double_blocks.0.img_attn.qkv": (96, 32), "diffusion_model.img_in": (32, 16)}
KOHYA_FLUX2 = {"lora_unet_double_blocks_0_txt_attn_qkv": (96, 32), "lora_unet_double_blocks_0_img_attn_proj": (32, 32)}
KOHYA_QWEN = {"lora_unet_transformer_blocks_0_attn_add_q_proj": (32, 32), "lora_unet_img_in": (32, 64)}
KINDS = {"lora_down": "lora_up", "lora_A": "lora_B", "down": "up"}


@pytest.mark.parametrize(
    ("name", "layers", "kind", "has_alpha"),
    [
        ("flux", KOHYA_FLUX, "lora_down", True),
        ("flux", KOHYA_FLUX, "lora_down", False),
        ("flux", XLABS, "down", False),
        ("z_image", KOHYA_Z_IMAGE, "lora_down", True),
        ("z_image", COMFY_Z_IMAGE, "lora_A", True),
        ("flux2", FLUX2, "lora_A", False),
        ("flux2", KOHYA_FLUX2, "lora_down", True),
        ("qwen_image", KOHYA_QWEN, "lora_down", True),
    ],
)
def test_other_programs_names_are_read_as_diffusers_reads_them(
    name: str, layers: dict[str, tuple[int, int]], kind: str, has_alpha: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model_class, pipeline_class, make_pipeline = FAMILIES[name]
    weights, tensors = make_pipeline(tmp_path / "weights"), {}
    for number, (layer, (num_outputs, num_inputs)) in enumerate(layers.items()):
        rank = 2 + number
        tensors[f"{layer}.{kind}.weight"] = torch.randn(rank, num_inputs)
        tensors[f"{layer}.{KINDS[kind]}.weight"] = torch.randn(num_outputs, rank)
        if has_alpha:
            tensors[f"{layer}.alpha"] = torch.tensor(3.0 + number)
    save_file(tensors, tmp_path / "any_name.safetensors")
    pipeline, base = (pipeline_class.from_pretrained(weights) for _ in range(2))
    pipeline.load_lora_weights(tmp_path, weight_name="any_name.safetensors")
    pipeline.fuse_lora()
    pipeline.transformer.unload_lora()
    settings: dict[str, Any] = {"weights": str(weights), "resolution": 64, "max_sequence_length": 64}
    whole = model_class(**settings, adaptation=FullFineTuning(keep_reference=False), lora=str(tmp_path))
    ours, theirs, before = (one.transformer.state_dict() for one in (whole, pipeline, base))
    changed = [layer for layer in theirs if not torch.equal(theirs[layer], before[layer])]
    assert len(changed) >= len(layers)
    assert [layer for layer in ours if not torch.equal(ours[layer], before[layer])] == changed
    for layer in changed:
        torch.testing.assert_close(ours[layer], theirs[layer], atol=1e-5, rtol=1e-5)


def test_all_alphas_of_flux_are_read_where_diffusers_leaves_them_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tiny_flux.make_pipeline(tmp_path / "weights")
    a_RI, b_OR = torch.randn(4, 32), torch.randn(64, 4)
    stored = {"lora_down.weight": a_RI, "lora_up.weight": b_OR, "alpha": torch.tensor(6.0)}
    path = tmp_path / "lora.safetensors"
    save_file({f"lora_unet_final_layer_linear.{name}": tensor for name, tensor in stored.items()}, path)
    settings: dict[str, Any] = {"weights": str(weights), "resolution": 64, "max_sequence_length": 64}
    adaptation = FullFineTuning(keep_reference=False)
    changed, base = (Flux(**settings, adaptation=adaptation, lora=lora).transformer for lora in (str(path), None))
    torch.testing.assert_close(changed.proj_out.weight - base.proj_out.weight, 1.5 * b_OR @ a_RI, atol=1e-5, rtol=1e-5)


def test_the_sum_is_rounded_once(tiny_weights: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    a_RI, b_OR = torch.randn(4, 32), torch.randn(32, 4)
    tensors = {"lora_A.default.weight": a_RI, "lora_B.default.weight": b_OR, "alpha": torch.tensor(3.0)}
    save_file(
        {f"transformer_blocks.1.attn.to_k.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "a.sft"
    )
    settings: dict[str, Any] = {"adaptation": FullFineTuning(keep_reference=False), "dtype": "bfloat16"}
    base, ours = (
        make_model(tiny_weights, lora, **settings).transformer.transformer_blocks[1].attn.to_k.weight
        for lora in (None, tmp_path / "a.sft")
    )
    exact = (base.double() + 0.75 * b_OR.double() @ a_RI.double()).bfloat16()
    assert ours.dtype == torch.bfloat16
    # to the bit, but for sums that lie on the border of two numbers
    assert (ours != exact).sum() <= 1
    assert (ours != base).sum() > 900


def test_a_lora_of_random_weights_makes_another_model_of_them(tmp_path: Path) -> None:
    models = []
    for scale in (0.0, 1.0):
        factors = {"lora_A.weight": torch.ones(1, 64), "lora_B.weight": torch.full((256, 1), scale)}
        save_file({f"transformer.x_embedder.{name}": factor for name, factor in factors.items()}, tmp_path / "a.sft")
        words = ["model=flux_miniature", "runtime.device=cpu", f"lora={tmp_path / 'a.sft'}"]
        models.append(build_model(with_run(load_config("evaluate", words), words)))
    base, other = (model.transformer.x_embedder.weight for model in models)  # type: ignore[attr-defined]
    torch.testing.assert_close(other - base, torch.ones(256, 64))
    assert models[0].fingerprint != models[1].fingerprint
