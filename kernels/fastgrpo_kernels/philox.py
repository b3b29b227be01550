"""Standard normal noise that is a function of its indices: Philox 4x32-10 and Box-Muller.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).  Four elements come from one block of four
32-bit integers:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (i div 4, candidate id, prompt id, stream)        ids by their low 32 bits
    w0..w3  = Philox4x32-10(counter, key)
    radius(w) = sqrt(-2 log(w 2^-32 + 2^-33)),  angle(w) = w 2^-32 * 2 pi       in float32
    elements 4j, 4j+1 = radius(w0) * (cos, sin)(angle(w1)),  4j+2, 4j+3 = radius(w2) * (cos, sin)(angle(w3))

So element i of candidate k of prompt p never depends on what else is drawn, on the number of GPUs, or on numel.
The integers are equal on every device; the normals differ by the rounding of log, sin and cos.
Letters: P prompts, K candidates, J blocks of four elements.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.op import define_op

_LOW_32_BITS = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# constants of both the reference and the kernel
_UNIFORM_STEP = tl.constexpr(2.0**-32)
_UNIFORM_HALF_STEP = tl.constexpr(2.0**-33)
_ANGLE_STEP = tl.constexpr(2.0 * math.pi * 2.0**-32)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_uint32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of four counter words (int64 tensors in [0, 2^32) that broadcast) under two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # an int64 product wraps, and its 64 bits are those of the unsigned product
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product2 >> 32) ^ c1 ^ k0) & _LOW_32_BITS
        c2 = ((product0 >> 32) ^ c3 ^ k1) & _LOW_32_BITS
        # the high halves are masked away where these are used, one round later
        c1, c3 = product2, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW_32_BITS, (k1 + _KEY_STEPS[1]) & _LOW_32_BITS
    return c0, c1 & _LOW_32_BITS, c2, c3 & _LOW_32_BITS


def philox_normal_reference(
    seed: int, stream: int, prompt_ids_P: Tensor, candidate_ids_K: Tensor, numel: int
) -> Tensor:
    """The operator on the CPU, and what the tests compare the kernel with."""
    blocks_J = torch.arange(triton.cdiv(numel, 4), device=prompt_ids_P.device)
    # broadcasting keeps the first rounds small: a word depends on all of p, k and j only from the third on
    counter = (
        blocks_J[None, None, :],
        candidate_ids_K[None, :, None] & _LOW_32_BITS,
        prompt_ids_P[:, None, None] & _LOW_32_BITS,
        torch.full_like(blocks_J[:1], stream)[None, None, :],
    )
    w0, w1, w2, w3 = philox_uint32(counter, (seed & _LOW_32_BITS, seed >> 32))
    normals_PKJ4 = torch.stack([*_box_muller(w0, w1), *_box_muller(w2, w3)], dim=-1)
    return normals_PKJ4.flatten(2)[..., :numel].contiguous()


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    # in (0, 1]: never log(0), and 2^-33 keeps the tail to 6.7 standard deviations
    uniform = radius_word.float().mul_(_UNIFORM_STEP.value).add_(_UNIFORM_HALF_STEP.value)
    radius = uniform.log_().mul_(-2.0).sqrt_()
    angle = angle_word.float().mul_(_ANGLE_STEP.value)
    return torch.cos(angle).mul_(radius), angle.sin_().mul_(radius)


@triton.jit
def _box_muller_kernel(radius_word, angle_word):
    uniform = radius_word.to(tl.float32) * _UNIFORM_STEP + _UNIFORM_HALF_STEP
    radius = tl.sqrt_rn(-2.0 * tl.log(uniform))
    angle = angle_word.to(tl.float32) * _ANGLE_STEP
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit(do_not_specialize=["seed", "stream"])
def _philox_normal_kernel(
    out_ptr, prompt_ids_ptr, candidate_ids_ptr, seed, stream, K, numel, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    prompt = tl.load(prompt_ids_ptr + row // K).to(tl.uint32)
    candidate = tl.load(candidate_ids_ptr + row % K).to(tl.uint32)
    c0 = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, zero + candidate, zero + prompt, zero + stream.to(tl.uint32))
    n0, n1 = _box_muller_kernel(w0, w1)
    n2, n3 = _box_muller_kernel(w2, w3)
    normals = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    cols = block.to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + row * numel + cols, normals, mask=cols < numel)


def _philox_normal_triton(seed: int, stream: int, prompt_ids_P: Tensor, candidate_ids_K: Tensor, numel: int) -> Tensor:
    P, K, block = prompt_ids_P.shape[0], candidate_ids_K.shape[0], 256
    out_PKD = torch.empty(P, K, numel, dtype=torch.float32, device=prompt_ids_P.device)
    _philox_normal_kernel[(P * K, triton.cdiv(numel, 4 * block))](
        out_PKD, prompt_ids_P.contiguous(), candidate_ids_K.contiguous(), seed, stream, K, numel, BLOCK=block
    )
    return out_PKD


def _philox_normal_fake(seed: int, stream: int, prompt_ids_P: Tensor, candidate_ids_K: Tensor, numel: int) -> Tensor:
    return prompt_ids_P.new_empty(prompt_ids_P.shape[0], candidate_ids_K.shape[0], numel, dtype=torch.float32)


_philox_normal = define_op(
    "philox_normal", triton=_philox_normal_triton, reference=philox_normal_reference, fake=_philox_normal_fake
)


def philox_normal(seed: int, stream: int, prompt_ids_P: Tensor, candidate_ids_K: Tensor, numel: int) -> Tensor:
    """Standard normal noise [P, K, numel], float32, on the device of the ids.

    Element (p, k, i) is a function of (seed, stream, prompt_ids_P[p], candidate_ids_K[k], i) alone.  Ids are int64 and
    count by their low 32 bits.  Raises ValueError for a seed outside [0, 2^63), a stream outside [0, 2^32), a numel
    outside [1, 2^33) or ids of another dtype, rank or device.
    """
    for name, value, bits in (("seed", seed, 63), ("stream", stream, 32)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} must be in [0, 2^{bits}), got {value}; reduce it modulo 2^{bits}")
    if not 1 <= numel < 2**33:
        raise ValueError(f"numel must be in [1, 2^33), got {numel}; pass the number of elements of one latent")
    for name, ids in (("prompt_ids_P", prompt_ids_P), ("candidate_ids_K", candidate_ids_K)):
        if ids.dtype != torch.int64 or ids.dim() != 1 or ids.shape[0] == 0:
            raise ValueError(
                f"{name} must be a non-empty int64 vector, got {ids.dtype} of shape {tuple(ids.shape)}; "
                "pass torch.tensor([...], dtype=torch.int64)"
            )
    if prompt_ids_P.device != candidate_ids_K.device:
        raise ValueError(
            f"prompt_ids_P is on {prompt_ids_P.device} and candidate_ids_K on {candidate_ids_K.device}; "
            "move them to the device where the noise is wanted"
        )
    return _philox_normal(seed, stream, prompt_ids_P, candidate_ids_K, numel)
