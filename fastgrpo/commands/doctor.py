"""Does this machine compute right?  Versions, backends, golden scores of the rewards, and the ratio check.

The last check rolls out a few samples and replays them under gradient, by the rollout and the update that train.  With
unchanged weights the policy's probability of what it did is what it was, so |ratio - 1| must be 0 in float32; where
images are learned from, the velocity is what sampling has with adapters merged.
"""

from importlib.util import find_spec

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.noise import NoiseDraw, plain_noise
from fastgrpo.commands.memory import show_plan
from fastgrpo.commands.prompts import prompts_table
from fastgrpo.commands.recommend import recommend
from fastgrpo.commands.toolchain import what_triton_needs
from fastgrpo.health import TrainingError
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.memory.device import device_of
from fastgrpo.models.adapter import FlowModel, encoded
from fastgrpo.models.attention import BACKENDS, why_not
from fastgrpo.numerics import set_numerics
from fastgrpo.old_policy import OldPolicy
from fastgrpo.parts import build_model, read_prompts, read_runtime
from fastgrpo.pieces import build
from fastgrpo.prompts import PromptSource
from fastgrpo.records.summary import commit, hardware, versions
from fastgrpo.rewards.self_test import GoldenScores, compare, golden_scores, record, recorded
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.signals import make_replay, make_rollout
from fastgrpo.types import Noise, Samples
from fastgrpo.update import Update, UpdateStats

# module, what it gives, the extra that brings it
_BACKENDS = (
    ("flash_attn", "FlashAttention's own kernels", "flash-attn"),
    ("xformers", "xformers' attention", "xformers"),
    ("torch_tensorrt", "rewards compiled with TensorRT", "tensorrt"),
    ("tensorrt_rtx", "rewards compiled with TensorRT-RTX, for RTX cards", "tensorrt-rtx"),
    ("rapidocr", "the ocr reward", "ocr"),
    ("fastapi", "fastgrpo serve-reward", "serve"),
    ("ImageReward", "ImageReward by its authors' code", "image-reward"),
    ("wandb", "logging to Weights & Biases", "wandb"),
)
_NUDGE = 0.01
# of velocities with adapters merged and apart, in float32: some 1e-6 was measured
_MAX_VELOCITY_DEVIATION = 1e-3


def doctor(config: DictConfig) -> None:
    """Run a checked ``doctor`` config and print the findings; RewardError or TrainingError if a check fails."""
    console = Console()
    if config.recommend:
        return recommend(config, console)
    if config.memory:
        return show_plan(config, console)
    if config.show_prompts:
        return console.print(prompts_table(config))
    set_numerics(deterministic=config.runtime.deterministic)
    console.print(_machine())
    console.print(_backends())
    console.print(prompts_table(config))
    console.print(_golden_scores(config))
    stats = replayed(config)
    limit = config.max_deviation
    if limit < 0:
        exact = 0.0 if stats.deviation_name == "ratio_deviation" else _MAX_VELOCITY_DEVIATION
        limit = exact if config.model.get("dtype", "float32") == "float32" else stats.max_deviation
    assert stats.deviation is not None
    samples = f"{config.num_prompts * config.group_size} samples, {stats.num_terms} terms of each"
    found = f"{stats.deviation_name} = {stats.deviation:.3g} over {samples}"
    if not stats.deviation <= limit:
        raise TrainingError(
            f"{found}: more than {limit:g}, so rollout and update disagree; "
            "try model.dtype=float32, or another version of torch or of the attention kernels"
        )
    console.print(f"rollout and update agree: {found} (limit {limit:g})", highlight=False)


def replayed(config: DictConfig) -> UpdateStats:
    """Of one small rollout that is replayed with unchanged weights."""
    if config.num_prompts < 1 or config.group_size < 1:
        raise ValueError(f"num_prompts and group_size must be at least 1: {config.num_prompts}, {config.group_size}")
    rows = read_prompts(config, "path")
    algorithm: Algorithm = build(config.algorithm)
    model = build_model(config, lossy=build(config.lossy))
    _nudge(model, config.seed)
    batch_sizes = BatchSizes.of_runtime(read_runtime(config))
    sampler = Sampler(model=model, grid=algorithm.grid, batch_sizes=batch_sizes, solver=build(config.solver))
    prompts = PromptSource(rows, config.num_prompts, config.seed).at(0)
    samples = Samples.all_of(prompts, config.group_size)
    conditions = encoded(model, samples.asked)
    draw = NoiseDraw(
        seed=config.seed,
        prompt_ids=prompts.ids,
        group_size=config.group_size,
        latent_shape=model.latent_shape_of(prompts.resolution),
        device=model.device,
    )
    noise = Noise(plain_noise(draw), metrics={}, num_scored=0)
    trajectories = make_rollout(algorithm, sampler, config.seed)(samples, conditions, noise, 0)
    update = Update(
        model=model,
        replay=make_replay(algorithm, model, OldPolicy(model.trainable), batch_sizes.sampling, config.seed),
        batch_size=batch_sizes.training,
        seed=config.seed,
        optimizer=torch.optim.SGD(list(model.trainable.values()), lr=0.0, fused=True),
        optimizer_steps=1,
        max_grad_norm=1.0,
    )
    advantages_B = torch.linspace(-1, 1, len(samples), device=model.device)
    return update(trajectories.trained, conditions, advantages_B, update.shares(len(samples), 0))


@torch.no_grad()
def _nudge(model: FlowModel, seed: int) -> None:
    """Move the trained weights off their start: fresh adapters add nothing, and their errors would not show."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.trainable.values():
        weight.add_(_NUDGE * torch.randn(weight.shape, generator=generator).to(weight))


def _machine() -> Table:
    table = Table("", "", title="machine", show_header=False)
    found = hardware()
    table.add_row("system", f"{found['system']}, {found['cpu_cores']} CPU cores")
    table.add_row("GPUs", ", ".join(found["gpus"]) or "none")
    if torch.cuda.is_available():
        table.add_row("CUDA", f"{torch.version.cuda}, bfloat16 {_yes(torch.cuda.is_bf16_supported())}")
    for package, version in versions().items():
        table.add_row(package, version or "not installed")
    table.add_row("commit", commit() or "not a checkout")
    return table


def _backends() -> Table:
    table = Table("backend", "available", "for", title="backends")
    sdpa = torch.backends.cuda
    on_gpu = torch.cuda.is_available()
    for name, is_enabled in (
        ("flash", sdpa.flash_sdp_enabled),
        ("memory efficient", sdpa.mem_efficient_sdp_enabled),
        ("cuDNN", sdpa.cudnn_sdp_enabled),
        ("math", sdpa.math_sdp_enabled),
    ):
        table.add_row(f"sdpa: {name}", "on" if on_gpu and is_enabled() else "off" if on_gpu else "no GPU", "attention")
    # half precision, since that is what a GPU trains in
    for name in BACKENDS:
        why = why_not(name, torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16)
        table.add_row(f"attention={name}", f"no: {escape(why)}" if why else "yes", "runtime.attention")
    for name, (where, remedy) in what_triton_needs().items():
        table.add_row(name, escape(where) if where else f"no: {remedy}", "kernels on a GPU")
    for module, purpose, extra in _BACKENDS:
        # asked of the finder alone: importing some of these takes seconds or fails without a GPU
        is_there = find_spec(module) is not None
        table.add_row(module, "yes" if is_there else f"no: pip install 'fastgrpo\\[{extra}]'", purpose)
    return table


def _golden_scores(config: DictConfig) -> Table:
    """Each reward on its golden pairs, compared with its record or put on it; RewardError if it fails."""
    table = Table("reward", "golden scores", "on record", title="rewards")
    for name, golden in _scored(config).items():
        on_record = recorded(golden.identity)
        if config.record:
            note = f"written to {record(golden)}"
        elif on_record is None:
            note = "no; record=true puts them there"
        else:
            note = f"differ by {compare(name, golden, *on_record):.2g} of the spread, limit {golden.tolerance:g}"
        table.add_row(name, " ".join(f"{score:.4g}" for score in golden.scores), note)
    return table


def _scored(config: DictConfig) -> dict[str, GoldenScores]:
    rewards: Rewards = build(config.reward)
    return golden_scores(rewards, device_of(read_runtime(config)), read_prompts(config, "path"))


def _yes(value: bool) -> str:
    return "yes" if value else "no"
