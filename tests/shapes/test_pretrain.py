"""The embedded model's recipe in miniature, through the stages that made the shipped weights."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastgrpo.shapes
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.shapes.pretrain.__main__ import pretrain
from fastgrpo.shapes.pretrain.recipe import Recipe
from fastgrpo.shapes.pretrain.tokenizer import train_tokenizer
from fastgrpo_kernels import combined

SHIPPED = Path(fastgrpo.shapes.__file__).parent / "checkpoint"


MINIATURE = Recipe(
    autoencoder_steps=2,
    transformer_cycles=(1, 1),
    scorer_steps=1,
    num_scenes=128,
    num_decoded=512,
    estimate_decoder_steps=1,
)


def weights(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained")
    pretrain(out, MINIATURE)
    return out


@pytest.mark.slow
def test_the_weights_are_a_function_of_the_seed(pretrained, tmp_path):
    # another process, with another order of sets, and by the documented command
    words = ["--autoencoder-steps=2", "--transformer-cycles", "1", "1", "--scorer-steps=1", "--num-scenes=128"]
    words += ["--num-decoded=512", "--estimate-decoder-steps=1"]
    subprocess.run(
        [sys.executable, "-m", "fastgrpo.shapes.pretrain", f"--out={tmp_path / 'again'}", *words],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    pretrain(tmp_path / "other", replace(MINIATURE, seed=1))
    first, again, other = (weights(path) for path in (pretrained, tmp_path / "again", tmp_path / "other"))
    assert len(first) == 6
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_the_small_decoder_is_a_function_of_the_pipeline_beside_it(pretrained, tmp_path):
    directory = shutil.copytree(pretrained, tmp_path / "again", ignore=shutil.ignore_patterns("estimate_decoder"))
    words = ["--num-decoded=512", "--estimate-decoder-steps=1", "--estimate-decoder-alone"]
    subprocess.run([sys.executable, "-m", "fastgrpo.shapes.pretrain", f"--out={directory}", *words], check=True)
    assert weights(directory) == weights(pretrained)


def test_it_writes_the_files_that_are_shipped(pretrained):
    def files(directory: Path) -> dict[str, Path]:
        return {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}

    ours, shipped = files(pretrained), files(SHIPPED)
    assert ours.keys() == shipped.keys()
    for name in ours:
        # sizes too: the recipe in miniature has fewer steps, not smaller networks
        assert ours[name].stat().st_size == pytest.approx(shipped[name].stat().st_size, abs=64), name


def test_the_adapter_of_sd3_loads_and_runs_it(pretrained):
    model = StableDiffusion3(
        weights=str(pretrained), adaptation=LoRA(rank=4), resolution=64, use_t5=False, max_sequence_length=0
    )
    conditions = model.encode(["a red circle"])
    x_BCHW = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v_BCHW = combined(model.velocity(x_BCHW, 1.0, conditions))
        images_BCHW = model.decode(x_BCHW - v_BCHW)
    assert v_BCHW.shape == x_BCHW.shape
    assert v_BCHW.std() > 0
    assert images_BCHW.shape == (1, 3, 64, 64)
    assert images_BCHW.min() >= 0
    assert images_BCHW.max() <= 1


def test_the_shipped_tokenizer_is_the_recipes():
    shipped = StableDiffusion3(weights=str(SHIPPED), adaptation=LoRA(rank=4), resolution=64, use_t5=False)
    ours = train_tokenizer()
    assert shipped.pipeline.tokenizer.get_vocab() == ours.get_vocab()
    text = "two green squares above a yellow triangle"
    assert shipped.pipeline.tokenizer(text).input_ids == ours(text).input_ids
    assert len(ours(text).input_ids) == 2 + len(text.split())
