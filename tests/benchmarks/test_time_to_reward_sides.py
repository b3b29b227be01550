"""Each side trains the embedded model, from the same start, and is judged on what it trained by our evaluation."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.flow_grpo.checkout import Checkout
from benchmarks.time_to_reward import embedded, flow_grpo_code, nft_code
from benchmarks.time_to_reward.flow_grpo_code import FlowGRPOCode
from benchmarks.time_to_reward.learner import Judge, Run, evaluation_of, our_name
from benchmarks.time_to_reward.nft_checkout import NFTCheckout
from benchmarks.time_to_reward.nft_code import NFTCode
from benchmarks.time_to_reward.ours import Ours
from benchmarks.time_to_reward.run import trained
from fastgrpo.algorithm.schedule import SD3Schedule

TEXTS = ["three red circles", "a red circle above a green circle"]
# the first line would fail, were it executed
SCRIPT = """
import a_module_that_is_not_there

def return_decay(step, decay_type):
    return 0.25 * decay_type

def main(_):
    for epoch in range(config.num_epochs):
        for inner_epoch in range(config.train.num_inner_epochs):
            for rows in torch.randperm(total_batch_size_filtered).chunk(num_batches):
                x0 = filtered_samples["latents_clean"][rows]
                for j in range(num_train_timesteps):
                    advantages = filtered_samples["advantages"][rows, j].view(-1, 1, 1, 1)
                    times = filtered_samples["timesteps"][rows, j]
                    noise = torch.randn_like(x0)
                    v = transformer_ddp(
                        hidden_states=x0 + (times / 1000).view(-1, 1, 1, 1) * (noise - x0),
                        timestep=times,
                        encoder_hidden_states=filtered_samples["prompt_embeds"][rows],
                        pooled_projections=filtered_samples["pooled_prompt_embeds"][rows],
                        return_dict=False,
                    )[0]
                    loss = (advantages * (v - noise + x0) ** 2).mean() / effective_grad_accum_steps
                    loss.backward()
                    current_accumulated_steps += 1
                if current_accumulated_steps % effective_grad_accum_steps == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    global_step += 1
                    ema.step(transformer_trainable_parameters, global_step)
        with torch.no_grad():
            kept = return_decay(global_step, config.decay_type)
            for weight, old in zip(transformer_trainable_parameters, old_transformer_trainable_parameters):
                old.data.mul_(kept).add_(weight.data, alpha=1 - kept)
"""
PIPELINE = """
import torch
from .solver import euler

@torch.no_grad()
def pipeline_with_logprob(
    pipeline, *, prompt_embeds, pooled_prompt_embeds, num_inference_steps, height, width, solver, **_
):
    assert solver == "flow"
    x = torch.randn(len(prompt_embeds), 8, height // 8, width // 8)
    pipeline.scheduler.set_timesteps(num_inference_steps)
    latents = euler(pipeline, x, prompt_embeds, pooled_prompt_embeds)
    z = latents[-1] / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    return pipeline.image_processor.postprocess(pipeline.vae.decode(z, return_dict=False)[0], "pt"), latents, []
"""
SOLVER = """
def euler(pipeline, x, embeds, pooled):
    latents, sigmas = [x], pipeline.scheduler.sigmas
    for t, t_next in zip(sigmas[:-1], sigmas[1:]):
        v = pipeline.transformer(latents[-1], embeds, pooled, (1000 * t).expand(len(x)), return_dict=False)[0]
        latents.append(latents[-1] + (t_next - t) * v)
    return latents
"""


@pytest.fixture
def nft_checkout(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "nft"
    (path / "scripts").mkdir(parents=True)
    (path / "flow_grpo/diffusers_patch").mkdir(parents=True)
    (path / "scripts/train_nft_sd3.py").write_text(SCRIPT)
    (path / "flow_grpo/diffusers_patch/pipeline_with_logprob.py").write_text(PIPELINE)
    (path / "flow_grpo/diffusers_patch/solver.py").write_text(SOLVER)
    for name in ("ema.py", "stat_tracking.py"):
        shutil.copy(Path(__file__).parent / "flow_grpo_stand_in/flow_grpo" / name, path / "flow_grpo")
    yield path
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusion_nft_checkout"]:
        del sys.modules[name]


@pytest.fixture
def run(stand_in: Checkout, nft_checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """2 prompts x 4 images an iteration, of all sides."""
    for module in (flow_grpo_code, nft_code):
        monkeypatch.setattr(module, "NUM_IMAGES", 8)
    monkeypatch.setattr(embedded, "PROMPTS", 2)
    monkeypatch.setattr(embedded, "GROUP", 4)
    return Run(seed=3, learning_rate=1e-3, scratch=tmp_path, flow_grpo=stand_in.path, nft=nft_checkout)


def their(side: str, run: Run, **settings: Any) -> tuple[Any, Any, Any]:
    """A learner, its pipeline, and what encodes its prompts."""
    if side == "nft":
        nft = NFTCode(**{"micro_batch": 4, **settings})(run)
        return nft, nft.pipeline, nft.encoder
    grpo = FlowGRPOCode(**{"micro_batch": 4, **settings})(run)
    return grpo, grpo.peer.pipeline, grpo.peer.encode


@pytest.mark.parametrize("side", ["flow_grpo", "nft"])
def test_conditions_velocities_and_images_of_their_pipeline_are_ours(run: Run, side: str) -> None:
    learner, pipeline, encode = their(side, run)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    with torch.no_grad():
        for name, weight in pipeline.transformer.named_parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator) / 10)
                weights[our_name(name)] = weight
    x_BCHW = torch.randn(2, 8, 8, 8, generator=generator)
    embeds, pooled = encode(TEXTS)
    with learner.judge.loaded(weights) as trainer, torch.no_grad():
        conditions = trainer.model.encode(TEXTS)
        assert torch.equal(conditions.embeds_BLC, embeds)
        assert torch.equal(conditions.pooled_BC, pooled)
        ours = trainer.model.velocity(x_BCHW, 0.6021, conditions)
        theirs = pipeline.transformer(
            hidden_states=x_BCHW,
            timestep=torch.full((2,), 602.1),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        # adapters of this size move a velocity by more than its own length
        assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
        z = x_BCHW / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
        image = pipeline.image_processor.postprocess(pipeline.vae.decode(z, return_dict=False)[0], "pt")
        assert torch.equal(trainer.model.decode(x_BCHW), image)


@pytest.mark.parametrize("side", ["flow_grpo", "nft"])
def test_an_iteration_of_theirs_trains_our_layers_and_what_is_judged_is_its_average(run: Run, side: str) -> None:
    learner, pipeline, _ = their(side, run, **({"ema_every": 1} if side == "flow_grpo" else {}))
    before = {name: weight.clone() for name, weight in learner.averages().items()}
    assert set(before) == learner.judge.names
    # B is zero: it starts as the embedded model
    assert not any(weight.any() for name, weight in before.items() if name.endswith("lora_B.weight"))
    rewards = [learner.step() for _ in range(2)]
    assert all(0 <= reward <= 1 for reward in rewards)
    after = learner.averages()
    for name, weight in pipeline.transformer.named_parameters():
        # the last block's text leads nowhere, so what its queries are makes no difference
        if weight.requires_grad and name.endswith("lora_B.default.weight") and "4.attn.add_q_proj" not in name:
            average = after[our_name(name)]
            assert average.any()
            assert not torch.equal(average, weight)
    with learner.judge.loaded(after) as trainer:
        assert all(torch.equal(weight, after[name]) for name, weight in trainer.model.trainable.items())


def test_flow_grpos_optimizer_steps_twice_an_iteration_on_rewards_of_shapes(run: Run) -> None:
    learner, _, _ = their("flow_grpo", run, kl_coef=0.04)
    learner.step()
    assert learner.peer.recipe.kl_coef == 0.04
    assert {int(state["step"]) for state in learner.peer.optimizer.state.values()} == {2}
    assert [group["lr"] for group in learner.peer.optimizer.param_groups] == [1e-3]
    assert learner.peer.ema.interval == 8
    assert FlowGRPOCode(is_fast=True).recipe.window == 3


def test_nft_steps_once_an_inner_epoch_and_then_samples_with_what_it_trained(run: Run) -> None:
    learner, pipeline, _ = their("nft", run, inner_epochs=3, num_times=2)
    learner.step()
    assert {int(state["step"]) for state in learner.variables["optimizer"].state.values()} == {3}
    assert learner.variables["current_accumulated_steps"] == 3 * 2 * 2
    assert learner.variables["filtered_samples"]["advantages"].shape == (8, 2)
    pairs = zip(
        learner.variables["transformer_trainable_parameters"],
        learner.variables["old_transformer_trainable_parameters"],
        strict=True,
    )
    assert all(torch.equal(weight, old) for weight, old in pairs)
    sampled: list[list[str]] = []
    pipeline.transformer.register_forward_hook(lambda module, *_: sampled.append(list(module.active_adapters)))
    learner.side = replace(learner.side, inner_epochs=1)
    learner.step()
    assert sampled[0] == ["old"]
    assert sampled[-1] == ["default"]


def test_nft_keeps_a_share_of_the_weights_that_sample(run: Run) -> None:
    learner, _, _ = their("nft", run, decay_type=1, inner_epochs=1)
    weights, old = (
        learner.variables[name] for name in ("transformer_trainable_parameters", "old_transformer_trainable_parameters")
    )
    before = [weight.clone() for weight in old]
    learner.step()
    for weight, was, now in zip(weights, before, old, strict=True):
        torch.testing.assert_close(now, 0.25 * was + 0.75 * weight)


def test_a_script_without_its_statements_is_refused(nft_checkout: Path) -> None:
    script = nft_checkout / "scripts/train_nft_sd3.py"
    script.write_text(SCRIPT.replace("inner_epoch", "i"))
    with pytest.raises(ValueError, match="has the loop over inner epochs 0 times, not once; clone https"):
        NFTCheckout(nft_checkout).update()
    (nft_checkout / "flow_grpo/ema.py").unlink()
    with pytest.raises(ValueError, match=r"no checkout of DiffusionNFT: it lacks flow_grpo/ema\.py"):
        NFTCheckout(nft_checkout)


def test_sides_without_their_checkout_or_recipe_say_what_they_need(tmp_path: Path) -> None:
    run = Run(seed=0, learning_rate=1e-3, scratch=tmp_path)
    assert "--checkout" in FlowGRPOCode().missing(run)
    assert "--nft-checkout" in NFTCode().missing(run)
    assert Ours(recipe="flow_grpo").missing(run) == ""
    assert "algorithm=not_there" in Ours(recipe="not_there").missing(run)


def test_ours_trains_for_two_iterations_and_writes_its_curve(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("\n".join(TEXTS))
    overrides = (
        *("train.prompts_per_iteration=2", "train.group_size=4", "evaluate.images_per_prompt=2"),
        f"prompts.held_out={held_out}",
    )
    learner = Ours(recipe="flow_grpo_fast", overrides=overrides)(run)
    ticks = iter(range(100))
    monkeypatch.setattr("benchmarks.time_to_reward.run._seconds", lambda: float(next(ticks)))
    points = trained(learner, seconds=2, every=2)
    assert learner.trainer.iteration == 2
    assert [point.seconds for point in points] == [0, 2]
    assert 0 < points[1].reward <= 1
    # what is judged is the average, and its own weights are back
    own = {name: weight.clone() for name, weight in learner.trainer.model.trainable.items()}
    graded = learner.evaluate().scores["shapes"]
    with learner.trainer.ema.applied():
        assert torch.equal(evaluation_of(learner.trainer)().scores["shapes"], graded)
    assert all(torch.equal(weight, own[name]) for name, weight in learner.trainer.model.trainable.items())
    assert any(not torch.equal(average, own[name]) for name, average in learner.trainer.ema.averages.items())


def test_all_sides_are_judged_on_one_grid_noise_and_list_of_prompts(run: Run) -> None:
    trainer = Ours(recipe="smart_grpo", overrides=("algorithm.schedule.num_steps=6",))(run).trainer
    ours = evaluation_of(trainer)
    theirs = Judge(replace(run, seed=9, scratch=run.scratch / "other"))._evaluation
    assert tuple(ours.grid) == tuple(theirs.grid) == SD3Schedule(10)()
    assert (ours.seed, ours.texts, ours.images_per_prompt) == (theirs.seed, theirs.texts, theirs.images_per_prompt)
    assert (len(ours.texts), ours.images_per_prompt) == (64, 8)
