"""A program's process is after a run as it was before, also where the run failed, and where there were several."""

import gc
import logging
import os
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from transformers.utils import logging as transformers_logging

import fastgrpo
from fastgrpo.known_warnings import _Lacks
from fastgrpo.library.process import as_before
from fastgrpo.models.quiet import hide_loading_bars
from fastgrpo.numerics import set_numerics
from tests.library.runs import brightness, words

LOGGERS = ("diffusers.pipelines.pipeline_utils", "transformers.utils.import_utils")


def state() -> dict[str, Any]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "lenient": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": cudnn.deterministic,
        "filled": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "sums": (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction),
        "environment": dict(os.environ),
        "bars": (
            diffusers_logging.is_progress_bar_enabled(),
            transformers_logging.is_progress_bar_enabled(),
            are_progress_bars_disabled(),
        ),
        "filters": [list(logging.getLogger(name).filters) for name in LOGGERS],
        "hydra": GlobalHydra.instance().hydra,
        "drawn": torch.get_rng_state().tolist(),
    }


@pytest.mark.usefixtures("numerics_are_restored")
@pytest.mark.parametrize("fails", [False, True])
def test_whatever_a_run_sets_is_put_back(fails: bool, tiny_weights: Path, tmp_path: Path) -> None:
    # a program of Hydra's own, with other settings than a run's
    (tmp_path / "configs").mkdir()
    torch.use_deterministic_algorithms(True, warn_only=True)
    seen: dict[str, Any] = {}

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.update(state())
        if fails:
            raise OSError("no")
        return brightness(images, prompts)

    with initialize_config_dir(str(tmp_path / "configs"), version_base="1.3"):
        before = state()
        settings = words(tiny_weights, tmp_path / "run", "runtime.deterministic=true", with_reward=False)
        settings.append(f"runtime.threads={before['threads'] + 1}")
        if fails:
            with pytest.raises(fastgrpo.RewardError, match="raised OSError: no"):
                fastgrpo.train(*settings, reward=reward)
        else:
            fastgrpo.train(*settings, reward=reward)
        assert state() == before
    assert (seen["threads"], seen["lenient"], seen["cudnn"], seen["filled"]) == (
        before["threads"] + 1,
        False,
        True,
        False,
    )
    assert seen["bars"][:2] == (False, False)
    assert all(any(isinstance(found, _Lacks) for found in filters) for filters in seen["filters"])
    assert "CUBLAS_WORKSPACE_CONFIG" in seen["environment"]


@pytest.mark.usefixtures("numerics_are_restored")
def test_the_last_of_several_threads_puts_back_what_the_first_one_found() -> None:
    before, both, one_left = state(), Barrier(2), Barrier(2)
    within: list[bool] = []

    def first() -> None:
        with as_before():
            set_numerics(deterministic=True)
            both.wait()
        one_left.wait()

    def second() -> None:
        both.wait()
        with as_before():
            pass
        one_left.wait()
        within.append(torch.are_deterministic_algorithms_enabled())

    def third() -> None:
        with as_before():
            both.wait()
            # the first one has left by now, and its settings still hold
            one_left.wait()
            within.append(torch.are_deterministic_algorithms_enabled())

    for other, expected in ((second, False), (third, True)):
        within.clear()
        threads = [Thread(target=run) for run in (first, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert within == [expected]
        assert state() == before


def test_a_model_is_gone_with_its_call(tiny_weights: Path) -> None:
    def number() -> int:
        return sum(type(found).__name__ == "SD3Transformer2DModel" for found in gc.get_objects())

    gc.collect()
    before = number()
    gc.disable()
    try:
        fastgrpo.sample("a red circle", f"model.weights={tiny_weights}", "num_steps=1", "images_per_prompt=1")
        assert number() == before
    finally:
        gc.enable()


def test_bars_that_were_hidden_stay_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    hide_loading_bars()
    before = state()
    with as_before():
        pass
    assert state() == before
    assert before["bars"][:2] == (False, False)
    for module in shown:
        module.enable_progress_bar()
