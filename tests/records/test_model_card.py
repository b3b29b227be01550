"""generate.py and the model card beside weights: in each family diffusers draws by them what the model draws."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline
from torch import Tensor

from fastgrpo.algorithm.schedule import LinearSchedule
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.diffusers_call import DiffusersCall
from fastgrpo.models.lora import LoRA
from fastgrpo.records.model_card import ModelCard
from fastgrpo.sampler import Sampler
from fastgrpo.types import Prompts, Samples
from tests.models import test_flux
from tests.models.test_lora_writing import FAMILIES, TARGETS

TEXT = "a red circle"
# not those of any pipeline's scheduler
TIMES = LinearSchedule(3, 1.7)()
PACK: dict[str, Callable[[Tensor], Tensor]] = {
    "flux": lambda x: FluxPipeline._pack_latents(x, *x.shape),
    "qwen_image": lambda x: QwenImagePipeline._pack_latents(x, *x.shape),
}


def images_of_ours(model: Any, start: Tensor) -> Tensor:
    sampler = Sampler(model=model, grid=TIMES, batch_sizes=BatchSizes.of(1))
    return sampler(Samples.all_of(Prompts([TEXT], ids=[0]), 1), model.encode([TEXT]), start)


def card_of(model: Any, **config: Any) -> ModelCard:
    return ModelCard(call=model.diffusers_call, times=TIMES, prompt=TEXT, config=config, iteration=7)


def images_of_script(script: Path, start: Tensor) -> Tensor:
    names = runpy.run_path(str(script))
    pipeline = names["load"]()
    pipeline.set_progress_bar_config(disable=True)
    images: Tensor = names["draw"](pipeline, TEXT, latents=start, output_type="pt")
    return images


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "without guidance"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_script_draws_what_the_model_draws(name: str, guided: bool, tmp_path: Path) -> None:
    family = FAMILIES[name]
    weights = family.make_pipeline(tmp_path / "weights")
    settings: dict[str, Any] = {"guidance_scale": 3.0 if guided else 1.0}
    model = family.make_model(weights, adaptation=LoRA(rank=4, alpha=6.0, targets=TARGETS[name]), **settings)
    test_flux.nudge(model.trainable)
    start = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    model.save_lora(tmp_path / "lora")
    card = card_of(model)
    card.write(tmp_path / "lora", is_lora=True)
    ours = images_of_ours(model, start)
    packed = PACK.get(name, lambda x: x)(start)
    theirs = images_of_script(tmp_path / "lora" / "generate.py", packed)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert (images_of_ours(family.make_model(weights, **settings), start) - ours).abs().max() > 1e-3
    if guided:
        model.save_merged(tmp_path / "merged")
        card.write(tmp_path / "merged", is_lora=False)
        torch.testing.assert_close(
            images_of_script(tmp_path / "merged" / "generate.py", packed), ours, atol=1e-4, rtol=0
        )


def test_a_t5_that_is_left_out_is_not_loaded_there_either(tmp_path: Path) -> None:
    weights = FAMILIES["sd3"].make_pipeline(tmp_path / "weights")
    index = json.loads((weights / "model_index.json").read_text())
    index |= {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    (weights / "model_index.json").write_text(json.dumps(index))
    model = FAMILIES["sd3"].make_model(weights)
    assert model.diffusers_call.absent == ["text_encoder_3", "tokenizer_3"]
    model.save_lora(tmp_path / "lora")
    assert not model.diffusers_call.is_changed
    assert FAMILIES["sd3"].make_model(weights, lora=str(tmp_path / "lora")).diffusers_call.is_changed


def call_of(**settings: Any) -> DiffusersCall:
    defaults: dict[str, Any] = {
        "pipeline": "FluxPipeline",
        "weights": "owner/name@v2",
        "variant": None,
        "absent": (),
        "dtype": "bfloat16",
        "decode_dtype": "bfloat16",
        "arguments": {"height": 64},
        "takes_times": True,
        "is_changed": False,
        "comfyui_knows": True,
    }
    return DiffusersCall(**defaults | settings)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, 'pipeline = FluxPipeline.from_pretrained("owner/name", revision="v2", dtype=torch.bfloat16)'),
        (
            {"weights": "a/b", "variant": "fp16", "absent": ["t"]},
            'pipeline = FluxPipeline.from_pretrained("a/b", variant="fp16", dtype=torch.bfloat16, t=None)',
        ),
        (
            {"weights": "a/b", "decode_dtype": "float32"},
            'pipeline = FluxPipeline.from_pretrained(\n    "a/b",\n    dtype={"default": torch.bfloat16, "vae": '
            "torch.float32},\n)",
        ),
    ],
)
def test_weights_are_found_where_the_model_has_them(settings: dict[str, Any], line: str) -> None:
    assert line in "\n".join(call_of(**settings).loading())


def test_a_pipeline_that_takes_no_times_has_its_own_and_all_of_it_can_be_pasted() -> None:
    lines = call_of(takes_times=False, weights="a/b").pasted((1.0, 0.5, 0.0), 'a "b"', lora='"x"')
    assert lines == (
        "import torch\nfrom diffusers import FluxPipeline\n\n"
        'pipeline = FluxPipeline.from_pretrained("a/b", dtype=torch.bfloat16)\n'
        'pipeline.load_lora_weights("x", weight_name="pytorch_lora_weights.safetensors")\n'
        'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")\n\n'
        'images = pipeline(prompt="a \\"b\\"", num_inference_steps=2, height=64).images\nimages[0].save("image.png")'
    )


def test_the_card_says_base_recipe_and_files(tmp_path: Path) -> None:
    config = {
        "name": "kites",
        "algorithm": {"objective": {"_target_": "a.NFT"}},
        "reward": {"weights": {"pick_score": 1.0, "ocr": 0.5}},
        "train": {"iterations": 9, "prompts_per_iteration": 2, "group_size": 3, "learning_rate": 1e-4},
        "adaptation": {"_target_": "a.LoRA", "rank": 4, "alpha": 8.0, "start": "old"},
        "model": {"resolution": 64, "guidance_scale": 1.0},
        "prompts": {"path": "/home/me/prompts.txt"},
        "seed": 1,
    }
    card = ModelCard(call=call_of(), times=TIMES, prompt=TEXT, config=config, iteration=7)
    card.write(tmp_path, is_lora=True)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nbase_model: owner/name\nlibrary_name: diffusers\n")
    assert "# kites: a LoRA, trained from owner/name\n" in text
    for row in (
        "objective | NFT",
        "reward | 1 pick_score, 0.5 ocr",
        "iterations | 7, of 2 prompts, 3 images of each",
        "adaptation | LoRA, rank 4, alpha 8.0, started from old",
        "prompts | prompts.txt",
    ):
        assert f"| {row} |\n" in text
    headings = re.findall(r"^## (\w+)$", text, flags=re.MULTILINE)
    assert headings == ["diffusers", "ComfyUI", "peft", "fastgrpo", "Files", "Licence"]
    # where the files are is nobody's business
    assert str(tmp_path) not in text


def test_a_lora_of_a_changed_transformer_has_no_script_and_a_merged_pipeline_has(tmp_path: Path) -> None:
    call = call_of(is_changed=True, comfyui_knows=False)
    card = ModelCard(call=call, times=TIMES, prompt=TEXT, config={})
    for name in ("lora", "merged"):
        (tmp_path / name).mkdir()
        card.write(tmp_path / name, is_lora=name == "lora")
    text = (tmp_path / "lora" / "README.md").read_text()
    assert "trained on another transformer than the pipeline's (model.transformer or model.lora)" in text
    assert "ComfyUI/models" not in text
    assert not (tmp_path / "lora" / "generate.py").exists()
    assert (tmp_path / "merged" / "generate.py").is_file()
