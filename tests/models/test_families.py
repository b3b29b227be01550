"""Which pipelines of diffusers can be loaded as which, by their exact names, and what is said of all others."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from fastgrpo.config import load_config
from fastgrpo.models.families import FAMILIES, Family, has_parts_of, of_weights
from fastgrpo.models.transformer_weights import transformer_class_of
from fastgrpo.models.weights import pipeline_directory
from fastgrpo.pieces import find_target
from tests.models.test_weights import load_model

by_model = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model)


@pytest.fixture
def copy(tiny_weights: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_weights, tmp_path / "copy")


def rewrite(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def parts_of(pipeline: str) -> dict[str, Any]:
    # a part that may be left out is written with and without its None
    types = getattr(diffusers, pipeline)._get_signature_types()
    return {name: {str(kind) for kind in kinds if kind is not type(None)} for name, kinds in types.items()}


@by_model
def test_diffusers_gives_a_family_one_transformer_and_its_other_pipelines_the_same_parts(family: Family) -> None:
    assert transformer_class_of(getattr(diffusers, family.pipeline)).__name__ == family.transformer
    for other in family.same_parts:
        assert parts_of(other) == parts_of(family.pipeline)


@by_model
def test_the_weights_of_a_transformer_mark_its_family_and_no_other(family: Family) -> None:
    with torch.device("meta"):
        weights = getattr(diffusers, family.transformer)().state_dict()
    assert [other for other in FAMILIES if any(mark in weights for mark in other.marks)] == [family]
    assert of_weights(weights) is family
    # that of the original layout alone
    assert of_weights(family.marks[-1:]) is family
    assert of_weights(["text_model.embeddings.weight"]) is None


@by_model
def test_model_names_a_config_of_that_pipeline(family: Family) -> None:
    if not (Path(__file__).parents[2] / "configs" / "model" / f"{family.model}.yaml").is_file():
        pytest.skip(f"there is no model={family.model} yet")
    config = load_config("train", [f"model={family.model}"])
    assert find_target(config.model._target_, "model").pipeline_class.__name__ == family.pipeline


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("Flux2KleinPipeline", "FluxPipeline"),
        ("FluxKontextPipeline", "FluxPipeline"),
        ("FluxFillPipeline", "FluxPipeline"),
        ("QwenImage21Pipeline", "QwenImagePipeline"),
        ("QwenImageEditPipeline", "QwenImagePipeline"),
        ("QwenImagePipeline", "QwenImage21Pipeline"),
        ("ZImageOmniPipeline", "ZImagePipeline"),
        ("StableDiffusion3ControlNetPipeline", "StableDiffusion3Pipeline"),
        ("None", "StableDiffusion3Pipeline"),
    ],
)
def test_a_name_that_begins_alike_is_another_pipeline(found: str, wanted: str) -> None:
    assert not has_parts_of(found, wanted)
    assert has_parts_of(wanted, wanted)


def test_a_class_of_none_of_the_families_takes_itself_alone() -> None:
    assert has_parts_of("SanaPipeline", "SanaPipeline")
    assert not has_parts_of("SanaSprintPipeline", "SanaPipeline")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ("FluxPipeline", "take model=flux_dev"),
        ("FluxImg2ImgPipeline", "take model=flux_dev"),
        ("ZImagePipeline", "take model=z_image"),
        ("QwenImagePipeline", "take model=qwen_image"),
        ("QwenImage21Pipeline", "take model=qwen_image_21"),
        ("Flux2KleinPipeline", "take model=flux2_klein"),
        ("QwenImageEditPipeline", "it edits images, and here text becomes images: give the weights of a Stable"),
        ("FluxKontextPipeline", "it edits images, and here text becomes images: give the weights of a Stable"),
        (
            "SanaPipeline",
            "give the weights of one that can be trained here: StableDiffusion3Pipeline (model=sd35",
        ),
    ],
)
def test_a_pipeline_of_another_family_is_refused_and_says_where_it_goes(found: str, says: str, copy: Path) -> None:
    rewrite(copy / "model_index.json", _class_name=found)
    with pytest.raises(ValueError, match=r"model_index\.json is of a") as raised:
        load_model(copy)
    assert f"model_index.json is of a {found}, not of a StableDiffusion3Pipeline; {says}" in str(raised.value)


def test_a_pipeline_for_another_task_with_the_same_parts_is_taken(copy: Path) -> None:
    rewrite(copy / "model_index.json", _class_name="StableDiffusion3Img2ImgPipeline")
    assert pipeline_directory(StableDiffusion3Pipeline, str(copy)) == copy
    with pytest.raises(ValueError, match=r"not of a FluxPipeline; take model=sd35_medium"):
        pipeline_directory(FluxPipeline, str(copy))


def test_a_transformer_of_another_family_is_refused(copy: Path) -> None:
    path = copy / "transformer" / "config.json"
    rewrite(path, _class_name="FluxTransformer2DModel")
    says = f"{path} is of a FluxTransformer2DModel, not of a SD3Transformer2DModel; take model=flux_dev for it"
    with pytest.raises(ValueError, match="SD3Transformer2DModel") as raised:
        load_model(copy)
    assert str(raised.value) == f"model.weights: {says}"
    rewrite(path, _class_name="DiTTransformer2DModel")
    with pytest.raises(ValueError, match=r"of a DiTTransformer2DModel, not of .*; give the weights of another model"):
        load_model(copy)
