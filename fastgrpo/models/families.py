"""The families of models that are trained here: by which class of diffusers, and by which weights, one is known.

Names of pipelines cannot be told apart by how they begin: Flux2KleinPipeline is no FluxPipeline.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """One class of pipeline of diffusers, by its name.

    model: what ``model=`` takes for it.  same_parts: pipelines for other tasks with exactly its parts and weights.
    transformer: the class of its transformer.  marks: weights that of all families only its transformer has, in
        diffusers' layout and in that of the original.
    """

    model: str
    pipeline: str
    same_parts: tuple[str, ...] = ()
    transformer: str
    marks: tuple[str, ...]


FAMILIES = (
    Family(
        model="sd35_medium",
        pipeline="StableDiffusion3Pipeline",
        same_parts=("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        transformer="SD3Transformer2DModel",
        marks=("pos_embed.pos_embed", "joint_blocks.0.x_block.attn.qkv.weight"),
    ),
    Family(
        model="flux_dev",
        pipeline="FluxPipeline",
        # FluxKontextPipeline has these parts too, and weights that edit
        same_parts=("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
        transformer="FluxTransformer2DModel",
        marks=("single_transformer_blocks.0.norm.linear.weight", "double_blocks.0.img_mod.lin.weight"),
    ),
    Family(
        model="z_image",
        pipeline="ZImagePipeline",
        same_parts=("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
        transformer="ZImageTransformer2DModel",
        marks=("cap_pad_token",),
    ),
    Family(
        model="qwen_image",
        pipeline="QwenImagePipeline",
        same_parts=("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
        transformer="QwenImageTransformer2DModel",
        marks=("txt_norm.weight",),
    ),
    Family(
        model="qwen_image_21",
        pipeline="QwenImage21Pipeline",
        transformer="QwenImage21Transformer2DModel",
        marks=("txt_in.text_norm.weight",),
    ),
    Family(
        model="flux2_klein",
        pipeline="Flux2KleinPipeline",
        same_parts=("Flux2KleinInpaintPipeline",),
        transformer="Flux2Transformer2DModel",
        marks=("single_stream_modulation.linear.weight", "single_stream_modulation.lin.weight"),
    ),
)
_EDITING = ("Edit", "Kontext", "Layered")


def has_parts_of(found: str, wanted: str) -> bool:
    """Whether what was saved as a pipeline of the class ``found`` can be loaded as one of the class ``wanted``."""
    family = _of_pipeline(wanted)
    return found == wanted or (family is not None and found in family.same_parts)


def where_it_goes(found: str, wanted: str) -> str:
    """What to do with a pipeline of the class ``found`` where one of the class ``wanted`` is needed."""
    if family := _of_pipeline(found):
        return f"take model={family.model}"
    if any(word in found for word in _EDITING):
        return f"it edits images, and here text becomes images: give the weights of a {wanted}"
    known = ", ".join(f"{family.pipeline} (model={family.model})" for family in FAMILIES)
    return f"give the weights of one that can be trained here: {known}"


def of_weights(names: Collection[str]) -> Family | None:
    """The family of a transformer by the names of its weights, in either layout."""
    return next((family for family in FAMILIES if any(mark in names for mark in family.marks)), None)


def of_transformer(name: str) -> Family | None:
    """The family of a transformer by its class."""
    return next((family for family in FAMILIES if family.transformer == name), None)


def _of_pipeline(name: str) -> Family | None:
    return next((family for family in FAMILIES if name == family.pipeline or name in family.same_parts), None)
