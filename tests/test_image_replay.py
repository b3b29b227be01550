"""Images noised again: what is learned from them is what the papers' losses make of diffusers' own velocities."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from fastgrpo.algorithm.advantage import GroupAdvantage
from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.dynamics import ODE
from fastgrpo.algorithm.noise import MATCHING_STREAM, GaussianNoise
from fastgrpo.algorithm.objective.images import ImageObjective
from fastgrpo.algorithm.objective.matching_ratio import MatchingRatio
from fastgrpo.algorithm.objective.nft import NFT
from fastgrpo.algorithm.schedule import FewSteps
from fastgrpo.algorithm.solver import AdamsBashforth, Euler, Solver
from fastgrpo.algorithm.timesteps import DrawnTimes
from fastgrpo.image_replay import ImageReplay, NoisedImages
from fastgrpo.memory.batch_size import BatchSize
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.old_policy import OldPolicy
from fastgrpo.rollout import ImageRollout
from fastgrpo.sampler import Sampler
from fastgrpo.signals import make_replay, make_rollout
from fastgrpo.types import Conditions, Noise, Prompts, Samples, TrainedImages
from fastgrpo.update import Update, UpdateStats
from fastgrpo_kernels import philox_normal

PROMPTS = Prompts(["a red circle", "two blue squares"], ids=[4, 9])
GROUP_SIZE, SEED = 3, 5
SAMPLES = Samples.all_of(PROMPTS, GROUP_SIZE)
# one of them is neither better nor worse than its group
ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, 2.5, -1.7, -0.3])


class Recorder(torch.optim.SGD):
    """Keeps the gradients of the steps that it takes."""

    def __init__(self, model: StableDiffusion3, lr: float = 0.0) -> None:
        super().__init__(model.trainable.values(), lr=lr, fused=True)
        self.gradients: list[list[Tensor]] = []

    def step(self, closure=None):
        if not getattr(self, "found_inf", torch.zeros(())):
            self.gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            super().step(closure)


def make_model(weights: Path, adaptation: Any = None, **settings: Any) -> StableDiffusion3:
    """Its trained weights have left their start."""
    model = StableDiffusion3(
        weights=str(weights),
        adaptation=adaptation or LoRA(rank=4),
        resolution=32,
        guidance_scale=1.0,
        max_sequence_length=0,
        use_t5=False,
        **settings,
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.trainable.values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return model


@pytest.fixture
def model(tiny_weights: Path) -> StableDiffusion3:
    return make_model(tiny_weights)


def x_0() -> Tensor:
    return torch.randn(6, 16, 4, 4, generator=torch.Generator().manual_seed(1))


def make_update(
    model: StableDiffusion3,
    optimizer: torch.optim.Optimizer,
    objective: ImageObjective,
    times: DrawnTimes,
    old_policy: OldPolicy | None = None,
    micro_batch: int = 4,
    sampling_batch: int = 5,
    **settings: Any,
) -> Update:
    replay = ImageReplay(
        model=model,
        old_policy=old_policy or OldPolicy(model.trainable),
        times=times,
        objective=objective,
        sampling=BatchSize(value=sampling_batch, key="runtime.sampling_batch"),
        seed=SEED,
    )
    values: dict[str, Any] = {"optimizer_steps": 1, "max_grad_norm": 1e9, "seed": 0} | settings
    batch_size = BatchSize(value=micro_batch, key="runtime.micro_batch")
    return Update(model=model, replay=replay, optimizer=optimizer, batch_size=batch_size, **values)


def apply(
    update: Update, model: StableDiffusion3, advantages_B: Tensor = ADVANTAGES, iteration: int = 1
) -> UpdateStats:
    """On six images, in the order of the optimizer steps."""
    shares = update.shares(len(advantages_B), iteration)
    rows = tuple(row for share in shares for row in share)
    samples = Samples(PROMPTS, GROUP_SIZE, rows)
    trained = TrainedImages(samples, x_0()[list(rows)])
    conditions = model.encode(samples.texts)
    return update(trained, conditions, advantages_B[list(rows)], shares, iteration=iteration)


@dataclass
class Plain:
    """The same by hand: diffusers' transformer with the adapters' product in its weights, sample by sample."""

    model: StableDiffusion3
    weights: Path

    def velocity(self, trained: dict[str, Tensor], x: Tensor, t: Tensor, text: str) -> Tensor:
        """Differentiable in ``trained``."""
        transformer = SD3Transformer2DModel.from_pretrained(self.weights / "transformer").requires_grad_(False)
        parameters = {}
        for name, weight in transformer.named_parameters():
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_A.weight" in trained:
                # alpha 64 of rank 4
                weight = weight + 16 * trained[f"{layer}.lora_B.weight"] @ trained[f"{layer}.lora_A.weight"]
            parameters[name] = weight
        c = self.model.encode([text])
        arguments = (x[None], c.embeds_BLC, c.pooled_BC, 1000 * t[None])
        out = torch.func.functional_call(transformer, parameters, arguments, {"return_dict": False})
        return out[0][0]


def eps(update: int, draw: int, per_image: int, sample: int, *, is_shared: bool = False) -> Tensor:
    prompt_id, place = PROMPTS.ids[sample // GROUP_SIZE], 0 if is_shared else sample % GROUP_SIZE
    stream = MATCHING_STREAM + update * per_image + draw
    return philox_normal(SEED, stream, torch.tensor([prompt_id]), torch.tensor([place]), 256)[0, 0].view(16, 4, 4)


def nft_loss(v: Tensor, v_old: Tensor, v_reference: Tensor, x_0: Tensor, eps: Tensor, t: Tensor, a: float) -> Tensor:
    """beta 1/2, max_advantage 2, kl_coef .1, as it is published."""
    if a == 0:
        return torch.zeros(())
    x_t = (1 - t) * x_0 + t * eps
    r = max(-1.0, min(1.0, a / 2)) / 2 + 0.5
    total = torch.zeros(())
    for weight, sign in ((r, 0.5), (1 - r, -0.5)):
        error = x_t - t * (v_old + sign * (v - v_old)) - x_0
        total = total + weight * error.square().mean() / error.detach().abs().mean()
    return 4 * total + 0.1 * (v - v_reference).square().mean()


def awm_loss(v: Tensor, v_old: Tensor, v_reference: Tensor, x_0: Tensor, eps: Tensor, t: Tensor, a: float) -> Tensor:
    """clip_range .002, proximal_coef .5."""
    if a == 0:
        return torch.zeros(())
    u = eps - x_0
    ratio = ((v_old - u).square().mean() - (v - u).square().mean()).exp()
    clipped = ratio.clamp(1 - 0.002, 1 + 0.002)
    return torch.maximum(-a * ratio, -a * clipped) + 0.5 * (v - v_old).square().mean()


NFT_KL = NFT(beta=0.5, max_advantage=2.0, kl_coef=0.1)
AWM = MatchingRatio(clip_range=0.002, proximal_coef=0.5)


@pytest.mark.parametrize(
    ("objective", "loss", "times", "updates", "optimizer_steps"),
    [
        (NFT_KL, nft_loss, DrawnTimes(per_image=2), 2, 1),
        (AWM, awm_loss, DrawnTimes(is_shared=True), 3, 1),
        (AWM, awm_loss, DrawnTimes(), 2, 2),
    ],
    ids=["nft", "awm shared", "awm in shares"],
)
def test_every_optimizer_step_follows_the_published_loss(
    objective: ImageObjective,
    loss: Any,
    times: DrawnTimes,
    updates: int,
    optimizer_steps: int,
    model: StableDiffusion3,
    tiny_weights: Path,
) -> None:
    plain, rate = Plain(model, tiny_weights), 0.5
    before = {name: weight.detach().clone() for name, weight in model.trainable.items()}
    recorder = Recorder(model, lr=rate)
    update = make_update(model, recorder, objective, times, updates=updates, optimizer_steps=optimizer_steps)
    stats = apply(update, model)
    t_UDB = times(2, GROUP_SIZE, updates, 1, SEED)
    shares = update.shares(6, 1)
    now = {name: weight.clone() for name, weight in before.items()}
    no_adapters: dict[str, Tensor] = {}
    losses: list[float] = []
    for number, gradients in enumerate(recorder.gradients):
        u, share = number // optimizer_steps, shares[number % optimizer_steps]
        weights = {name: weight.clone().requires_grad_() for name, weight in now.items()}
        total, drifts = torch.zeros(()), []
        for draw in range(times.per_image):
            for b in share:
                t, noise = t_UDB[u, draw, b], eps(u, draw, times.per_image, b, is_shared=times.is_shared)
                x_t, text = (1 - t) * x_0()[b] + t * noise, PROMPTS.texts[b // GROUP_SIZE]
                v = plain.velocity(weights, x_t, t, text)
                with torch.no_grad():
                    v_old = plain.velocity(before, x_t, t, text)
                    v_reference = plain.velocity(no_adapters, x_t, t, text)
                one = loss(v, v_old, v_reference, x_0()[b], noise, t, ADVANTAGES[b].item())
                total = total + one
                losses.append(one.item())
                drifts.append((v - v_old).square().mean().item())
        expected = torch.autograd.grad(total / (len(share) * times.per_image), list(weights.values()))
        for found, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-5 * max(1.0, wanted.abs().max().item()))
        # by the gradient that was taken, so that rounding does not add up
        now = {name: now[name] - rate * gradient for name, gradient in zip(now, gradients, strict=True)}
    assert len(recorder.gradients) == stats.optimizer_steps == updates * optimizer_steps
    assert stats.means["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert stats.means["drift"] == pytest.approx(sum(drifts) / len(drifts), rel=1e-3)
    assert stats.means["drift"] > 1e-6
    assert ("kl" in stats.means) == (objective.kl_coef > 0)


def rates(model: StableDiffusion3) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.trainable.items()}


@pytest.mark.parametrize("times", [DrawnTimes(per_image=2), DrawnTimes(is_shared=True)], ids=["each", "shared"])
def test_batches_and_padding_do_not_change_what_is_learned(
    times: DrawnTimes, model: StableDiffusion3, tiny_weights: Path
) -> None:
    found, before = [], rates(model)
    for micro_batch, sampling_batch in ((6, 6), (4, 5), (1, 2)):
        with torch.no_grad():
            for name, weight in model.trainable.items():
                weight.copy_(before[name])
        recorder = Recorder(model, lr=0.5)
        stats = apply(make_update(model, recorder, NFT_KL, times, None, micro_batch, sampling_batch, updates=3), model)
        found.append((recorder.gradients, stats.means))
    for gradients, means in found[1:]:
        assert means == pytest.approx(found[0][1], rel=1e-4)
        for step, expected in zip(gradients, found[0][0], strict=True):
            for one, other in zip(step, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_batch_that_does_not_fit_is_halved_and_begun_anew(
    model: StableDiffusion3, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Recorder(model)
    apply(make_update(model, whole, NFT(), DrawnTimes(), None, 4, 6, updates=2), model)
    velocity, sizes = StableDiffusion3.velocity, []

    def failing(self, x_BCHW: Tensor, *arguments: Any) -> Any:
        sizes.append((len(x_BCHW), torch.is_grad_enabled()))
        if len(x_BCHW) > 3:
            raise torch.OutOfMemoryError("too large")
        return velocity(self, x_BCHW, *arguments)

    monkeypatch.setattr(StableDiffusion3, "velocity", failing)
    halved = Recorder(model)
    update = make_update(model, halved, NFT(), DrawnTimes(), None, 4, 6, updates=2)
    stats = apply(update, model, iteration=0)
    # sampling in threes, both updates in twos, from the first one's second try on
    assert sizes == [(6, False), *[(3, False)] * 4, (4, True), *[(2, True)] * 6]
    assert stats.deviation is not None
    assert math.isnan(stats.deviation)
    apply(make_update(model, halved, NFT(), DrawnTimes(), None, 2, 3, updates=2), model)
    for one, other in zip(halved.gradients[2], whole.gradients[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


def test_the_old_policy_is_asked_merged_in_batches_of_sampling_and_never_for_the_first_update(
    model: StableDiffusion3, monkeypatch: pytest.MonkeyPatch
) -> None:
    velocity, seen = StableDiffusion3.velocity, []

    def watching(self, x_BCHW: Tensor, t: Any, *arguments: Any) -> Any:
        is_merged = self.adaptation._mode.is_off
        seen.append((len(x_BCHW), torch.is_grad_enabled(), is_merged, self._is_sampling, self._is_lossy))
        return velocity(self, x_BCHW, t, *arguments)

    monkeypatch.setattr(StableDiffusion3, "velocity", watching)
    apply(make_update(model, Recorder(model), NFT(), DrawnTimes(per_image=2), None, 3, 6, updates=3), model)
    asked = (6, False, True, True, False)
    assert seen == [asked] * 4 + [(3, True, False, False, False)] * 12


def test_velocity_deviation_is_the_rounding_of_merging(model: StableDiffusion3) -> None:
    update = make_update(model, Recorder(model), NFT(), DrawnTimes(), updates=2)
    found = [apply(update, model, iteration=iteration).deviation for iteration in (0, 1, 9, 10)]
    assert found[1:3] == [None, None]
    for deviation in (found[0], found[3]):
        assert deviation is not None
        assert 0 < deviation < 1e-4
    shares = make_update(model, Recorder(model), NFT(), DrawnTimes(), updates=1, optimizer_steps=2)
    assert 0 < (apply(shares, model, iteration=1).deviation or 0) < 1e-4


@pytest.mark.parametrize("fault", ["texts", "weights", "times"])
def test_velocity_deviation_sees_when_sampling_and_update_disagree(
    fault: str, model: StableDiffusion3, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ImageReplay._asked

    def wrong(self, rows: NoisedImages, update: int, draw: int, conditions: Conditions) -> Tensor:
        if fault == "weights":
            return 1.5 * asked(self, rows, update, draw, conditions)
        if fault == "times":
            return asked(self, replace(rows, t_UDB=rows.t_UDB.flip(2)), update, draw, conditions)
        return asked(self, rows, update, draw, conditions.take(range(len(conditions) - 1, -1, -1)))

    monkeypatch.setattr(ImageReplay, "_asked", wrong)
    stats = apply(make_update(model, Recorder(model), NFT(), DrawnTimes(), None, 6, 6), model, iteration=0)
    assert stats.deviation is not None
    # the miniature hardly reads its text
    assert stats.deviation > (1e-3 if fault == "texts" else stats.max_deviation)


def test_draws_are_new_in_each_update_and_iteration_and_of_each_sample() -> None:
    rows = torch.arange(6)
    nothing = torch.empty(0, 2, 6, 1)
    images = NoisedImages(rows // 3, rows % 3, torch.zeros(6, 1), torch.zeros(3, 2, 6), nothing)
    streams = [images.noise(SEED, update, draw).stream for update in range(3) for draw in range(2)]
    assert streams == list(range(MATCHING_STREAM, MATCHING_STREAM + 6))
    # prompts of another iteration have other ids
    assert images.noise(SEED, 0, 0).prompt_ids_B.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.noise(SEED, 0, 0).sample_ids_B.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_slow_old_policy_is_compared_with_in_the_first_step_too(model: StableDiffusion3, tiny_weights: Path) -> None:
    old = OldPolicy(model.trainable, growth=0.25, limit=0.5)
    with torch.no_grad():
        for weight in model.trainable.values():
            weight.mul_(1.5)
    policy = rates(model)
    recorder = Recorder(model)
    stats = apply(make_update(model, recorder, AWM, DrawnTimes(), old, updates=1), model, iteration=0)
    assert stats.deviation is None
    assert stats.means["drift"] > 1e-6
    for name, weight in model.trainable.items():
        assert torch.equal(weight, policy[name])
    plain, t_B = Plain(model, tiny_weights), DrawnTimes()(2, GROUP_SIZE, 1, 0, SEED)[0, 0]
    weights = {name: weight.clone().requires_grad_() for name, weight in policy.items()}
    total = torch.zeros(())
    for b in range(6):
        x_t, text = (1 - t_B[b]) * x_0()[b] + t_B[b] * eps(0, 0, 1, b), PROMPTS.texts[b // GROUP_SIZE]
        v = plain.velocity(weights, x_t, t_B[b], text)
        v_old = plain.velocity(old.weights, x_t, t_B[b], text).detach()
        total = total + awm_loss(v, v_old, v, x_0()[b], eps(0, 0, 1, b), t_B[b], ADVANTAGES[b].item())
    for found, wanted in zip(
        recorder.gradients[0], torch.autograd.grad(total / 6, list(weights.values())), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-6)


def test_too_much_drift_ends_the_iteration(model: StableDiffusion3) -> None:
    def drifts(max_drift: float) -> tuple[int, float, int]:
        recorder = Recorder(model, lr=0.5)
        update = make_update(model, recorder, NFT(), DrawnTimes(), updates=4, max_drift=max_drift)
        stats = apply(update, model)
        with torch.no_grad():
            for name, weight in model.trainable.items():
                weight.copy_(before[name])
        return stats.optimizer_steps, stats.means["drift"], len(recorder.gradients)

    before = rates(model)
    assert drifts(math.inf)[0] == 4
    after_one, after_two = (make_drift_after(steps, model, before) for steps in (1, 2))
    assert after_one < after_two
    # the third step's drift is that of two steps, and is above the bound: it is not taken
    steps, drift, taken = drifts((after_one + after_two) / 2)
    assert (steps, taken) == (2, 2)
    assert drift == pytest.approx(after_two)
    assert all(weight.grad is None for weight in model.trainable.values())


def make_drift_after(steps: int, model: StableDiffusion3, before: dict[str, Tensor]) -> float:
    """Of the policy after so many steps, in the next one's draws."""
    update = make_update(model, Recorder(model, lr=0.5), NFT(), DrawnTimes(), updates=4)
    seen: list[float] = []
    accumulate = Update._accumulate

    def keeping(self, *arguments: Any) -> Any:
        terms = accumulate(self, *arguments)
        count = sum(term.num_samples for term in terms)
        seen.append(sum(term.means["drift"].item() * term.num_samples for term in terms) / count)
        return terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Update, "_accumulate", keeping)
        apply(update, model)
    with torch.no_grad():
        for name, weight in model.trainable.items():
            weight.copy_(before[name])
    return seen[steps]


@pytest.mark.parametrize("solver", [Euler(), AdamsBashforth(stride=1)], ids=["euler", "adams_bashforth"])
def test_a_rollout_of_images_hands_on_what_its_images_are_decoded_from(solver: Solver, model: StableDiffusion3) -> None:
    sampler = Sampler(model=model, grid=FewSteps(3)(), batch_sizes=BatchSizes.of(2, 4, 3), solver=solver)
    start = torch.randn(6, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    conditions = model.encode(SAMPLES.texts)
    seen: list[Tensor] = []
    found = ImageRollout(sampler=sampler)(SAMPLES, conditions, Noise(start, {}, 0), 3, seen.append)
    assert isinstance(found.trained, TrainedImages)
    assert torch.equal(torch.cat(seen), found.images_BCHW)
    x = start
    with model.sampling():
        if isinstance(solver, Euler):
            for t, t_next in zip(sampler.grid, sampler.grid[1:], strict=False):
                v = model.velocity(x, t, conditions)
                assert isinstance(v, Tensor)
                x = x + (t_next - t) * v
            torch.testing.assert_close(found.trained.x_0_BCHW, x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.decode(found.trained.x_0_BCHW), found.images_BCHW, rtol=0, atol=1e-5)
    assert found.trained.samples is SAMPLES
    assert found.gradients == []


def make_algorithm() -> Algorithm:
    return Algorithm(
        schedule=FewSteps(3),
        noise=GaussianNoise(),
        dynamics=ODE(),
        timesteps=DrawnTimes(),
        advantage=GroupAdvantage(),
        objective=NFT(),
    )


def test_guidance_with_two_branches_is_refused(tiny_weights: Path) -> None:
    model = StableDiffusion3(
        weights=str(tiny_weights),
        adaptation=LoRA(rank=4),
        resolution=32,
        guidance_scale=4.5,
        max_sequence_length=0,
        use_t5=False,
    )
    one = BatchSize(value=1, key="runtime.sampling_batch")
    with pytest.raises(ValueError, match=r"NFT learns from images and trains the branch.*use model\.guidance_scale=1"):
        make_replay(make_algorithm(), model, OldPolicy(model.trainable), one, seed=0)


def test_what_steps_alone_can_do_is_refused(model: StableDiffusion3) -> None:
    with pytest.raises(
        ValueError, match=r"^train\.gradients=reweight takes the gradient of each step.*learns from images"
    ):
        make_update(model, Recorder(model), NFT(), DrawnTimes(), reweights=True)


def test_full_fine_tuning_learns_from_images(tiny_weights: Path) -> None:
    model = make_model(tiny_weights, FullFineTuning(keep_reference=True))
    recorder = Recorder(model, lr=1e-3)
    stats = apply(make_update(model, recorder, NFT_KL, DrawnTimes(), updates=2), model, iteration=0)
    assert stats.deviation == 0.0, "the same weights, and float32"
    assert stats.means["drift"] > 0
    assert all(bool(gradient.isfinite().all()) for gradient in recorder.gradients[1])


def test_make_rollout_gives_what_the_objective_learns_from(model: StableDiffusion3) -> None:
    sampler = Sampler(model=model, grid=FewSteps(3)(), batch_sizes=BatchSizes.of(2))
    rollout = make_rollout(make_algorithm(), sampler, seed=0)
    assert isinstance(rollout, ImageRollout)


def test_an_iteration_without_any_difference_learns_nothing(model: StableDiffusion3) -> None:
    recorder = Recorder(model)
    apply(make_update(model, recorder, NFT_KL, DrawnTimes(), updates=2), model, torch.zeros(6))
    assert all(not gradient.any() for step in recorder.gradients for gradient in step)
