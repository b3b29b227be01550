"""Classifier-free guidance, fused into every operator that takes a velocity.

    v = unconditional + scale * (conditional - unconditional)

arXiv:2207.12598.  The unconditional branch is a constant, as in Flow-GRPO: gradients flow through the conditional one.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class GuidedVelocity:
    """Both branches of a guided velocity, [B, ...] each, for an operator to combine in registers."""

    conditional: Tensor
    unconditional: Tensor
    scale: float

    def detach(self) -> "GuidedVelocity":
        return GuidedVelocity(self.conditional.detach(), self.unconditional, self.scale)


def combined(v: Tensor | GuidedVelocity) -> Tensor:
    """The velocity as one float32 tensor, guided where it has two branches."""
    return guided_reference(*branches("v", v))


def branches(name: str, v: Tensor | GuidedVelocity) -> tuple[Tensor, Tensor | None, float]:
    """(conditional, unconditional or None, scale); ValueError for a gradient wanted in the unconditional branch."""
    if isinstance(v, Tensor):
        return v, None, 1.0
    if v.unconditional.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}.unconditional gets no gradient and requires one; compute it under torch.no_grad()")
    return v.conditional, v.unconditional, float(v.scale)


def guided_reference(v: Tensor, v_uncond: Tensor | None, scale: float) -> Tensor:
    if v_uncond is None:
        return v.float()
    return v_uncond.float() + scale * (v.float() - v_uncond.float())


@triton.jit
def load_row(ptr, row, cols, mask, D):
    return tl.load(ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_velocity(v_ptr, v_uncond_ptr, scale, row, cols, mask, D, GUIDED: tl.constexpr):
    v = load_row(v_ptr, row, cols, mask, D)
    if GUIDED:
        v_uncond = load_row(v_uncond_ptr, row, cols, mask, D)
        v = v_uncond + scale * (v - v_uncond)
    return v
