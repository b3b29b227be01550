"""What is no LoRA of a model is refused in a line that names the layers, before the model is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo.models.lora import LoRA
from fastgrpo.models.pipeline_files import PipelineFiles
from fastgrpo.models.sd3 import StableDiffusion3

Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PipelineFiles, "load", fail)


def load(weights: Path, lora: Path) -> None:
    settings: dict[str, Any] = {"resolution": 32, "max_sequence_length": 0, "use_t5": False}
    StableDiffusion3(weights=str(weights), adaptation=LoRA(rank=2), lora=str(lora), **settings)


def layer(name: str, num_outputs: int = 32, num_inputs: int = 32, rank: int = 2) -> dict[str, Tensor]:
    return {
        f"{name}.lora_A.weight": torch.ones(rank, num_inputs),
        f"{name}.lora_B.weight": torch.ones(num_outputs, rank),
    }


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            layer(Q) | layer("transformer.single_transformer_blocks.0.proj_mlp") | layer("transformer.x_embedder"),
            "is of another model: a SD3Transformer2DModel lacks 2 of its 3 layers, "
            "transformer.single_transformer_blocks.0.proj_mlp, transformer.x_embedder; give the model that it was",
        ),
        # five of them that the model has not
        (
            layer(Q) | {k: v for i in range(2, 7) for k, v in layer(Q.replace("0", str(i))).items()},
            "lacks 5 of its 6 layers, transformer.transformer_blocks.2.attn.to_q, "
            "transformer.transformer_blocks.3.attn.to_q, transformer.transformer_blocks.4.attn.to_q and 2 more; give",
        ),
        (
            layer(Q, 64, 48) | layer(Q.replace("0", "1")),
            "is of another model: 1 of its 2 layers have other shapes than in a SD3Transformer2DModel, "
            "transformer_blocks.0.attn.to_q [64, 48] and not [32, 32]; give the model that it was trained on",
        ),
        # kohya's, of which diffusers has no converter for this model
        (
            layer("lora_unet_joint_blocks_0_x_block_attn_qkv", 96),
            "a SD3Transformer2DModel lacks 1 of its 1 layers, lora_unet_joint_blocks_0_x_block_attn_qkv; give",
        ),
        (
            layer(Q) | layer("text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
            "changes text encoders too, by text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight, ",
        ),
        (
            layer(Q) | layer("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
            "is taken for a transformer alone; add it by diffusers' load_lora_weights, fuse_lora and save_pretrained",
        ),
        (
            layer(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(32)},
            f"has {Q}.lora_magnitude_vector beside its factors, as DoRA, LoKr, LoHa and trained biases have",
        ),
        (layer(Q) | {f"{Q}.lora_B.bias": torch.ones(32)}, f"has {Q}.lora_B.bias beside its factors"),
        (layer(Q) | {f"{Q}.dora_scale": torch.ones(32)}, f"has {Q}.dora_scale beside its factors"),
        (
            {"transformer_blocks.0.attn.to_q.weight": torch.ones(2, 2)},
            "is no LoRA, it holds transformer_blocks.0.attn.to_q.weight; whole weights are given as model.transformer",
        ),
        ({f"{Q}.lora_A.weight": torch.ones(2, 32)}, f"has of {Q} A [2, 32], not A [R, I] and B [O, R]"),
        (
            layer(Q) | {f"{Q}.lora_A.weight": torch.ones(3, 32)},
            f"has of {Q} A [3, 32], B [32, 2], not A [R, I] and B [O, R]; download it again",
        ),
        ({f"{Q}.lora_A.weight": torch.ones(2), f"{Q}.lora_B.weight": torch.ones(2)}, f"has of {Q} A [2], B [2], not A"),
        (layer(Q) | {f"{Q}.lora_B.weight": torch.ones(32, 2, 3, 3)}, "B [32, 2, 3, 3], not A [R, I] and B [O, R]"),
        (
            layer(Q) | {f"{Q}.lora_B.weight": torch.full((32, 2), torch.nan)},
            f"has numbers of {Q} that are not finite; get one that has not",
        ),
        (layer(Q) | {f"{Q}.alpha": torch.tensor(torch.inf)}, f"has numbers of {Q} that are not finite"),
        (layer(Q) | {f"{Q}.alpha": torch.ones(2)}, f"has no alpha of {Q} (only one element tensors"),
        (layer(Q, rank=0) | {f"{Q}.alpha": torch.tensor(2.0)}, f"has no alpha of {Q} ("),
        (
            layer(Q) | layer("lora_unet_transformer_blocks_0_attn_to_q"),
            f"names a layer in two ways, as lora_unet_transformer_blocks_0_attn_to_q, {Q}; write it anew with one",
        ),
    ],
)
def test_a_file_of_something_else_is_refused(
    tensors: dict[str, Tensor], says: str, tiny_weights: Path, tmp_path: Path
) -> None:
    path = tmp_path / "some.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match="lora: ") as raised:
        load(tiny_weights, path)
    assert f"lora: {path} " in str(raised.value)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"lora_alpha": 2, "use_dora": True},
            "is DoRA, more than a product added to weights; merge it with peft first",
        ),
        (
            {"lora_alpha": 2, "init_lora_weights": "pissa_niter_4"},
            "init_lora_weights pissa_niter_4, more than a product",
        ),
        ({"peft_type": "IA3"}, "of peft_type IA3, init_lora_weights None, more than a product"),
        ({"lora_alpha": "high"}, "has no alpha of base_model.model.transformer_blocks.0.attn.to_q (could not convert"),
        (
            {"lora_alpha": 2, "alpha_pattern": {"(": 3}},
            "has no alpha of base_model.model.transformer_blocks.0.attn.to_q",
        ),
        ({"lora_alpha": 2, "alpha_pattern": [3]}, "has no alpha of base_model.model.transformer_blocks.0.attn.to_q"),
        (None, "adapter_config.json is missing; it has the alpha: copy it there"),
    ],
)
def test_an_adapter_of_peft_that_is_more_or_less_is_refused(
    config: dict[str, Any] | None, says: str, tiny_weights: Path, tmp_path: Path
) -> None:
    save_file(layer("base_model.model.transformer_blocks.0.attn.to_q"), tmp_path / "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lora: ") as raised:
        load(tiny_weights, tmp_path)
    assert says in str(raised.value)


def test_metadata_that_cannot_be_read_is_refused(tiny_weights: Path, tmp_path: Path) -> None:
    save_file(layer(Q), tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": "{'r': 2}"})
    with pytest.raises(ValueError, match=r"a\.safetensors has metadata that cannot be read \(.*\); write it anew"):
        load(tiny_weights, tmp_path)


@pytest.mark.parametrize(
    ("names", "given", "says"),
    [
        ([], "none", r"lora=.*none is not here \(.*none\); give a directory or a \.safetensors file"),
        ([], "", r"has neither pytorch_lora_weights\.safetensors nor adapter_model\.safetensors; give a directory"),
        (
            ["a.safetensors", "b.safetensors"],
            "",
            r"has a\.safetensors, b\.safetensors; give one of them, lora=.*a\.safet",
        ),
        (
            ["adapter_model.bin"],
            "",
            r"adapter_model\.bin is no \.safetensors file, and a pickle can run code; write its",
        ),
        (["lora.pt"], "lora.pt", r"save_file\(torch\.load\('.*lora\.pt', weights_only=True\), '.*lora\.safetensors'\)"),
        (["a.safetensors"], "", r"lora: .*a\.safetensors, 0 bytes, is damaged or cut short"),
    ],
)
def test_places_without_one_file_are_refused(
    names: list[str], given: str, says: str, tiny_weights: Path, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=says):
        load(tiny_weights, tmp_path / given)
