"""What `sde_step` and `sde_log_prob` must compute alike, bit for bit: the mean of a step and the distance from it.

    mean     = c_x * x + c_v * v
    log_prob = constant - weight * mean over D of (x_next - mean)^2

The on-policy ratio is 1 only if a state gets one log_prob, whichever op computes it and whatever batch it is in.  So
products and sums are rounded one by one (kernels are launched with `enable_fp_fusion=False`) and squares are summed in
float64, where no order of summation shows in the float32 result.  Letters: B samples, D latent elements of one sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# elements of one sample that one program handles
BLOCK = 1024


def rows(x: Tensor) -> Tensor:
    """[B, ...] of any layout -> contiguous [B, D]."""
    return x.reshape(x.shape[0], -1).contiguous()


def step_mean_reference(x_BD: Tensor, v_BD: Tensor, c_x_B: Tensor, c_v_B: Tensor) -> Tensor:
    return c_x_B[:, None] * x_BD.float() + c_v_B[:, None] * v_BD.float()


def mean_square_reference(difference_BD: Tensor) -> Tensor:
    return difference_BD.double().square().mean(dim=1).float()


@triton.jit
def load_row(ptr, row, cols, mask, D):
    return tl.load(ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def step_mean_kernel(x_ptr, v_ptr, c_x_ptr, c_v_ptr, row, cols, mask, D):
    x = load_row(x_ptr, row, cols, mask, D)
    v = load_row(v_ptr, row, cols, mask, D)
    return tl.load(c_x_ptr + row) * x + tl.load(c_v_ptr + row) * v


@triton.jit
def store_square_sum(partial_ptr, row, difference, mask):
    """One partial sum per block: atomics would make the result differ from run to run."""
    difference = tl.where(mask, difference, 0.0).to(tl.float64)
    tl.store(partial_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(difference * difference, axis=0))


def empty_partial_sums(x: Tensor) -> Tensor:
    num_elements = x.numel() // x.shape[0]
    return torch.empty(x.shape[0], triton.cdiv(num_elements, BLOCK), dtype=torch.float64, device=x.device)


def mean_square_of_partial_sums(partial_sums: Tensor, num_elements: int) -> Tensor:
    return (partial_sums.sum(dim=1) / num_elements).float()


def check_samples(**samples: Tensor) -> None:
    """Raise ValueError unless all are floating [B, ...] of one shape on one device; the first sets the example."""
    (first_name, first), *others = samples.items()
    if first.dim() < 2 or first.numel() == 0:
        raise ValueError(f"{first_name} must be a non-empty [B, ...], got {tuple(first.shape)}; add a batch dimension")
    for name, sample in samples.items():
        if not sample.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {sample.dtype}; cast it to float32 or bfloat16")
    for name, sample in others:
        if sample.shape != first.shape or sample.device != first.device:
            raise ValueError(
                f"{name} is {tuple(sample.shape)} on {sample.device} and {first_name} {tuple(first.shape)} on "
                f"{first.device}; pass the same shape and device"
            )


def check_coefficients(x: Tensor, **coefficients: Tensor) -> None:
    """Raise ValueError unless each is a float32 [B] on the device of x."""
    for name, value_B in coefficients.items():
        if value_B.shape != x.shape[:1] or value_B.dtype != torch.float32 or value_B.device != x.device:
            raise ValueError(
                f"{name} must be float32 of shape {tuple(x.shape[:1])} on {x.device}, got {value_B.dtype} of shape "
                f"{tuple(value_B.shape)} on {value_B.device}; pass one number per sample, for instance "
                "torch.full((B,), value, device=x.device)"
            )


def check_no_gradient(op: str, **tensors: Tensor) -> None:
    """Raise ValueError for a gradient that the op would drop without a word."""
    for name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op} is differentiable in v only and {name} requires a gradient; pass {name}.detach()")
