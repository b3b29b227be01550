"""Within an iteration the host never waits for the GPU, but where a result is read: rewards, and the statistics."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from fastgrpo.assembly import build_trainer
from fastgrpo.composing import config_groups
from fastgrpo.update import Update
from tests.tiny_config import make_config

MINIATURES = [name for name in config_groups("train")["model"] if name.endswith("_miniature")]


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
            # the first time in a process it also says that the mode is a prototype
            found += [str(warning.message) for warning in caught if "called a synchronizing" in str(warning.message)]


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
    assert_waits_once(config, monkeypatch)


# the text is as long as it is for some, and leaves out what fills it up
@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["flow_grpo_fast", "nft"])
@pytest.mark.parametrize("model", MINIATURES)
def test_no_family_makes_the_host_wait(
    model: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["runtime.device=cuda", f"model={model}", f"algorithm={recipe}", "algorithm.schedule.num_steps=6"]
    words += [f"model.{key}=bfloat16" for key in ("dtype", "decode_dtype")]
    words += ["model.guidance_scale=1"] if recipe == "nft" else []
    assert_waits_once(make_config(Path("random"), tmp_path / "run", *words), monkeypatch)


def assert_waits_once(config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the rollout, and once in the update."""
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
