"""Every family of models in miniature by every recipe: an iteration by one process and by two, and a resumed run."""

from pathlib import Path

import pytest
import torch

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.composing import config_groups
from fastgrpo.config import load_config
from fastgrpo.distributed.world import World
from fastgrpo.models.families import FAMILIES
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.pieces import build, find_target
from tests.checkpoints.test_resume_ranks import final_tensors, run_to
from tests.ranks import Ranks, ranks_of_module
from tests.tiny_config import make_overrides

GROUPS = config_groups("train")
MINIATURES = [name for name in GROUPS["model"] if name.endswith("_miniature")]
RECIPES = GROUPS["algorithm"]
# one that learns from steps, with guidance, and one that learns from images
QUICK = ("flow_grpo_fast", "nft")
# which of a window's steps are trained, of the few that there are here
WINDOWS = {
    "mix_grpo": ["algorithm.timesteps.size=2"],
    "flow_grpo_fast": ["algorithm.timesteps.size=2", "algorithm.timesteps.high=3"],
    "smart_grpo": ["algorithm.timesteps.size=2", "algorithm.timesteps.high=3"],
}

on_ranks = ranks_of_module()
every_recipe = pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RECIPES]
)


def config_of(model: str, recipe: str, directory: Path) -> list[str]:
    # in double precision, where it is no matter how samples are batched
    words = [f"model={model}", f"algorithm={recipe}", "algorithm.schedule.num_steps=4", "model.resolution=64"]
    words += [*WINDOWS.get(recipe, []), "model.dtype=float64", "model.decode_dtype=float64", "checkpoint.every=1"]
    algorithm: Algorithm = build(load_config("train", words).algorithm)
    # a loss on images is of one velocity, that of the text
    words += ["model.guidance_scale=1", "train.updates=2"] if algorithm.learns_from_images else []
    return make_overrides(Path("random"), directory / "run", *words, "resume=true")


def test_each_family_has_a_miniature_and_published_sizes() -> None:
    classes = {name: load_config("train", [f"model={name}"]).model._target_ for name in MINIATURES}
    assert len(set(classes.values())) == len(FAMILIES) == len(MINIATURES)
    for family in FAMILIES:
        target = load_config("train", [f"model={family.model}"]).model._target_
        assert target in classes.values()
        found: type[PipelineModel] = find_target(target, "model")
        assert found.pipeline_class.__name__ == family.pipeline
        assert found.transformer_class.__name__ == family.transformer


@every_recipe
@pytest.mark.parametrize("model", MINIATURES)
def test_two_ranks_train_as_one_process_does(model: str, recipe: str, tmp_path: Path, on_ranks: Ranks) -> None:
    config = load_config("train", config_of(model, recipe, tmp_path))
    run_to(World(), config, tmp_path / "alone", 1)
    on_ranks(2, run_to, config, tmp_path / "run", 1)
    expected, found = final_tensors(tmp_path / "alone"), final_tensors(tmp_path / "run")
    assert expected.keys() == found.keys()
    moved = [name for name, tensor in expected.items() if name.endswith("lora_B.weight") and tensor.any()]
    assert moved
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("recipe", QUICK)
@pytest.mark.parametrize("model", MINIATURES)
def test_a_run_goes_on_bit_for_bit(model: str, recipe: str, tmp_path: Path) -> None:
    config = load_config("train", config_of(model, recipe, tmp_path))
    run_to(World(), config, tmp_path / "alone", 2)
    for iteration in (1, 2):
        run_to(World(), config, tmp_path / "run", iteration)
    expected, found = final_tensors(tmp_path / "alone"), final_tensors(tmp_path / "run")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
