"""Within an iteration the host never waits for the GPU, but where a result is read: rewards, and the statistics."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.train import build_trainer
from fastgrpo.update import Update
from tests.tiny_config import make_config


@contextmanager
def waits() -> Iterator[list[str]]:
    """What PyTorch says of every operation that waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            found: list[str] = []
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("algorithm", "guidance_scale"),
    [("flow_grpo", 2.0), ("flow_grpo_fast", 2.0), ("smart_grpo_paper", 2.0), ("flow_dppo", 2.0), ("nft", 1.0)],
)
def test_rollout_never_waits_for_the_gpu_and_update_once(
    algorithm: str, guidance_scale: float, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        tiny_weights,
        tmp_path / "run",
        "runtime.device=cuda",
        f"algorithm={algorithm}",
        "algorithm.schedule.num_steps=6",
        f"model.guidance_scale={guidance_scale}",
        "train.optimizer_steps=2",
    )
    trainer = build_trainer(config)
    found: dict[str, list[str]] = {}

    def watched(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **settings: Any) -> Any:
            with waits() as found[name]:
                return stage(*arguments, **settings)

        return run

    # constants are filled and kernels compiled in the first
    trainer.step()
    rollout = type(trainer.rollout)
    monkeypatch.setattr(rollout, "__call__", watched("rollout", rollout.__call__))
    monkeypatch.setattr(Update, "__call__", watched("update", Update.__call__))
    trainer.step()
    assert found["rollout"] == []
    # the statistics
    assert len(found["update"]) == 1


@pytest.mark.gpu
def test_the_watch_sees_a_wait() -> None:
    with waits() as found:
        torch.ones(1, device="cuda").item()
    assert len(found) == 1
