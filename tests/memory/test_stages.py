"""The planner over the model in miniature: what it predicts for many samples is what these samples then use."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.memory.batch_size import DoesNotFit
from fastgrpo.memory.byte_count import LiveBytes
from fastgrpo.memory.device import CountingMeter, Meter
from fastgrpo.memory.plan import DECODING, REWARD, SAMPLING, TRAINING, Cost, MemoryPlan, plan_memory
from fastgrpo.memory.stages import MemoryPlanner
from fastgrpo.models.adapter import FlowModel
from fastgrpo.parts import build_model, build_rewards
from fastgrpo.pieces import build
from fastgrpo.rollout import StepRollout
from fastgrpo.signals import rehearsal
from fastgrpo.training import train
from tests.tiny_config import make_config, make_overrides

PLENTY = 2**40


class Planned:
    """A plan of the miniature, and how its models were built."""

    def __init__(self, weights: Path, output: Path, memory: int, *overrides: str, samples: int = 24) -> None:
        config = make_config(weights, output, *overrides)
        self.built: list[bool] = []

        def build_with(checkpointing: bool) -> FlowModel:
            self.built.append(checkpointing)
            config.runtime.checkpointing = checkpointing
            return build_model(config)

        algorithm = build(config.algorithm)
        self.planner = MemoryPlanner(
            algorithm=algorithm,
            make_replay=rehearsal(algorithm),
            samples=samples,
            optimizer_steps=2,
            rewards=build_rewards(config)[0],
        )
        self.model, self.plan = self.planner(build_with, CountingMeter, memory, False)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_what_is_predicted_for_many_samples_is_what_they_use(
    tiny_weights: Path, tmp_path: Path, guidance: float
) -> None:
    planned = Planned(tiny_weights, tmp_path / "run", PLENTY, f"model.guidance_scale={guidance}")
    assert list(planned.plan.choices) == [SAMPLING, DECODING, REWARD, TRAINING]
    model, num_samples = planned.model, 16
    # the gradients of one sample are there when the next is replayed
    replay = planned.planner.make_replay(model)
    replay.rehearse(torch.zeros(1, *model.latent_shape), model.encode([""]))
    with LiveBytes() as counter:
        replay.rehearse(torch.zeros(num_samples, *model.latent_shape), model.encode([""]).repeat(num_samples))
    cost = planned.plan.choices[TRAINING].cost
    gradients = sum(weight.nbytes for weight in model.trainable.values())
    assert counter.peak == pytest.approx(num_samples * cost.per_sample, rel=0.05)
    assert cost.bytes(num_samples) >= counter.peak + gradients
    with torch.no_grad(), LiveBytes() as counter:
        model.decode(torch.zeros(num_samples, *model.latent_shape))
    assert counter.peak == pytest.approx(num_samples * planned.plan.choices[DECODING].cost.per_sample, rel=0.05)


def test_gradients_that_wait_for_the_update_are_in_the_plan(tiny_weights: Path, tmp_path: Path) -> None:
    planned = Planned(tiny_weights, tmp_path / "run", PLENTY)
    waiting = replace(planned.planner, reweights=True)._held(planned.model) - planned.planner._held(planned.model)
    # those of the first of two optimizer steps
    assert waiting == 12 * sum(weight.nbytes for weight in planned.model.trainable.values())


def test_an_old_policy_that_lags_is_in_the_plan(tiny_weights: Path, tmp_path: Path) -> None:
    planned = Planned(tiny_weights, tmp_path / "run", PLENTY)
    kept = replace(planned.planner, lags=True)._held(planned.model) - planned.planner._held(planned.model)
    # it, and the policy while it is sampled
    assert kept == 2 * sum(weight.nbytes for weight in planned.model.trainable.values())


@pytest.mark.parametrize("has_two_branches", [False, True])
def test_what_is_kept_of_a_sample_is_what_a_rollout_leaves(
    tiny_weights: Path, tmp_path: Path, has_two_branches: bool
) -> None:
    overrides = (f"model.guidance_scale={4.5 if has_two_branches else 1.0}", "model.dtype=bfloat16")
    planned = Planned(tiny_weights, tmp_path / "plan", PLENTY, *overrides, samples=1)
    more = replace(planned.planner, samples=2)._held(planned.model) - planned.planner._held(planned.model)
    trainer = build_trainer(make_config(tiny_weights, tmp_path / "run", *overrides))
    left: list[int] = []
    rollout = trainer.rollout

    def spy(samples, conditions, *arguments, **settings):
        trajectories = rollout(samples, conditions, *arguments, **settings)
        steps = trajectories.trained
        tensors = [trajectories.images_BCHW, trajectories.start_BCHW, steps.x_TBCHW, steps.x_next_TBCHW]
        tensors += [steps.unconditional_TBCHW, steps.mean_TBCHW, conditions.embeds_BLC, conditions.pooled_BC]
        tensors.append(conditions.lengths_B)
        left.append(sum(tensor.nbytes for tensor in tensors) // len(samples))
        return trajectories

    trainer.rollout = spy
    trainer.step()
    assert more == left[0]


def test_full_fine_tuning_is_planned_for_the_weights_that_are_trained(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[torch.dtype]] = []
    plan = MemoryPlanner._plan

    def spy(self, model: FlowModel, *arguments) -> MemoryPlan:
        # in the type that they are trained in, and not that of the model
        seen.append({weight.dtype for weight in model.trainable.values()})
        return plan(self, model, *arguments)

    monkeypatch.setattr(MemoryPlanner, "_plan", spy)
    overrides = ("adaptation=full", "model.dtype=bfloat16", "runtime.micro_batch=0")
    # keys of LoRA are none of it
    words = [word for word in make_overrides(tiny_weights, tmp_path / "run", *overrides) if "adaptation." not in word]
    trainer = build_trainer(load_config("train", words))
    assert seen == [{torch.float32}]
    assert trainer.plan is not None
    gradients_and_weights = 2 * 4 * sum(weight.numel() for weight in trainer.model.trainable.values())
    assert trainer.plan.choices[TRAINING].cost.fixed >= gradients_and_weights


def batches_of(plan: MemoryPlan) -> dict[str, int]:
    return {name: plan.batch(name) for name in plan.choices}


def test_the_plan_shrinks_with_the_memory_and_leaves_the_recipe_and_the_weights_alone(
    tiny_weights: Path, tmp_path: Path
) -> None:
    roomy = Planned(tiny_weights, tmp_path / "roomy", PLENTY)
    assert batches_of(roomy.plan) == {SAMPLING: 24, DECODING: 24, REWARD: 24, TRAINING: 12}
    assert all(weight.grad is None for weight in roomy.model.trainable.values())
    decoding = roomy.plan.choices[DECODING]
    memory = int((decoding.beside + decoding.cost.fixed + 5 * decoding.cost.per_sample) / 0.9)
    tight = Planned(tiny_weights, tmp_path / "tight", memory).plan
    assert tight.batch(DECODING) < roomy.plan.batch(DECODING) == 24
    assert tight.choices[DECODING].beside < decoding.beside, "a smaller portion is scored at a time"
    assert not tight.checkpointing
    assert all(choice.peak_bytes <= 0.9 * memory for choice in tight.choices.values())
    with pytest.raises(DoesNotFit, match=r"one sample of \w+ needs .* lower model\.resolution"):
        Planned(tiny_weights, tmp_path / "none", int(roomy.plan.held / 0.9))


class Scripted(MemoryPlanner):
    """A planner whose update costs 100 bytes a sample, or 30 with checkpointing."""

    def _plan(self, model: FlowModel, meter: Meter, memory: int, checkpointing: bool) -> MemoryPlan:
        costs = {SAMPLING: Cost(0, 1), DECODING: Cost(0, 1), TRAINING: Cost(0, 30 if checkpointing else 100)}
        return plan_memory(
            costs, {SAMPLING: 8, TRAINING: 8}, held=0, memory=int(memory / 0.9) + 1, checkpointing=checkpointing
        )


@pytest.mark.parametrize(
    ("memory", "asked", "built", "batch"),
    [
        (200, False, [False], 2),
        (199, False, [False, True], 4),
        (900, True, [True], 8),
        (30, False, [False, True], 1),
    ],
)
def test_checkpointing_comes_on_only_where_two_samples_do_not_fit(
    tiny_weights: Path, tmp_path: Path, memory: int, asked: bool, built: list[bool], batch: int
) -> None:
    config = make_config(tiny_weights, tmp_path / "run")
    seen: list[bool] = []

    def build_with(checkpointing: bool) -> FlowModel:
        seen.append(checkpointing)
        return build_model(config)

    algorithm = build(config.algorithm)
    planner = Scripted(algorithm=algorithm, make_replay=rehearsal(algorithm), samples=8, optimizer_steps=1)
    _, plan = planner(build_with, CountingMeter, memory, asked)
    assert seen == built
    assert plan.checkpointing is built[-1]
    assert plan.batch(TRAINING) == batch


def test_a_run_plans_shows_and_keeps_its_sizes_and_a_resumed_run_cuts_as_it_began(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("runtime.micro_batch=0", "runtime.decode_batch=5", "train.iterations=1")
    train(make_config(tiny_weights, tmp_path / "run", *overrides))
    shown = capsys.readouterr().out
    assert "memory plan: 90% of" in shown
    assert "checkpointing off" in shown
    begun = OmegaConf.load(tmp_path / "run" / "config.yaml").runtime
    # 2 prompts x 3 samples, all at once; what was given stays
    assert (begun.micro_batch, begun.sampling_batch, begun.decode_batch) == (6, 6, 5)

    monkeypatch.setattr(
        "fastgrpo.memory.model_on_device.plan_device", lambda *_: pytest.fail("a resumed run plans nothing")
    )
    again = make_config(tiny_weights, tmp_path / "run", *overrides, "train.iterations=2", "resume=true")
    trainer = build_trainer(again)
    assert trainer.update.batch_size.value == 6
    assert isinstance(trainer.rollout, StepRollout)
    assert trainer.rollout.sampler.batch_sizes.decoding.value == 3, "as even as 6 rows in portions of at most 5"
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").runtime == begun


def test_a_planned_run_is_the_run_whose_sizes_were_given(tiny_weights: Path, tmp_path: Path) -> None:
    weights = []
    for name, micro_batch in (("planned", 0), ("given", 6)):
        config = make_config(tiny_weights, tmp_path / name, f"runtime.micro_batch={micro_batch}", "train.iterations=1")
        trainer = build_trainer(config)
        trainer.run()
        weights.append({key: weight.detach().clone() for key, weight in trainer.model.trainable.items()})
    assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())
