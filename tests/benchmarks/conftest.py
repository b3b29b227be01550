"""A model so small that both sides run an iteration in a second, and a stand-in for a checkout of flow_grpo."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.flow_grpo.checkout import Checkout
from benchmarks.flow_grpo.pipeline import MINIATURE, Size, make_pipeline
from benchmarks.flow_grpo.recipe import Job
from fastgrpo.shapes.captions import training_captions


@pytest.fixture(scope="session")
def tiny_size() -> Size:
    return replace(MINIATURE, resolution=32, num_layers=2, num_dual_layers=1, num_heads=1)


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_size: Size) -> Job:
    """The full recipe on that model, 2 prompts an iteration."""
    directory = tmp_path_factory.mktemp("flow_grpo")
    prompts = directory / "prompts.txt"
    prompts.write_text("\n".join(map(str, training_captions())))
    pipeline = make_pipeline(directory / "pipeline", tiny_size, "cpu")
    return Job(
        recipe="full", pipeline=str(pipeline), size=tiny_size, prompts=str(prompts), batches=2, device="cpu", threads=1
    )


@pytest.fixture
def stand_in() -> Iterator[Checkout]:
    """Its modules are forgotten afterwards: another checkout has modules of the same names."""
    checkout = Checkout(Path(__file__).parent / "flow_grpo_stand_in")
    yield checkout
    for name in [name for name in sys.modules if name.split(".")[0] == "flow_grpo"]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path != str(checkout.path)]
