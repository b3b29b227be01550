"""The forward process of flow matching: an image's latent, noised to a time.

    x_t = (1 - t) * x_0 + t * noise          t in [0, 1], 1 = noise

What a loss on the forward process is taken at (arXiv:2509.16117, arXiv:2509.25050); its target is the velocity noise -
x_0 of `matching_loss`.  Letters: B samples, D latent elements of one sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.checks import check_samples, per_sample
from fastgrpo_kernels.guidance import load_row
from fastgrpo_kernels.noise import load_noise, noise_arguments, noise_pointers, noise_reference
from fastgrpo_kernels.op import define_op
from fastgrpo_kernels.philox import NO_FUSION, PhiloxNoise
from fastgrpo_kernels.step_mean import BLOCK, rows


def add_noise_reference(
    x_0: Tensor,
    noise: Tensor | None,
    seed: int,
    stream: int,
    prompt_ids_B: Tensor | None,
    sample_ids_B: Tensor | None,
    t_B: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The operator on the CPU and under tracing, and what the tests compare the kernel with; noise, or ids for it."""
    x_0_BD = rows(x_0).float()
    noise_BD = noise_reference(noise, seed, stream, prompt_ids_B, sample_ids_B, x_0_BD.shape[1])
    x_t_BD = (1.0 - t_B)[:, None] * x_0_BD + t_B[:, None] * noise_BD
    return x_t_BD.to(dtype).view(x_0.shape)


@triton.jit(do_not_specialize=["seed", "stream"])
def _add_noise_kernel(
    x_t_ptr, x_0_ptr, noise_ptr, prompt_ids_ptr, sample_ids_ptr, t_ptr, seed, stream, D,
    DRAWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cols = block * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    noise = load_noise(noise_ptr, prompt_ids_ptr, sample_ids_ptr, seed, stream, row, block, cols, mask, D, DRAWN, BLOCK)
    t = tl.load(t_ptr + row)
    x_t = (1.0 - t) * load_row(x_0_ptr, row, cols, mask, D) + t * noise
    tl.store(x_t_ptr + row * D + cols, x_t.to(x_t_ptr.dtype.element_ty), mask=mask)


def _add_noise_triton(
    x_0: Tensor,
    noise: Tensor | None,
    seed: int,
    stream: int,
    prompt_ids_B: Tensor | None,
    sample_ids_B: Tensor | None,
    t_B: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    x_0_BD = rows(x_0)
    B, D = x_0_BD.shape
    x_t_BD = torch.empty_like(x_0_BD, dtype=dtype)
    if B > 0:
        _add_noise_kernel[(B, triton.cdiv(D, BLOCK))](
            x_t_BD, x_0_BD, *noise_pointers(x_0_BD, noise, prompt_ids_B, sample_ids_B), t_B.contiguous(),
            seed, stream, D, DRAWN=noise is None, BLOCK=BLOCK, **NO_FUSION,
        )  # fmt: skip
    return x_t_BD.view(x_0.shape)


_add_noise = define_op("add_noise", triton=_add_noise_triton, reference=add_noise_reference)


def add_noise(
    x_0: Tensor, noise: Tensor | PhiloxNoise, t: float | Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """x_t = (1 - t) x_0 + t noise, contiguous, in the shape of x_0 and in ``dtype``, by default that of x_0.

    x_0 and a given noise are [B, ...] of any layout and floating dtype; `PhiloxNoise` is drawn in registers and is that
    of `philox_normal` bit for bit.  t is a number or float32 [B].  Computed in float32 and rounded once.  No gradient.
    Raises ValueError for shapes, dtypes or devices that differ, for a gradient wanted, and for a t outside [0, 1] (but
    for a tensor on a GPU, which would have to be waited for).
    """
    given, *drawn = noise_arguments("x_0", x_0, noise)
    check_samples(x_0=x_0, **({} if given is None else {"noise": given}))
    for name, value in (("x_0", x_0), ("noise", given), ("t", t)):
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"add_noise has no gradient and {name} requires one; pass {name}.detach()")
    dtype = x_0.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}; pass that of the model, for instance bfloat16")
    _check_time(t)
    return _add_noise(x_0, given, *drawn, *per_sample(x_0, t=t), dtype)


def _check_time(t: float | Tensor) -> None:
    if not isinstance(t, Tensor):
        is_time = 0 <= t <= 1
    elif t.device.type == "cpu" and not torch.compiler.is_compiling():
        is_time = bool(((t >= 0) & (t <= 1)).all())
    else:
        return
    if not is_time:
        shown = t.tolist() if isinstance(t, Tensor) else t
        raise ValueError(f"t must lie in [0, 1], got {shown}; 1 is noise, and a timestep in [0, 1000] is 1000 t")
