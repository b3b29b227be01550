"""Runs of the library's tests: the model of ``tiny.py``, and what two runs that are alike have in common."""

from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fastgrpo.records.json_lines import read_rows
from tests.tiny_config import make_overrides

# of the machine, not of the run
_MEASURED = ("seconds", "images_per_second", "peak_bytes", "compilations")


def brightness(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    """A reward of a module."""
    return images_BCHW.mean(dim=(1, 2, 3))


def words(
    weights: Path, output: Path, *overrides: str, with_reward: bool = True, with_prompts: bool = True
) -> list[str]:
    """Settings of a run of two iterations; without its reward, or its prompts, where these are to be given."""
    made = make_overrides(weights, output, "checkpoint.every=1", "evaluate.every=1", *overrides)
    left_out = [beginning for beginning, kept in (("prompts.", with_prompts), ("reward=jpeg", with_reward)) if not kept]
    return [word for word in made if not word.startswith(tuple(left_out))]


def rows(run: Path) -> list[dict[str, Any]]:
    """Metrics of a run but for times, as text so that NaN equals NaN."""
    return [
        {key: repr(value) for key, value in row.items() if not key.startswith(_MEASURED)}
        for row in read_rows(run / "metrics.jsonl")
    ]


def lora(run: Path) -> dict[str, list[float]]:
    """The weights that a run ended with."""
    weights = safetensors.torch.load_file(run / "lora/pytorch_lora_weights.safetensors")
    return {name: weight.flatten().tolist() for name, weight in sorted(weights.items())}
