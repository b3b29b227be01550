"""Each plain group refuses what cannot work, and names the key as the user writes it."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.config import load_config
from fastgrpo.parts import RunParts
from fastgrpo.settings import Distribution, Evaluating, Runtime, Saving, Training
from tests.tiny_config import make_config


@pytest.fixture(scope="module")
def groups() -> dict[str, Any]:
    config = load_config("train", [])
    return {
        "train": Training(**config.train),
        "evaluate": Evaluating(**config.evaluate),
        "checkpoint": Saving(**config.checkpoint),
        "distributed": Distribution(**config.distributed),
        "runtime": Runtime(**config.runtime),
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.iterations", 0),
        ("train.max_minutes", 0.0),
        ("train.max_minutes", float("nan")),
        ("train.prompts_per_iteration", 0),
        ("train.group_size", 1),
        ("train.optimizer_steps", 0),
        ("train.gradients", "both"),
        ("train.learning_rate", 0.0),
        ("train.learning_rate", 1e9),
        ("train.learning_rate", float("nan")),
        ("train.weight_decay", -0.1),
        ("train.max_grad_norm", 0.0),
        ("train.ema_decay", 1.0),
        ("train.ema_decay", -0.1),
        ("train.ema_share", 1.0),
        ("train.ema_share", -0.1),
        ("train.updates", 0),
        ("train.updates", 1.5),
        ("train.updates", float("inf")),
        ("train.updates", "abc"),
        ("train.updates", True),
        ("train.max_drift", 0.0),
        ("train.max_drift", float("nan")),
        ("train.old_policy_growth", -0.1),
        ("train.old_policy_limit", 1.0),
        ("train.warmup_iterations", -1),
        ("train.decay_share", -0.1),
        ("train.decay_share", 1.5),
        ("train.decay_to", 1.5),
        ("train.decay_to", float("nan")),
        ("evaluate.every", 0),
        ("evaluate.images_per_prompt", 0),
        ("evaluate.num_steps", 0),
        ("checkpoint.every", 0),
        ("checkpoint.keep", 0),
        ("distributed.timeout_seconds", 0),
        ("distributed.beat_seconds", 0.0),
        ("distributed.dead_after_seconds", 1.0),
        ("distributed.reward_ranks", -1),
        ("runtime.micro_batch", -1),
        ("runtime.sampling_batch", -1),
        ("runtime.decode_batch", -1),
        ("runtime.threads", -1),
        ("runtime.device", "tpu"),
        ("runtime.device", "cuda:x"),
        ("runtime.device", "cpu:1"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_its_key(key: str, value: object, groups: dict[str, Any]) -> None:
    group, _, name = key.partition(".")
    with pytest.raises(ValueError, match=rf"^{re.escape(key)} must .*got '?{str(value)[0]}"):
        replace(groups[group], **{name: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.max_grad_norm", float("inf")), ("train.learning_rate", 1.0), ("runtime.device", "cuda:3")],
)
def test_the_last_value_that_works_is_taken(key: str, value: object, groups: dict[str, Any]) -> None:
    group, _, name = key.partition(".")
    assert asdict(replace(groups[group], **{name: value}))[name] == value


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("name=../../escape", r"name must be a word without slashes, got '\.\./\.\./escape'"),
        ("seed=-1", "seed must lie in 0 to"),
        ("seed=99999999999999999999", "seed must lie in 0 to"),
        ("prompts.held_out=nowhere.txt", r"nowhere\.txt does not exist; check prompts\.held_out"),
        ("prompts.path=nowhere.txt", r"nowhere\.txt does not exist; check prompts\.path"),
        (
            "algorithm=nft solver=cached_guidance",
            "solver=cached_guidance reuses a branch of guidance, and an algorithm that learns",
        ),
        ("runtime.profile=true", r"runtime\.profile needs 4 iterations and train\.iterations is 2"),
    ],
)
def test_what_can_be_known_is_known_before_anything_is_loaded(
    override: str, says: str, tiny_weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        RunParts.read(make_config(tiny_weights, tmp_path / "run", *override.split()))
