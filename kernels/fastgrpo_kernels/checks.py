"""What the step operators accept: samples [B, ...] that match, and coefficients that are numbers or one a sample."""

import torch
from torch import Tensor


def check_samples(**samples: Tensor) -> None:
    """Raise ValueError unless all are floating [B, ...] of one shape on one device; the first sets the example."""
    (first_name, first), *others = samples.items()
    if first.dim() < 2 or first[:1].numel() == 0 < len(first):
        raise ValueError(
            f"{first_name} must be [B, ...] with elements, got {tuple(first.shape)}; add a batch dimension"
        )
    for name, sample in samples.items():
        if not sample.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {sample.dtype}; cast it to float32 or bfloat16")
    for name, sample in others:
        if sample.shape != first.shape or sample.device != first.device:
            raise ValueError(
                f"{name} is {tuple(sample.shape)} on {sample.device} and {first_name} {tuple(first.shape)} on "
                f"{first.device}; pass the same shape and device"
            )


def per_sample(x: Tensor, **values: float | Tensor) -> list[Tensor]:
    """Each value as float32 [B] on the device of x: a number is repeated; ValueError for another tensor."""
    values_B = []
    for name, value in values.items():
        if not isinstance(value, Tensor):
            values_B.append(torch.full(x.shape[:1], float(value), dtype=torch.float32, device=x.device))
            continue
        if value.shape != x.shape[:1] or value.dtype != torch.float32 or value.device != x.device:
            raise ValueError(
                f"{name} must be float32 of shape {tuple(x.shape[:1])} on {x.device}, got {value.dtype} of shape "
                f"{tuple(value.shape)} on {value.device}; pass a number, or one number per sample, for instance "
                "torch.full((B,), value, device=x.device)"
            )
        values_B.append(value)
    return values_B


def check_positive(name: str, value: float | Tensor, remedy: str) -> None:
    """Raise ValueError unless positive.  A tensor on a GPU is not read: that would wait for it."""
    if not isinstance(value, Tensor):
        is_positive = value > 0
    elif value.device.type == "cpu" and not torch.compiler.is_compiling():
        is_positive = bool((value > 0).all())
    else:
        return
    if not is_positive:
        shown = value.tolist() if isinstance(value, Tensor) else value
        raise ValueError(f"{name} must be positive, got {shown}; {remedy}")


def check_no_gradient(op: str, **values: float | Tensor | None) -> None:
    """Raise ValueError for a gradient that the op would drop without a word."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op} is differentiable in v only and {name} requires a gradient; pass {name}.detach()")
