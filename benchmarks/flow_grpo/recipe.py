"""The recipes that both sides run, and how each side is told of them.

An iteration is the same work on both sides: the same number of images of the same prompts and groups, micro-batches
and denoising steps; the same trained steps, guidance, dynamics, objective and number of optimizer steps.  Published
settings: arXiv:2505.05470 and flow_grpo's config/grpo.py (``general_ocr_sd3``, ``geneval_sd3_fast_nocfg``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from benchmarks.flow_grpo.pipeline import Size
from benchmarks.flow_grpo.setting import Setting
from fastgrpo.config import load_config

MICRO_BATCH = 9
NUM_STEPS = 10
OPTIMIZER_STEPS = 2
LEARNING_RATE = 3e-4
WEIGHT_DECAY = 1e-4
MAX_GRAD_NORM = 1.0
EMA_DECAY = 0.9
# Flow-GRPO's unit of the JPEG reward: 500 kB
REWARD_WEIGHT = 0.002
_UNCOMPILED = "fastgrpo.compile.blocks.Uncompiled"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """``algorithm`` is the config of our side; the other fields tell theirs.  ``window`` 0 trains all steps but one."""

    name: str
    algorithm: str
    guidance_scale: float
    kl_coef: float
    noise_level: float
    dynamics: str
    clip_range: float
    window: int = 0
    window_range: tuple[int, int] = (0, NUM_STEPS // 2)
    # what their side is timed on, where it is not the same; it is checked on this
    peer: str = ""
    # overrides of our config under which a check sees all that the recipe does
    checked_with: tuple[str, ...] = ()

    @property
    def num_trained_steps(self) -> int:
        return self.window or NUM_STEPS - 1


_FULL = {"algorithm": "flow_grpo", "guidance_scale": 4.5, "noise_level": 0.7, "dynamics": "sde", "clip_range": 1e-4}
_FAST = {"guidance_scale": 1.0, "kl_coef": 0.0, "dynamics": "cps", "clip_range": 1e-5, "window": 3}
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="full", kl_coef=0.04, **_FULL),  # type: ignore[arg-type]
        Recipe(name="full_without_kl", kl_coef=0.0, **_FULL),  # type: ignore[arg-type]
        Recipe(name="fast", algorithm="flow_grpo_fast", noise_level=0.8, **_FAST),  # type: ignore[arg-type]
        Recipe(
            name="smart",
            algorithm="smart_grpo",
            noise_level=0.5,
            peer="fast",
            # the one prompt of a check is searched
            checked_with=("algorithm.noise.mix=0",),
            **_FAST,  # type: ignore[arg-type]
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One recipe on one model: ``batches`` micro-batches an iteration, each a prompt's group."""

    recipe: str
    pipeline: str
    size: Size
    prompts: str
    batches: int
    device: str
    # of the CPU, 0 leaves PyTorch's choice
    threads: int
    seed: int = 42
    # of their side alone
    micro_batch: int = MICRO_BATCH
    learning_rate: float = LEARNING_RATE
    # optimizer steps between two updates of the average
    ema_every: int = 8

    @property
    def num_images(self) -> int:
        return self.batches * self.micro_batch


def our_config(job: Job, overrides: Sequence[str] = ()) -> DictConfig:
    """Of ``fastgrpo train``; ``overrides`` come last and win, and name the output."""
    recipe, size = RECIPES[job.recipe], job.size
    values = {
        "algorithm": recipe.algorithm,
        "algorithm.schedule.num_steps": NUM_STEPS,
        "algorithm.objective.kl_coef": recipe.kl_coef,
        "algorithm.objective.clip_range": recipe.clip_range,
        "model": "sd35_medium",
        "model.weights": job.pipeline,
        "model.resolution": size.resolution,
        "model.guidance_scale": recipe.guidance_scale,
        "model.max_sequence_length": size.t5_tokens,
        "model.dtype": "bfloat16" if job.device == "cuda" else "float32",
        # else a run finds on disk what another one encoded, and theirs encodes everything
        "model.condition_cache": "null",
        "adaptation.rank": size.lora_rank,
        "adaptation.alpha": 2 * size.lora_rank,
        "reward": "jpeg_compressibility",
        "reward.weights.jpeg": REWARD_WEIGHT,
        "prompts.path": job.prompts,
        "prompts.held_out": job.prompts,
        "runtime.device": job.device,
        "runtime.micro_batch": MICRO_BATCH,
        "runtime.threads": job.threads,
        "train.prompts_per_iteration": job.batches,
        "train.group_size": MICRO_BATCH,
        "train.optimizer_steps": OPTIMIZER_STEPS,
        "train.learning_rate": LEARNING_RATE,
        "train.weight_decay": WEIGHT_DECAY,
        "train.max_grad_norm": MAX_GRAD_NORM,
        "train.ema_decay": EMA_DECAY,
        "seed": job.seed,
    }
    # what is compiled is said by the side that is measured
    if not any(override.startswith("compile=") for override in overrides):
        values["compile"] = "eager"
    return load_config("train", [*(f"{name}={value}" for name, value in values.items()), *overrides])


def our_setting(config: DictConfig) -> Setting:
    """How a trainer of this config computes."""
    return Setting(config.model.dtype, compiled=config.compile._target_ != _UNCOMPILED)
