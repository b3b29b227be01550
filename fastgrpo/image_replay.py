"""Images, noised again under gradient: what is learned from the signal ``images``.

    x_t = (1 - t) x_0 + t eps           at pairs (t, eps) that are drawn anew for each update

eps is a function of its ids and never stored.  What the old policy says there, v_old, is computed before the first
optimizer step, in one pass with adapters merged, in sampling's batches.  It takes updates * per_image latents a sample
in the model's type, 128 KiB each for 65,536 elements in bfloat16; those of the first update are not needed where the
policy is the old one and an optimizer step is on all samples.  Source: DiffusionNFT, arXiv:2509.16117.
Letters: B samples of this rank, A of all ranks, U updates, D draws of each, C H W of a latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fastgrpo.algorithm.noise import MATCHING_STREAM
from fastgrpo.algorithm.objective.images import ImageObjective
from fastgrpo.algorithm.timesteps import DrawnTimes
from fastgrpo.memory.batch_size import BatchSize
from fastgrpo.memory.batches import Batch, in_batches
from fastgrpo.models.adapter import FlowModel
from fastgrpo.old_policy import OldPolicy
from fastgrpo.on_device import on_device
from fastgrpo.replay import Select, Term
from fastgrpo.types import Conditions, SampleGradients, TrainedImages
from fastgrpo_kernels import GuidedVelocity, MatchingErrors, PhiloxNoise, add_noise, matching_loss

# iterations in which the old policy is asked at the first draw too, to be compared with the gradient's own v
CHECKED_EVERY = 10


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
        prompt_ids_B, places_B = (on_device(ids, device) for ids in (samples.prompt_ids, places))
        t_UDB = on_device(t_UDA[:, :, list(samples.rows)], device)
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
            if len(advantages_B) > 0:
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
        self.model.backward(self.term(images, 0, conditions, x_BCHW.new_ones(len(x_BCHW)), 1, 0).loss)

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
