"""A checked config, read once: each group becomes the object that it describes.  Nothing below here sees a config.

What takes memory or minutes is read as its source, which makes it when it is called: the model, the rewards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.making import Search
from fastgrpo.algorithm.retries import Retries
from fastgrpo.algorithm.solver import CachedGuidance, Solver
from fastgrpo.algorithm.step_search import StepSearch
from fastgrpo.files.locations import resolve_path
from fastgrpo.given import NOTHING, Given
from fastgrpo.memory.device import device_of, set_threads
from fastgrpo.memory.model_on_device import ModelSource
from fastgrpo.models.adapter import FlowModel
from fastgrpo.models.image_sizes import ImageSizes
from fastgrpo.models.lossy import Lossy
from fastgrpo.numerics import set_numerics
from fastgrpo.pieces import build, build_partial, find_target
from fastgrpo.profiling.profile import check_iterations
from fastgrpo.prompts import load_prompts
from fastgrpo.resolution import Resolution
from fastgrpo.rewards.source import Loaded, RewardSource
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.settings import Distribution, Evaluating, Runtime, Saving, Training, check_seed
from fastgrpo.types import Prompt

_OF_MODEL = ("adaptation", "device", "attention", "compile", "checkpointing", "lossy")


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """A training run: what it learns, from what, for how long and where.  ``config`` is all of it as plain data."""

    output: Path
    resume: bool
    seed: int
    logs_to_wandb: bool
    makes_report: bool
    training: Training
    evaluating: Evaluating
    saving: Saving
    distribution: Distribution
    runtime: Runtime
    prompts: list[Prompt]
    held_out: list[Prompt]
    algorithm: Algorithm
    solver: Solver
    model: ModelSource
    dtype: torch.dtype
    rewards: RewardSource
    given: Given
    config: dict[str, Any]

    @classmethod
    def read(cls, config: DictConfig, given: Given = NOTHING) -> "RunParts":
        """Of a checked ``train`` config and what a program gives beside it.

        ValueError for whatever can be known to fail, before anything is made.
        """
        if Path(config.name).name != config.name:
            raise ValueError(f"name must be a word without slashes, got {config.name!r}; output= takes a path")
        check_seed(config.seed)
        training, evaluating, runtime = Training(**config.train), Evaluating(**config.evaluate), read_runtime(config)
        if runtime.profile:
            check_iterations(training.iterations)
        prompts, held_out = (read_prompts(config, key, given) for key in ("path", "held_out"))
        algorithm: Algorithm = build(config.algorithm)
        training = training.for_updates(algorithm.usual_updates)
        algorithm.check(
            evaluation_steps=evaluating.num_steps,
            group_size=training.group_size,
            iterations=training.iterations,
            seed=config.seed,
        )
        search = algorithm.noise
        if training.reweights and isinstance(search, Retries):
            raise ValueError(
                "train.gradients=reweight takes gradients while images are made, and algorithm/noise=retries makes "
                "some of them again; use train.gradients=replay"
            )
        if training.reweights and isinstance(search, StepSearch) and search.correction != "none":
            raise ValueError(
                "train.gradients=reweight has one advantage for all steps of a sample, and algorithm.noise.correction="
                f"{search.correction} another for the first; use train.gradients=replay"
            )
        plain: Any = OmegaConf.to_container(config)
        solver: Solver = build(config.solver)
        if algorithm.learns_from_images and isinstance(solver, CachedGuidance):
            raise ValueError(
                "solver=cached_guidance reuses a branch of guidance, and an algorithm that learns from images has "
                "none; use solver=euler"
            )
        family = find_target(config.model._target_, "model")
        if isinstance(solver, CachedGuidance) and not getattr(family, "guidance_is_linear", True):
            raise ValueError(
                f"solver=cached_guidance adds up branches of guidance, which {family.__name__} does not; use "
                "solver=euler"
            )
        return cls(
            output=Path(config.output),
            resume=config.resume,
            seed=config.seed,
            logs_to_wandb=config.wandb,
            makes_report=config.report,
            training=training,
            evaluating=evaluating,
            saving=Saving(**config.checkpoint),
            distribution=Distribution(**config.distributed),
            runtime=runtime,
            prompts=prompts,
            held_out=held_out,
            algorithm=algorithm,
            solver=solver,
            model=read_model(config, lossy=build(config.lossy)),
            dtype=getattr(torch, config.model.get("dtype", "float32")),
            rewards=read_rewards(config, given),
            given=given,
            config=plain,
        )

    @property
    def texts(self) -> list[str]:
        """Of the prompts that are trained on."""
        return [prompt.text for prompt in self.prompts]

    @property
    def held_out_texts(self) -> list[str]:
        return [prompt.text for prompt in self.held_out]


def read_prompts(config: DictConfig, key: str, given: Given = NOTHING) -> list[Prompt]:
    """Those of the file ``prompts.<key>`` that the model can draw: in the memory planned for its own resolution.

    Those that are given take its place.
    """
    fit, column = _Drawn(config.model), config.prompts.column
    rows = given.prompts(key, fit, column)
    return load_prompts(resolve_path(config.prompts[key]), f"prompts.{key}", fit, column) if rows is None else rows


@dataclass(frozen=True)
class _Drawn:
    """``Fit`` to the model of a config, before that is loaded; files of the hub only for rows that need them."""

    model: DictConfig

    def __call__(self, prompt: Prompt) -> Prompt:
        if prompt.negative is not None:
            self._check_negative(prompt.negative)
        return prompt if prompt.resolution is None else replace(prompt, resolution=self._fitted(prompt.resolution))

    def _check_negative(self, text: str) -> None:
        family = find_target(self.model._target_, "model")
        said = f"negative_prompt {text!r} is for guidance with a branch of its own, and "
        if not getattr(family, "takes_negative_prompts", False):
            raise ValueError(f"{said}{self.model._target_} has none that reads a text; leave it out")
        if self.model.get("guidance_scale", 1) == 1:
            raise ValueError(f"{said}model.guidance_scale=1 turns that off; raise it above 1, or leave this out")

    def _fitted(self, resolution: Resolution) -> Resolution | None:
        own = Resolution.read(self.model.get("resolution"), "model.resolution")
        if resolution.area > own.area:
            raise ValueError(
                f"resolution {resolution} has more pixels than model.resolution={own}, which memory is planned for; "
                "raise model.resolution, or lower this one"
            )
        self._image_sizes.check(resolution, f"resolution {resolution}")
        return None if resolution == own else resolution

    @cached_property
    def _image_sizes(self) -> ImageSizes:
        make: Any = build_partial(self.model, *_OF_MODEL)
        if not hasattr(make.func, "image_sizes"):
            raise ValueError(
                f"{self.model._target_} has no image_sizes, so nobody knows whether it draws another resolution than "
                "its own; leave resolution out of the prompt file"
            )
        given = {key: make.keywords[key] for key in ("weights", "architecture", "variant") if key in make.keywords}
        sizes: ImageSizes = make.func.image_sizes(**given)
        return sizes


def read_search(config: DictConfig) -> Search:
    """The group ``search``."""
    search: Search = build(config.search)
    return search


def read_runtime(config: DictConfig) -> Runtime:
    """The group ``runtime``."""
    return Runtime(**config.runtime)


def read_model(config: DictConfig, lossy: Lossy | None = None) -> ModelSource:
    """The groups ``model``, ``adaptation``, ``compile`` and ``runtime``; exact, unless it is told how not."""
    return ModelSource(
        make=build_partial(config.model, *_OF_MODEL),
        adaptation=build(config.adaptation),
        compile=build(config.compile),
        runtime=read_runtime(config),
        lossy=lossy,
    )


def read_rewards(config: DictConfig, given: Given = NOTHING) -> RewardSource:
    """The group ``reward``; a function that is given is the one that its ``path`` names."""
    asked = ("terms", "watch")
    others = OmegaConf.masked_copy(config.reward, [str(key) for key in config.reward if key not in asked])

    own = {} if given.reward is None else {"function": given.reward}

    def make_around(**parts: Any) -> Rewards:
        rewards: Rewards = build_partial(others, *asked, *own)(**parts, **own)
        return rewards

    return RewardSource(
        make=(lambda: build_partial(config.reward, *own)(**own)) if own else partial(build, config.reward),
        make_around=make_around,
        names={key: [str(name) for name in config.reward[key]] for key in asked},
    )


def build_model(config: DictConfig, lossy: Lossy | None = None) -> FlowModel:
    """The model of a config, on its device."""
    return read_model(config, lossy)()


def build_rewards(config: DictConfig, prompts: Sequence[Prompt | str] = (), given: Given = NOTHING) -> Loaded:
    """The rewards of a config, which can judge ``prompts``, and their golden scores."""
    runtime = read_runtime(config)
    set_threads(runtime)
    set_numerics(deterministic=runtime.deterministic)
    return read_rewards(config, given).load(prompts, device_of(runtime))
