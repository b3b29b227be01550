"""A CLIP's weights in open_clip's names and layout, as transformers' CLIPModel wants them.

attn.in_proj      the three projections stacked -> q_proj, k_proj, v_proj
proj              [width, D], multiplied from the right -> a linear layer's [D, width]
"""

from collections.abc import Mapping

from torch import Tensor
from transformers import CLIPConfig

_TOWERS = {"visual.": "vision_model.", "": "text_model."}
_OF_TOWER = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    **{
        f"{theirs}.{part}": f"{ours}.{part}"
        for theirs, ours in {
            "ln_pre": "pre_layrnorm",
            "ln_post": "post_layernorm",
            "ln_final": "final_layer_norm",
        }.items()
        for part in ("weight", "bias")
    },
}
_OF_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under transformers' names; a name that open_clip's CLIP does not have stays as it is."""
    renamed = {}
    for name, weight in weights.items():
        renamed.update(_rename(name, weight))
    return renamed


def _rename(name: str, weight: Tensor) -> dict[str, Tensor]:
    if name in ("visual.proj", "text_projection"):
        ours = "visual_projection" if name == "visual.proj" else "text_projection"
        return {f"{ours}.weight": weight.mT.contiguous()}
    theirs, ours = next(item for item in _TOWERS.items() if name.startswith(item[0]))
    rest = name.removeprefix(theirs)
    if rest in _OF_TOWER:
        return {ours + _OF_TOWER[rest]: weight}
    if not rest.startswith("transformer.resblocks."):
        return {name: weight}
    layer, _, part = rest.removeprefix("transformer.resblocks.").partition(".")
    block = f"{ours}encoder.layers.{layer}."
    if part.startswith("attn.in_proj_"):
        projections = zip("qkv", weight.chunk(3), strict=True)
        return {f"{block}self_attn.{letter}_proj.{part[13:]}": one.contiguous() for letter, one in projections}
    module, _, kind = part.rpartition(".")
    return {f"{block}{_OF_BLOCK[module]}.{kind}" if module in _OF_BLOCK else name: weight}


def config_of(weights: Mapping[str, Tensor], num_heads: int) -> CLIPConfig:
    """The sizes of open_clip's ``weights``, with exact GELU; both towers have ``num_heads``, which no shape tells.

    KeyError for what is not open_clip's.
    """
    width, _, patch, _ = weights["visual.conv1.weight"].shape
    text_width, embedding = weights["text_projection"].shape
    vocabulary = len(weights["token_embedding.weight"])
    num_patches = len(weights["visual.positional_embedding"]) - 1
    shared = {"num_attention_heads": num_heads, "hidden_act": "gelu", "projection_dim": embedding}
    text = {
        "hidden_size": text_width,
        "intermediate_size": len(weights["transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": _num_layers(weights, "transformer.resblocks."),
        "max_position_embeddings": len(weights["positional_embedding"]),
        "vocab_size": vocabulary,
        # open_clip's two last tokens
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": len(weights["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": _num_layers(weights, "visual.transformer.resblocks."),
        "image_size": patch * round(num_patches**0.5),
        "patch_size": patch,
    }
    return CLIPConfig(text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=embedding)


def _num_layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})
