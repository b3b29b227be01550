"""Flow-GRPO's pass over the samples of an iteration: the driver's order of calls, around its ``compute_log_prob``.

    loss = mean of max(-A ratio, -A clip(ratio)) + kl_coef * mean of |mean - reference mean|^2 / (2 std^2)

Letters: B samples of a micro-batch, S samples of an iteration, T trained steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.flow_grpo.peer import Peer
from benchmarks.flow_grpo.recipe import MAX_GRAD_NORM

_ADVANTAGE_CLAMP = 5.0


@dataclass
class TheirUpdate:
    """Accumulates over half of the micro-batches and all trained steps, clips, steps; the average every 8 steps."""

    peer: Peer
    global_step: int = 0

    def __call__(self, samples: dict[str, Tensor]) -> float:
        """Their pass over the samples; max |ratio - 1| before its first optimizer step."""
        num_samples = len(samples["timesteps"])
        if not self.peer.recipe.window:
            order = torch.randperm(num_samples, device=self.peer.accelerator.device)
            samples = {name: value[order] for name, value in samples.items()}
        self.peer.transformer.train()
        info: list[dict[str, Tensor]] = []
        first_deviations: list[Tensor] = []
        first_step = self.global_step
        for first in range(0, num_samples, num_samples // self.peer.job.batches):
            batch = {
                name: value[first : first + num_samples // self.peer.job.batches] for name, value in samples.items()
            }
            conditions = self.conditions(batch)
            for j in range(self.peer.recipe.num_trained_steps):
                with self.peer.accelerator.accumulate(self.peer.transformer):
                    loss, ratio_B, logged = self.loss(batch, j, conditions)
                    info.append(logged)
                    if self.global_step == first_step:
                        first_deviations.append((ratio_B.detach() - 1).abs().max())
                    self.peer.accelerator.backward(loss)
                    if self.peer.accelerator.sync_gradients:
                        self.peer.accelerator.clip_grad_norm_(self.peer.transformer.parameters(), MAX_GRAD_NORM)
                    self.peer.optimizer.step()
                    self.peer.optimizer.zero_grad()
                if self.peer.accelerator.sync_gradients:
                    means = {name: torch.stack([one[name] for one in info]).mean() for name in info[0]}
                    self.peer.accelerator.reduce(means, reduction="mean")
                    self.global_step += 1
                    info = []
            self.peer.ema.step(self.peer.trained, self.global_step)
        return torch.stack(first_deviations).max().item()

    def conditions(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """With guidance, the empty prompt's rows come first, as compute_log_prob expects."""
        embeds, pooled = batch["prompt_embeds"], batch["pooled_prompt_embeds"]
        if not self.peer.config.train.cfg:
            return embeds, pooled
        rows = slice(len(embeds))
        return torch.cat([self.peer.empty_embeds[rows], embeds]), torch.cat([self.peer.empty_pooled[rows], pooled])

    def loss(
        self, batch: dict[str, Tensor], j: int, conditions: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Clipped surrogate and KL of one micro-batch and trained step; its ratio [B]; what they log of it."""
        arguments = (self.peer.transformer, self.peer.pipeline, batch, j, *conditions, self.peer.config)
        _, log_prob_B, mean_BCHW, std_B111 = self.peer.compute_log_prob(*arguments)
        ratio_B = torch.exp(log_prob_B - batch["log_probs"][:, j])
        advantage_B = batch["advantages"][:, j].clamp(-_ADVANTAGE_CLAMP, _ADVANTAGE_CLAMP)
        clipped_B = ratio_B.clamp(1 - self.peer.recipe.clip_range, 1 + self.peer.recipe.clip_range)
        policy_loss = torch.maximum(-advantage_B * ratio_B, -advantage_B * clipped_B).mean()
        logged = {"policy_loss": policy_loss}
        loss = policy_loss
        if self.peer.recipe.kl_coef > 0:
            with torch.no_grad(), self.peer.transformer.disable_adapter():
                _, _, reference_BCHW, _ = self.peer.compute_log_prob(*arguments)
            distance_B111 = (mean_BCHW - reference_BCHW).square().mean(dim=(1, 2, 3), keepdim=True)
            kl = (distance_B111 / (2 * std_B111**2)).mean()
            loss = policy_loss + self.peer.recipe.kl_coef * kl
            logged["kl_loss"] = kl
        outside_B = ratio_B - 1
        return (
            loss,
            ratio_B,
            {
                **logged,
                "loss": loss,
                "approx_kl": 0.5 * (log_prob_B - batch["log_probs"][:, j]).square().mean(),
                "clipfrac": (outside_B.abs() > self.peer.recipe.clip_range).float().mean(),
                "clipfrac_gt_one": (outside_B > self.peer.recipe.clip_range).float().mean(),
                "clipfrac_lt_one": (-outside_B > self.peer.recipe.clip_range).float().mean(),
            },
        )
