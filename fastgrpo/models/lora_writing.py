"""A trained LoRA in the files of those who draw with it, each of which takes it at its full strength.

    pytorch_lora_weights.safetensors   transformer.LAYER.lora_A.weight          diffusers, and ComfyUI
    adapter_model.safetensors          base_model.model.LAYER.lora_A.weight     peft, with adapter_config.json

A reader multiplies B A by alpha / rank, and looks for alpha in a file's metadata, beside it, or nowhere, which means
alpha = rank.  So alpha is the rank, and B is what was trained times alpha / rank: rounded once, and not at all where
that is a power of two, as it is by default.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

DIFFUSERS_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)


def write_lora(
    directory: Path, pipeline: Any, factors: Mapping[str, Tensor], lora_config: Mapping[str, Any], base_model: str
) -> None:
    """Write ``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight`` of a pipeline's transformer, all of them of one rank.

    lora_config: peft's r, lora_alpha and target_modules, as they were trained.  base_model: what peft is told of it.
    """
    rank = lora_config["r"]
    scale = lora_config["lora_alpha"] / rank
    folded = {
        name: (scale * factor.detach() if name.endswith(".lora_B.weight") else factor.detach()).cpu().contiguous()
        for name, factor in factors.items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    # the prefix of a pipeline's transformer is the pipeline's to say
    pipeline.save_lora_weights(directory, transformer_lora_layers=folded, weight_name=DIFFUSERS_FILE)
    save_file(
        {f"base_model.model.{name}": factor for name, factor in folded.items()},
        directory / PEFT_FILE,
        metadata={"format": "pt"},
    )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    # of a list it would make a set, which is written in another order each time
    config.target_modules = sorted(lora_config["target_modules"])
    config.save_pretrained(str(directory))
