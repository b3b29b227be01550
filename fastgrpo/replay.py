"""What ``update`` computes again under gradient, and the loss of it: of the algorithm's signal.

``StepReplay`` replays trained steps, by the function and in the batches that made them: before the first optimizer step
of an iteration the ratio is exactly 1.  Source: Flow-GRPO, arXiv:2505.05470.

``ImageReplay`` noises images again, x_t = (1 - t) x_0 + t eps, at pairs (t, eps) that are drawn anew for each update.
eps is a function of its ids and never stored.  What the old policy says there, v_old, is computed before the first
optimizer step, in one pass with adapters merged, in sampling's batches; that step itself needs none where the policy is
the old one.  So v_old takes (updates - 1) * per_image latents a sample in the model's type: 128 KiB each for
65,536 elements in bfloat16.  Source: DiffusionNFT, arXiv:2509.16117.
Letters: B samples of this rank, T trained steps, U updates, D draws of each, C H W of a latent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.dynamics import Dynamics
from fastgrpo.algorithm.noise import MATCHING_STREAM
from fastgrpo.algorithm.objective.images import ImageObjective
from fastgrpo.algorithm.objective.steps import Replayed, StepObjective
from fastgrpo.algorithm.timesteps import DrawnTimes
from fastgrpo.memory.batch_size import BatchSize
from fastgrpo.memory.batches import Batch, in_batches
from fastgrpo.models.adapter import FlowModel
from fastgrpo.old_policy import OldPolicy
from fastgrpo.types import Conditions, SampleGradients, TrainedImages, TrainedSteps
from fastgrpo_kernels import GuidedVelocity, MatchingErrors, PhiloxNoise, add_noise, matching_loss

# iterations in which the old policy is asked at the first draw too, to be compared with the gradient's own v
CHECKED_EVERY = 10

# rows of a tensor along a dimension
Select = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Term:
    """The loss of one batch at one step or draw, and the means over its samples that are logged.

    ``deviation``, where it is known, says how far rollout and update disagree about the same policy.
    """

    num_samples: int
    loss: Tensor
    means: Mapping[str, Tensor]
    deviation: Tensor | None = None


class Material(Protocol):
    """What an iteration is learned from, one row a sample."""

    def select(self, select: Select) -> Self:
        """Some of the samples."""


class Replay(Protocol):
    """What ``update`` knows of a signal."""

    @property
    def objective(self) -> StepObjective | ImageObjective:
        """The loss of a term."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the means of a term."""

    @property
    def has_log_prob(self) -> bool:
        """Whether a rollout can take the gradient of what is learned, that of each step's log_prob."""

    @property
    def deviation_name(self) -> str:
        """Of the metric that is the largest deviation before the first optimizer step."""

    @property
    def max_deviation(self) -> float:
        """What it may be in a run that goes on."""

    def begin(self, trained: Any, conditions_B: Conditions, iteration: int, num_updates: int, num_shares: int) -> Any:
        """The material, with all of the old policy that it needs: before the weights change."""

    def num_terms(self, material: Any) -> int:
        """Terms of a sample in an update."""

    def term(
        self, material: Any, place: int, conditions: Conditions, advantages_B: Tensor, step: int, update: int
    ) -> Term:
        """One of them of a batch, under gradient, in the ``step``-th optimizer step; its first rows have advantages."""

    def rehearse(self, x_BCHW: Tensor, conditions: Conditions) -> None:
        """A term and its gradient of samples that are no matter: what it takes of memory."""

    def reweighted(self, material: Any, advantages_B: Tensor, gradients: Sequence[SampleGradients]) -> list[Term]:
        """Terms whose gradients the rollout took."""


def make_replay(
    algorithm: Algorithm, model: FlowModel, old_policy: OldPolicy, sampling: BatchSize, seed: int
) -> Replay:
    """The replay of what the algorithm's objective learns from; ``sampling`` is a batch without gradient."""
    if algorithm.learns_from_images:
        return ImageReplay(
            model=model,
            old_policy=old_policy,
            times=algorithm.times,
            objective=algorithm.image_objective,
            sampling=sampling,
            seed=seed,
        )
    if old_policy.lags:
        raise ValueError(
            f"train.old_policy_growth={old_policy.growth} makes rollouts of another policy than the "
            "trained one, and this algorithm's ratio must begin at 1; use 0, or an algorithm that learns from images"
        )
    return StepReplay(model=model, grid=algorithm.grid, dynamics=algorithm.dynamics, objective=algorithm.step_objective)


def rehearsal(algorithm: Algorithm) -> Callable[[FlowModel], Replay]:
    """A model -> the replay that shows the memory planner what a term takes."""
    one = BatchSize(value=1, key="runtime.sampling_batch")
    return lambda model: make_replay(algorithm, model, OldPolicy(model.trainable), one, seed=0)


@dataclass(frozen=True, kw_only=True)
class StepReplay:
    """The stored steps of a rollout, whose material is the trained steps themselves."""

    model: FlowModel
    grid: Sequence[float]
    dynamics: Dynamics
    objective: StepObjective

    deviation_name: ClassVar[str] = "ratio_deviation"

    @property
    def has_log_prob(self) -> bool:
        return not self.objective.needs_distance and max(map(len, self.objective.chunks(len(self.grid) - 1))) == 1

    @property
    def names(self) -> tuple[str, ...]:
        # without a penalty the reference is not run, so there is no KL to log
        return (*(("kl",) if self.objective.kl_coef > 0 else ()), "approx_kl", "clip_fraction")

    @property
    def max_deviation(self) -> float:
        # measured on the embedded model: 0 in float32 and in bfloat16; in batches of 1 in place of 8, which round
        # otherwise, .003 of the clip range in float32 and 4 to 21 of it in bfloat16
        return 0.1 * self.objective.clip_range

    def begin(
        self, trained: TrainedSteps, conditions_B: Conditions, iteration: int, num_updates: int, num_shares: int
    ) -> TrainedSteps:
        return trained

    def num_terms(self, material: TrainedSteps) -> int:
        return len(self.objective.chunks(len(material.steps)))

    def term(
        self, material: TrainedSteps, place: int, conditions: Conditions, advantages_B: Tensor, step: int, update: int
    ) -> Term:
        # the old policy's branch of guidance is the policy's own until the first optimizer step
        is_known, kept = step == 0 and len(material.unconditional_TBCHW) > 0, slice(len(advantages_B))
        chunk = [
            self._replayed(material, i, conditions, material.unconditional_TBCHW[i] if is_known else None, kept)
            for i in self.objective.chunks(len(material.steps))[place]
        ]
        return self._judged(chunk[0] if len(chunk) == 1 else _together(chunk), advantages_B)

    def reweighted(
        self,
        material: TrainedSteps,
        advantages_B: Tensor,
        gradients: Sequence[SampleGradients],
    ) -> list[Term]:
        """Leave the gradient of the summed loss: the sum of d loss / d log_prob times d log_prob / d weights.

        On the policy the ratio is 1, where the loss has one derivative a sample for all of its steps.  LeanGRPO (2026).
        """
        log_prob_TB = torch.cat([part.log_prob_TB for part in gradients], dim=1)
        no_kl_B = torch.zeros_like(log_prob_TB[0])
        log_prob_B = log_prob_TB[0].clone().requires_grad_()
        loss, _ = self.objective(Replayed(log_prob_B, log_prob_B.detach(), no_kl_B, no_kl_B), advantages_B)
        (factor_B,) = torch.autograd.grad(loss, log_prob_B, torch.full_like(loss, len(log_prob_B)))
        sizes = [part.log_prob_TB.shape[1] for part in gradients]
        for place, weight in enumerate(self.model.trainable.values()):
            weight.grad = torch.zeros_like(weight)
            for factor_b, part in zip(factor_B.split(sizes), gradients, strict=True):
                weight.grad += torch.tensordot(factor_b.to(weight.dtype), part.weights[place], dims=1)
        # the statistics do not assume that it is: they compare with what was stored
        steps = zip(log_prob_TB, material.log_prob_TB, strict=True)
        return [self._judged(Replayed(own_B, old_B, no_kl_B, no_kl_B), advantages_B) for own_B, old_B in steps]

    def rehearse(self, x_BCHW: Tensor, conditions: Conditions) -> None:
        none_B = x_BCHW.new_zeros(len(x_BCHW))
        # as many steps at once as the longest chunk has
        count = max(map(len, self.objective.chunks(len(self.grid) - 2)))
        x_TBCHW, none_TB = x_BCHW.expand(count, *x_BCHW.shape), none_B.expand(count, -1)
        trained = TrainedSteps(tuple(range(count)), x_TBCHW, x_TBCHW, none_TB, x_TBCHW[:0], x_TBCHW)
        self.term(trained, 0, conditions, none_B, 1, 0).loss.backward()

    def _replayed(
        self, rows: TrainedSteps, place: int, conditions: Conditions, unconditional: Tensor | None, kept: slice
    ) -> Replayed:
        """One stored step under the policy as it is now; ``kept`` are the rows that are not there to fill a batch."""
        x_BCHW, step = rows.x_TBCHW[place], rows.steps[place]
        t = self.grid[step]
        if self.objective.kl_coef > 0:
            v_BCHW, reference_BCHW = self.model.velocity_and_reference(x_BCHW, t, conditions, unconditional)
        else:
            v_BCHW, reference_BCHW = self.model.velocity(x_BCHW, t, conditions, unconditional), None
        coefficients = self.dynamics(self.grid, step)
        log_prob_B, kl_B = coefficients.log_prob(x_BCHW, v_BCHW, rows.x_next_TBCHW[place], reference_BCHW)
        distance_B = torch.zeros_like(log_prob_B)
        if self.objective.needs_distance:
            moved_BCHW = coefficients.mean(x_BCHW, v_BCHW) - rows.mean_TBCHW[place]
            distance_B = moved_BCHW.square().flatten(1).mean(dim=1)
        return Replayed(
            log_prob_B[kept],
            rows.log_prob_TB[place, kept],
            kl_B[kept],
            distance_B[kept],
            std=coefficients.std,
            duration=t - self.grid[step + 1],
            precision=coefficients.precision,
        )

    def _judged(self, replayed: Replayed, advantages_B: Tensor) -> Term:
        loss, stats = self.objective(replayed, advantages_B)
        means = {name: getattr(stats, name) for name in self.names}
        return Term(len(advantages_B), loss, means, stats.ratio_deviation)


def _together(chunk: Sequence[Replayed]) -> Replayed:
    """One ratio of several steps: the geometric mean of theirs."""
    log_prob_B, old_B, kl_B, distance_B = (
        torch.stack([getattr(one, name) for one in chunk]).mean(dim=0)
        for name in ("log_prob_B", "old_log_prob_B", "kl_B", "distance_B")
    )
    return Replayed(log_prob_B, old_B, kl_B, distance_B)


@dataclass(frozen=True)
class NoisedImages:
    """Images as they are noised again: whose they are, where, and what the old policy says there.

    ``old_UDBCHW`` are of the last updates: of all of them, or of all but the first.
    """

    prompt_ids_B: Tensor
    places_B: Tensor
    x_0_BCHW: Tensor
    t_UDB: Tensor
    old_UDBCHW: Tensor

    def select(self, select: Select) -> "NoisedImages":
        return NoisedImages(
            select(self.prompt_ids_B, 0),
            select(self.places_B, 0),
            select(self.x_0_BCHW, 0),
            select(self.t_UDB, 2),
            select(self.old_UDBCHW, 2),
        )

    def noise(self, seed: int, update: int, draw: int) -> PhiloxNoise:
        """eps of one draw, which is not drawn before it is used."""
        stream = MATCHING_STREAM + update * self.t_UDB.shape[1] + draw
        return PhiloxNoise(seed, stream, self.prompt_ids_B, self.places_B)

    def old(self, update: int, draw: int) -> Tensor | None:
        """v_old of one draw, None where it is not known."""
        place = update - (len(self.t_UDB) - len(self.old_UDBCHW))
        return self.old_UDBCHW[place, draw] if place >= 0 else None


@dataclass(frozen=True, kw_only=True)
class ImageReplay:
    """Final latents, noised again at ``times``; ``sampling`` is the batch in which the old policy is asked."""

    model: FlowModel
    old_policy: OldPolicy
    times: DrawnTimes
    objective: ImageObjective
    sampling: BatchSize
    seed: int

    has_log_prob: ClassVar[bool] = False
    deviation_name: ClassVar[str] = "velocity_deviation"
    # as a share of the error of v.  Before the first optimizer step the policy is the old one, so what differs is
    # rounding, that of adapters merged in the model's type; the loss differs by at most twice the share
    max_deviation: ClassVar[float] = 0.1

    def __post_init__(self) -> None:
        if self.model.has_two_branches:
            raise ValueError(
                f"algorithm.objective {type(self.objective).__name__} learns from images and trains the branch of "
                "guidance that knows the text alone: the other would stay behind and mislead it; use "
                "model.guidance_scale=1, in training and evaluation"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.objective.names if name != "kl" or self.objective.kl_coef > 0)

    def begin(
        self, trained: TrainedImages, conditions_B: Conditions, iteration: int, num_updates: int, num_shares: int
    ) -> NoisedImages:
        samples, device = trained.samples, self.model.device
        t_UDA = self.times(len(samples.prompts), samples.group_size, num_updates, iteration, self.seed)
        places = [0] * len(samples) if self.times.is_shared else samples.places
        prompt_ids_B, places_B = (
            torch.tensor(ids).to(device, non_blocking=True) for ids in (samples.prompt_ids, places)
        )
        t_UDB = t_UDA[:, :, list(samples.rows)].to(device, non_blocking=True)
        nothing = trained.x_0_BCHW.new_empty(0, self.times.per_image, *trained.x_0_BCHW.shape)
        images = NoisedImages(prompt_ids_B, places_B, trained.x_0_BCHW, t_UDB, nothing)
        is_checked = iteration % CHECKED_EVERY == 0
        first = 0 if num_shares > 1 or is_checked or self.old_policy.lags else 1
        if first == num_updates:
            return images
        return replace(images, old_UDBCHW=self._old(images, conditions_B, range(first, num_updates), samples.most))

    def num_terms(self, material: NoisedImages) -> int:
        return self.times.per_image

    def term(
        self, material: NoisedImages, place: int, conditions: Conditions, advantages_B: Tensor, step: int, update: int
    ) -> Term:
        noise, old_BCHW = material.noise(self.seed, update, place), material.old(update, place)
        x_0_BCHW, t_B = material.x_0_BCHW, material.t_UDB[update, place]
        x_t_BCHW = add_noise(x_0_BCHW, noise, t_B)
        v_BCHW, reference_BCHW = self._velocities(x_t_BCHW, t_B, conditions)
        deviation = None
        if step == 0 and old_BCHW is not None and not self.old_policy.lags:
            again = matching_loss(v_BCHW.detach(), old_BCHW, x_0_BCHW, noise)
            deviation = (again.drift / again.old).sqrt()[: len(advantages_B)].max()
            old_BCHW = None
        errors = matching_loss(v_BCHW, old_BCHW, x_0_BCHW, noise, beta=self.objective.beta, v_reference=reference_BCHW)
        kept, count = slice(len(advantages_B)), max(1, len(advantages_B))
        loss_B, logged_B = self.objective(
            MatchingErrors(*(error_B[kept] for error_B in errors)), t_B[kept], advantages_B
        )
        means = {name: logged_B[name].detach().sum() / count for name in self.names}
        return Term(len(advantages_B), loss_B.sum() / count, means, deviation)

    def reweighted(
        self, material: NoisedImages, advantages_B: Tensor, gradients: Sequence[SampleGradients]
    ) -> list[Term]:
        raise AssertionError("a rollout of images takes no gradients")

    def rehearse(self, x_BCHW: Tensor, conditions: Conditions) -> None:
        ids_B = torch.zeros(len(x_BCHW), dtype=torch.int64, device=x_BCHW.device)
        t_UDB = x_BCHW.new_full((1, 1, len(x_BCHW)), 0.5)
        old_UDBCHW = x_BCHW.to(conditions.embeds_BLC.dtype)[None, None]
        images = NoisedImages(ids_B, ids_B, x_BCHW, t_UDB, old_UDBCHW)
        self.term(images, 0, conditions, x_BCHW.new_ones(len(x_BCHW)), 1, 0).loss.backward()

    def _velocities(self, x_BCHW: Tensor, t_B: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor | None]:
        """v, and the reference policy's where a penalty asks for it."""
        if self.objective.kl_coef > 0:
            v_BCHW, reference_BCHW = self.model.velocity_and_reference(x_BCHW, t_B, conditions)
        else:
            v_BCHW, reference_BCHW = self.model.velocity(x_BCHW, t_B, conditions), None
        assert isinstance(v_BCHW, Tensor)
        assert not isinstance(reference_BCHW, GuidedVelocity)
        return v_BCHW, reference_BCHW

    @torch.no_grad()
    def _old(self, images: NoisedImages, conditions_B: Conditions, updates: range, most: int) -> Tensor:
        """The policy as it is now at each draw of some updates."""

        def run(batch: Batch) -> Tensor:
            rows, conditions = images.select(batch.of), batch.conditions(conditions_B)
            v_UDBCHW = torch.stack(
                [torch.stack([self._asked(rows, u, d, conditions) for d in range(len(rows.t_UDB[u]))]) for u in updates]
            )
            return v_UDBCHW[:, :, : batch.count]

        with self.old_policy.applied(), self.model.gathered(), self.model.sampling():
            cut = in_batches(len(images.x_0_BCHW), self.sampling, run, most, in_step=self.model.in_lockstep)
            return torch.cat([v_UDBCHW for _, v_UDBCHW in cut], dim=2)

    def _asked(self, rows: NoisedImages, update: int, draw: int, conditions: Conditions) -> Tensor:
        t_B = rows.t_UDB[update, draw]
        v_BCHW = self.model.velocity(
            add_noise(rows.x_0_BCHW, rows.noise(self.seed, update, draw), t_B), t_B, conditions
        )
        assert isinstance(v_BCHW, Tensor)
        return v_BCHW
