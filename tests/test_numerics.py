"""How exactly a process computes is decided in one place, which every way to a run passes."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastgrpo.config import load_config
from fastgrpo.numerics import set_numerics
from fastgrpo.parts import build_model, build_rewards
from fastgrpo.training import train
from tests.tiny_config import make_config

pytestmark = pytest.mark.usefixtures("numerics_are_restored")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def sums_in_float32() -> bool:
    matmul = torch.backends.cuda.matmul
    return not (matmul.allow_bf16_reduced_precision_reduction or matmul.allow_fp16_reduced_precision_reduction)


def as_pytorch_has_it() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True


def test_pieces_of_long_sums_are_added_in_float32_and_a_sum_may_still_be_cut() -> None:
    as_pytorch_has_it()
    set_numerics(deterministic=False)
    assert sums_in_float32()
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction_split_k
    assert not torch.are_deterministic_algorithms_enabled()
    assert WORKSPACE not in os.environ


def test_deterministic_is_said_to_pytorch_cudnn_and_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    set_numerics(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert os.environ[WORKSPACE] == ":4096:8"
    # what the user chose stays, if it can
    monkeypatch.setenv(WORKSPACE, ":16:8")
    set_numerics(deterministic=True)
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(
        ValueError, match=r"needs CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, .*has ':0:0'; unset it"
    ):
        set_numerics(deterministic=True)


def test_a_users_own_choice_is_not_undone() -> None:
    torch.use_deterministic_algorithms(True)
    set_numerics(deterministic=False)
    assert torch.are_deterministic_algorithms_enabled()


def test_models_and_rewards_are_made_in_it(tiny_weights: Path, tmp_path: Path) -> None:
    config = make_config(tiny_weights, tmp_path / "run", "runtime.deterministic=true")
    for make in (build_model, build_rewards):
        as_pytorch_has_it()
        torch.use_deterministic_algorithms(False)
        make(config)
        assert sums_in_float32()
        assert torch.are_deterministic_algorithms_enabled()


def test_no_operation_of_a_run_is_one_that_pytorch_refuses_then(tiny_weights: Path, tmp_path: Path) -> None:
    """On a CPU few are refused; on a GPU this is a case of benchmarks.gpu_paths."""
    runs = {
        deterministic: train(
            make_config(
                tiny_weights,
                tmp_path / deterministic / "run",
                f"runtime.deterministic={deterministic}",
                "train.iterations=1",
            )
        )
        for deterministic in ("false", "true")
    }
    usual, deterministic = (load_file(path / "lora/pytorch_lora_weights.safetensors") for path in runs.values())
    torch.testing.assert_close(deterministic, usual, rtol=0, atol=0)


def test_it_is_off_unless_asked_for() -> None:
    assert load_config("train", []).runtime.deterministic is False
