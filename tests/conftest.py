"""Settings of every test: one thread, no network, kernels in Triton's interpreter where there is no GPU."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# oversubscribed threads make a small forward 15 times slower; both must be set before torch is imported
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# a test compiles a graph or two: processes that wait to compile more cost more than they give
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)
# importing torch does not import triton, which reads this once
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where there is no GPU, one skipped item stands for all cases of a test that need one."""
    if torch.cuda.is_available():
        return
    # the first case of each test
    kept: dict[str, pytest.Item] = {}
    left_out = set()
    for item in items:
        if item.get_closest_marker("gpu") and kept.setdefault(item.nodeid.partition("[")[0], item) is not item:
            left_out.add(item)
    for item in kept.values():
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def float32_is_exact() -> Iterator[None]:
    """No TF32 on a GPU.  monkeypatch cannot do this: PyTorch's flags are no attributes that could be deleted again."""
    flags: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


@pytest.fixture
def numerics_are_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``fastgrpo.numerics`` and a test of it set for the process is as before afterwards."""
    # put back also where the code under test sets it
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    flags: Any = torch.utils.deterministic
    cudnn, filling = torch.backends.cudnn.deterministic, flags.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, flags.fill_uninitialized_memory = cudnn, filling


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a pipeline in miniature with random weights."""
    from tests.tiny import make_pipeline

    return make_pipeline(tmp_path_factory.mktemp("weights") / "tiny")
