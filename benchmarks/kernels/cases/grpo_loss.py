"""The clipped loss of an iteration's samples, its statistics and its gradient: some kilobytes, so launches decide."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Inputs, Outputs, Run, Scale, Size, Variant, compiled
from fastgrpo_kernels import grpo_loss

_CLIP_RANGE = 1e-4
_KL_COEF = 0.04


def cases(scale: Scale) -> list[Case]:
    return [_case(scale(Size(1152, ())))]


def _triton(log_prob_B: Tensor, old_log_prob_B: Tensor, advantage_B: Tensor, kl_B: Tensor) -> Outputs:
    loss, stats = grpo_loss(log_prob_B, old_log_prob_B, advantage_B, kl_B, clip_range=_CLIP_RANGE, kl_coef=_KL_COEF)
    return loss, *stats


def _eager(log_prob_B: Tensor, old_log_prob_B: Tensor, advantage_B: Tensor, kl_B: Tensor) -> Outputs:
    log_ratio_B = log_prob_B - old_log_prob_B
    ratio_B = log_ratio_B.exp()
    unclipped_B = -advantage_B * ratio_B
    clipped_B = -advantage_B * ratio_B.clamp(1 - _CLIP_RANGE, 1 + _CLIP_RANGE)
    kl = kl_B.mean()
    loss = torch.maximum(unclipped_B, clipped_B).mean() + _KL_COEF * kl
    with torch.no_grad():
        deviation_B = (ratio_B - 1).abs()
        clip_fraction = (deviation_B > _CLIP_RANGE).float().mean()
        return loss, clip_fraction, (ratio_B - 1 - log_ratio_B).mean(), deviation_B.max(), kl.detach()


def _case(size: Size) -> Case:
    B = size.samples

    def make(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        old_log_prob_B, advantage_B, kl_B = torch.randn(3, B, generator=generator, device=device)
        # none near the borders of the clip range, where float32 cannot tell on which side it is
        steps_B = torch.randint(-2, 3, (B,), generator=generator, device=device)
        log_prob_B = old_log_prob_B + 0.75 * _CLIP_RANGE * steps_B
        return {"log_probs": (log_prob_B, old_log_prob_B), "advantage": advantage_B, "kl": kl_B.abs()}

    def with_gradient(function: Callable[..., Outputs]) -> Run:
        def run(inputs: Inputs) -> Outputs:
            log_prob_B, old_log_prob_B = inputs["log_probs"]
            leaves = log_prob_B.detach().requires_grad_(), inputs["kl"].detach().requires_grad_()
            with torch.enable_grad():
                loss, *stats = function(leaves[0], old_log_prob_B, inputs["advantage"], leaves[1])
            # of the sum over samples, of which the loss is the mean
            return loss.detach(), *stats, *torch.autograd.grad(loss, leaves, torch.full_like(loss, B))

        return run

    return Case(
        op="grpo_loss",
        label=f"[{B}] float32 kl backward",
        make=make,
        variants={
            "triton": Variant(with_gradient(_triton)),
            "eager": Variant(with_gradient(_eager)),
            "compile": Variant(with_gradient(compiled(_eager))),
        },
        expected=with_gradient(_eager),
        num_elements=B,
        # log_prob, old log_prob, advantage, kl, and the first three again for the gradients of log_prob and kl
        read_bytes=B * 28,
        written_bytes=B * 8,
        limit="launch",
        streams=False,
    )
