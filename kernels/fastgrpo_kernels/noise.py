"""The noise of each sample, as every operator that takes noise takes it: a tensor, or ids of which it is drawn.

Drawn, it is that of `philox_normal` bit for bit and lives in registers only.  Letters: B samples, D latent elements of
one sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.guidance import load_row
from fastgrpo_kernels.philox import PhiloxNoise, normal_block, philox_normal_reference

# what an operator is given: noise or None, seed, stream, prompt ids and sample ids or None
NoiseArguments = tuple[Tensor | None, int, int, Tensor | None, Tensor | None]


def noise_arguments(name: str, x: Tensor, noise: Tensor | PhiloxNoise) -> NoiseArguments:
    """Those of an operator; ValueError unless noise to be drawn has ids for each sample of ``x``, called ``name``."""
    if isinstance(noise, Tensor):
        return noise, 0, 0, None, None
    ids_B = noise.prompt_ids_B
    if len(ids_B) != len(x) or ids_B.device != x.device:
        raise ValueError(
            f"noise has {len(ids_B)} ids on {ids_B.device} and {name} is {tuple(x.shape)} on {x.device}; give every "
            "sample a prompt id and a sample id"
        )
    return None, noise.seed, noise.stream, ids_B, noise.sample_ids_B


def noise_reference(
    noise: Tensor | None, seed: int, stream: int, prompt_ids_B: Tensor | None, sample_ids_B: Tensor | None, numel: int
) -> Tensor:
    """float32 [B, D]."""
    if noise is not None:
        return noise.flatten(1).float()
    assert prompt_ids_B is not None
    assert sample_ids_B is not None
    noise_B1D = philox_normal_reference(seed, stream, prompt_ids_B, sample_ids_B[:, None], numel, torch.float32)
    return noise_B1D.flatten(1)


def noise_pointers(
    default_BD: Tensor, noise: Tensor | None, prompt_ids_B: Tensor | None, sample_ids_B: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise and ids for `load_noise`, and the default for what there is not: a kernel wants a pointer also there."""
    rows = None if noise is None else noise.flatten(1)
    noise_BD, prompt_ids_B, sample_ids_B = (
        default_BD if tensor is None else tensor.contiguous() for tensor in (rows, prompt_ids_B, sample_ids_B)
    )
    return noise_BD, prompt_ids_B, sample_ids_B


@triton.jit
def load_noise(
    noise_ptr, prompt_ids_ptr, sample_ids_ptr, seed, stream, row, block, cols, mask, D,
    DRAWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a sample's noise; beyond the end of the sample it is zero if given, and not if drawn."""
    if DRAWN:
        prompt_id, sample_id = tl.load(prompt_ids_ptr + row), tl.load(sample_ids_ptr + row)
        noise = normal_block(seed, stream, prompt_id, sample_id, block, BLOCK // 4)
    else:
        noise = load_row(noise_ptr, row, cols, mask, D)
    return noise
