"""A LoRA as ComfyUI reads it, written anew from its rules of names (comfy/lora.py, comfy/utils.py).

It knows the layout of a model's authors, in which queries, keys and values are rows of one weight.  A key of a file is
that of a layer with ``transformer.`` before diffusers' name of it; what it knows no such layer of, it leaves out and
warns.  To the weight it adds alpha / rank * up @ down, where alpha is a tensor beside the two; without one, up @ down.
"""

import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

_QKV = {"to_q": 0, "to_k": 1, "to_v": 2}
_ADDED = {"add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}
# by family: what is before a layer's number, in both layouts, and the layers in it that are weights of their own
_SD3 = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
_Z_IMAGE = {"attention.to_out.0": "attention.out"} | {f"feed_forward.w{n}": f"feed_forward.w{n}" for n in (1, 2, 3)}


def place_of(family: str, layer: str) -> tuple[str, int]:
    """The weight that a layer of diffusers is in, and the number of its rows' part; KeyError if ComfyUI knows none."""
    if family == "qwen_image":
        return layer, 0
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)
    assert match is not None
    blocks, number, inside = match.groups()
    part, name = inside.rpartition(".")[0], inside.rpartition(".")[2]
    if family == "sd3":
        if part == "attn" and name in _QKV | _ADDED:
            stream = "x_block" if name in _QKV else "context_block"
            return f"joint_blocks.{number}.{stream}.attn.qkv", (_QKV | _ADDED)[name]
        return f"joint_blocks.{number}.{_SD3[inside]}", 0
    if family == "z_image":
        if part == "attention" and name in _QKV:
            return f"{blocks}.{number}.attention.qkv", _QKV[name]
        return f"{blocks}.{number}.{_Z_IMAGE[inside]}", 0
    if blocks == "transformer_blocks":
        if part == "attn" and name in _QKV | _ADDED:
            stream = "img" if name in _QKV else "txt"
            return f"double_blocks.{number}.{stream}_attn.qkv", (_QKV | _ADDED)[name]
        return f"double_blocks.{number}.{_DOUBLE[inside]}", 0
    # of FLUX.1 queries, keys, values and the feed-forward's first layer are rows of one
    if part == "attn" and name in _QKV:
        return f"single_blocks.{number}.linear1", _QKV[name]
    return f"single_blocks.{number}.{_SINGLE[inside]}", 0


def add_lora(family: str, transformer: nn.Module, file: Path) -> list[str]:
    """Add a file to diffusers' transformer as ComfyUI adds it to its own; the keys that it leaves out."""
    tensors, read, places = load_file(file), set(), set()
    for name, layer in transformer.named_modules():
        key = f"transformer.{name}"
        up, down, alpha = (tensors.get(f"{key}.{part}") for part in ("lora_B.weight", "lora_A.weight", "alpha"))
        if up is None or down is None or not isinstance(layer, nn.Linear):
            continue
        try:
            place = place_of(family, name)
        except KeyError:
            continue
        # two layers in the same rows would be one
        assert place not in places
        places.add(place)
        read |= {f"{key}.lora_B.weight", f"{key}.lora_A.weight", f"{key}.alpha"}
        strength = 1.0 if alpha is None else alpha.item() / len(down)
        difference: Tensor = strength * (up @ down)
        layer.weight.data += difference
    return sorted(tensors.keys() - read)
